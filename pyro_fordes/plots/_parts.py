"""What all plots share: axes, arrays and names of axes."""

from collections.abc import Iterable
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
        check_axes([axes])
        return axes
    return require("matplotlib.pyplot").subplots(figsize=size, layout="constrained")[1]


def check_axes(axes: Any, count: int = 1) -> list[Any]:
    """Some axes as a list, or an `ArgumentError` if they are no axes or not so many."""
    cells = list(axes) if isinstance(axes, Iterable) else [axes]
    strange = [type(cell).__name__ for cell in cells if not hasattr(cell, "imshow")]
    if strange or len(cells) != count:
        raise ArgumentError(f"axes must be {count} axes of matplotlib, got {strange or len(cells)}")
    return cells


def to_array(tensor: Any) -> Any:
    """A tensor as an array."""
    return torch.as_tensor(tensor).detach().cpu().numpy()


def check_shape(name: str, value: Any, axes: int) -> None:
    """Raise an `ArgumentError` unless a value is a tensor of finite numbers with so many axes."""
    if not isinstance(value, Tensor) or value.dim() != axes or value.numel() == 0:
        got = describe(value) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"{name} must be a tensor with {axes} axes and some values, got {got}")
    bad = int((~value.isfinite()).sum())
    if bad:
        raise ArgumentError(f"{name} must be finite, but {bad} are not")
