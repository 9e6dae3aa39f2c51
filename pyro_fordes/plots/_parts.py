"""What all plots share: axes, arrays and names of axes."""

from typing import Any

import torch
from torch import Tensor

from pyro_fordes._checks import ArgumentError, describe, require

LABELS = {
    "nll": "negative log likelihood (nats per point)",
    "accuracy": "accuracy (share of points)",
    "brier": "Brier score (0 to 2)",
    "ece": "expected calibration error",
    "entropy": "predictive entropy (nats)",
    "total": "predictive entropy (nats)",
    "aleatoric": "mean entropy of the particles (nats)",
    "epistemic": "mutual information (nats)",
    "mutual_information": "mutual information (nats)",
    "least_confidence": "1 - largest probability",
    "rmse": "root mean squared error",
    "crps": "CRPS",
}
"""Names of axes, with units."""


def new_axes(axes: Any, size: tuple[float, float]) -> Any:
    """The axes given, or those of a new figure."""
    if axes is not None:
        return axes
    return require("matplotlib.pyplot").subplots(figsize=size, layout="constrained")[1]


def to_array(tensor: Any) -> Any:
    """A tensor as an array."""
    return torch.as_tensor(tensor).detach().cpu().numpy()


def check_shape(name: str, value: Any, axes: int) -> None:
    """Raise an `ArgumentError` unless a value is a tensor with some points and so many axes."""
    if not isinstance(value, Tensor) or value.dim() != axes or value.numel() == 0:
        got = describe(value) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"{name} must be a tensor with {axes} axes and some values, got {got}")
