"""Handwritten digits: do particles that look at different features make a better ensemble?

TODO
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchmetrics.functional.classification import multiclass_calibration_error
from torchvision.transforms import v2

from pyro_fordes import (
    RBF,
    Ensemble,
    InputGradients,
    ParticleInference,
    WGD,
    Weights,
    bayesianize,
    init_to_modules,
    pca_lengthscale,
    to_arviz,
)

NUM_TRAIN, BATCH = 1200, 100
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Digits:
    """One split of the digits. Images are pixels between 0 and 1; `scale` makes them inputs."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def scale(self, images: Tensor) -> Tensor:
        """Images as inputs of the network: flat, with mean 0 and standard deviation 1."""
        return ((images - self.images.mean()) / self.images.std()).flatten(1)


def load(seed: int) -> Digits:
    """Split the 1,797 scans at random into 1,200 for training and 597 held out."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8)[order] / 16
    labels = torch.tensor(labels)[order]
    return Digits(
        images[:NUM_TRAIN], labels[:NUM_TRAIN], images[NUM_TRAIN:], labels[NUM_TRAIN:]
    )


def salt_and_pepper(images: Tensor, share: float) -> Tensor:
    """Make a share of the pixels black or white, half each."""
    draw = torch.rand(images.shape)
    return torch.where(draw < share / 2, 0.0, torch.where(draw > 1 - share / 2, 1.0, images))


# What each corruption does at severity 1 to 5.
CORRUPTIONS: dict[str, tuple[Callable[[float], Callable[[Tensor], Tensor]], Sequence[float]]] = {
    "Gaussian noise": (lambda sigma: v2.GaussianNoise(sigma=sigma), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "Gaussian blur": (lambda sigma: v2.GaussianBlur(5, sigma), (0.5, 0.7, 0.9, 1.1, 1.3)),
    "contrast": (
        lambda factor: lambda images: v2.functional.adjust_contrast(images, factor),
        (0.75, 0.6, 0.45, 0.3, 0.15),
    ),
    "salt and pepper": (
        lambda share: lambda images: salt_and_pepper(images, share),
        (0.04, 0.08, 0.12, 0.16, 0.2),
    ),
    "rotation": (
        lambda angle: lambda images: v2.functional.rotate(
            images, angle, v2.InterpolationMode.BILINEAR
        ),
        (10.0, 20.0, 30.0, 40.0, 50.0),
    ),
}


def corrupt(images: Tensor, name: str, severity: int) -> Tensor:
    """Corrupted images, the same ones at every call."""
    make, strengths = CORRUPTIONS[name]
    with torch.random.fork_rng():
        torch.manual_seed(severity)
        return make(strengths[severity - 1])(images)
