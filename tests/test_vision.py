"""torchvision's networks as they are: FoRDE steps, running statistics, stochastic depth."""

import copy
import math
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.swin_transformer import SwinTransformer

from pyro_fordes import (
    RBF,
    InputGradients,
    ParticleInference,
    bayesianize,
    init_to_modules,
)
from tests.models import Classifier

NUM_DATA, PRIOR, RATE = 10, 0.1, 1e-3
LABELS = torch.tensor([0, 2, 1])


def images(size=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(LABELS), 3, size, size, generator=generator).to(dtype)


def started(make, x, **options):
    """An inference whose two particles start from networks, and those networks."""
    torch.manual_seed(0)
    nets = [make().to(x) for _ in range(2)]
    inference = ParticleInference(
        Classifier(bayesianize(nets[0], PRIOR), num_data=NUM_DATA),
        partial(torch.optim.SGD, lr=RATE),
        2,
        kernel=RBF(InputGradients("x", output="net")),
        init_loc_fn=init_to_modules(nets),
        num_data=NUM_DATA,
        seed=0,
        **options,
    )
    return inference, nets


FULL = {
    "resnet18": models.resnet18,
    "wide_resnet50_2": models.wide_resnet50_2,
    "efficientnet_b0": models.efficientnet_b0,
    "convnext_tiny": models.convnext_tiny,
    "vit_b_16": partial(models.vit_b_16, image_size=32),
    "swin_t": models.swin_t,
}


@pytest.mark.parametrize("name", FULL)
def test_two_steps(name):
    def make():
        net = FULL[name](num_classes=3)
        if name == "vit_b_16":  # starts with a head of zeros, through which no gradient comes
            nn.init.normal_(net.heads.head.weight, std=0.02)
        return net

    x = images()
    inference, nets = started(make, x, diagnostics_every=2)
    assert math.isfinite(inference.step(x, LABELS))
    assert math.isfinite(inference.step(x, LABELS))
    assert inference.diagnostics()["repulsive_force"].min() > 0
    moved = inference.module(1)
    assert type(moved) is type(nets[1])
    for path, parameter in nets[1].named_parameters():
        assert (moved.get_parameter(path) != parameter).any(), path


# -------------------------------------------------------------- against networks trained alone

SETTING = [MBConvConfig(1, 3, 1, 8, 8, 1), MBConvConfig(4, 5, 2, 8, 16, 2)]
SMALL_NORMALISED = {
    "wide bottlenecks": partial(ResNet, Bottleneck, [1, 1, 1, 1], 3, width_per_group=16),
    "efficientnet": partial(EfficientNet, SETTING, 0.0, 0.0, num_classes=3, last_channel=32),
}
# Without what is dropped: a network trained alone would draw other numbers.
FULL_NORMALISED = {
    "resnet18": partial(models.resnet18, num_classes=3),
    "efficientnet_b0": partial(
        models.efficientnet_b0, num_classes=3, dropout=0.0, stochastic_depth_prob=0.0
    ),
}
if os.environ.get("PYRO_FORDES_TEST_LARGE"):  # 10 GB, a minute and a half
    FULL_NORMALISED["wide_resnet50_2"] = partial(models.wide_resnet50_2, num_classes=3)
# Larger images in networks so deep: a BatchNorm over three numbers would magnify what is rounded.
ALONE = [(make, 64, {}) for make in FULL_NORMALISED.values()] + [
    (make, 32, options)
    for make in SMALL_NORMALISED.values()
    for options in ({}, {"chunk_size": 1}, {"vectorize": "vmap"})
]
ALONE_IDS = [
    *FULL_NORMALISED,
    *(f"{n}-{e}" for n in SMALL_NORMALISED for e in ("auto", "chunks", "vmap")),
]


def train_alone(net, x, steps):
    """Steps of SGD on the negative log joint over the number of data."""
    optim = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(steps):
        optim.zero_grad()
        nll = F.cross_entropy(net(x), LABELS) * NUM_DATA
        penalty = sum(value.square().sum() for value in net.parameters()) / (2 * PRIOR**2)
        ((nll + penalty) / NUM_DATA).backward()
        optim.step()


@pytest.mark.parametrize(("make", "size", "options"), ALONE, ids=ALONE_IDS)
def test_without_repulsion_particles_are_networks_trained_alone(make, size, options):
    """Weights and running statistics, though the input gradients are computed."""
    x = images(size, torch.float64)
    inference, nets = started(make, x, repulsion_scale=0.0, **options)
    for _ in range(2):
        inference.step(x, LABELS)
    for i, net in enumerate(copy.deepcopy(nets)):
        train_alone(net, x, steps=2)
        particle = inference.module(i).state_dict()
        torch.testing.assert_close(particle, net.state_dict(), rtol=1e-9, atol=1e-12)


# ----------------------------------------------------------------- stochastic depth, attention

SMALL = {
    "stochastic depth": partial(EfficientNet, SETTING, 0.2, 0.5, num_classes=3, last_channel=32),
    "swin": partial(
        SwinTransformer, [2, 2], 8, [2, 2], [2, 4], [2, 2], stochastic_depth_prob=0.5, num_classes=3
    ),
    "vit": partial(
        models.VisionTransformer,
        16,
        8,
        2,
        2,
        8,
        16,
        dropout=0.2,
        attention_dropout=0.3,
        num_classes=3,
    ),
    "convnext": partial(
        models.ConvNeXt,
        [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)],
        0.5,
        num_classes=3,
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's pooling under vmap
@pytest.mark.parametrize("name", SMALL)
def test_engines_agree_on_what_is_dropped(name):
    def make():
        net = SMALL[name]()
        if name == "vit":
            nn.init.normal_(net.heads.head.weight)
        return net

    x, found = images(16, torch.float64), []
    for options in ({"vectorize": "loop"}, {"vectorize": "vmap"}, {"chunk_size": 1}):
        inference, _ = started(make, x, **options)
        losses = [inference.step(x, LABELS) for _ in range(2)]
        found.append((losses, inference.get_samples(), inference._buffers))
    assert inference.diagnostics()["repulsive_force"].min() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[2], found[0], rtol=1e-9, atol=1e-12)
