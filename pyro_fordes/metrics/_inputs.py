"""What all metrics share: checks of their arguments, and means of log probabilities."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import ArgumentError, NumericalError, describe


def log_mean(logs: Float[Tensor, "particle *rest"]) -> Float[Tensor, "*rest"]:
    """Log of the mean over particles."""
    return logs.logsumexp(0) - math.log(len(logs))


def entropy_of(logs: Float[Tensor, "*rest class"]) -> Float[Tensor, "*rest"]:
    """Entropy from log probabilities, where 0 log 0 is 0."""
    return (logs.exp() * (-logs).clamp_max(torch.finfo(logs.dtype).max)).sum(-1)


def check_floats(name: str, value: Tensor, axes: tuple[str, ...], *, log: bool = False) -> Tensor:
    """A tensor with these axes and no bad value, in float32 at least; a log may be -inf."""
    fits = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == len(axes)
    if not fits or value.numel() == 0:
        got = describe(value) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(
            f"{name} must be a floating-point tensor ({', '.join(axes)}) that is not empty, got "
            f"{got}"
        )
    good = value.isfinite() | value.isneginf() if log else value.isfinite()
    if not good.all():
        index = tuple((~good).nonzero()[0].tolist())
        place = ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True))
        raise NumericalError(
            f"{name} has the value {value[index].item()} at {place} ({int((~good).sum())} bad "
            f"values in all); find where it comes from, or leave that {axes[0]} out"
        )
    return value.float() if value.dtype.itemsize < 4 else value


def check_log_probs(log_probs: Tensor) -> Tensor:
    """Log probabilities of classes must be normalised."""
    axes = ("particle", "point", "class")
    checked = check_floats("log_probs", log_probs, axes, log=True)
    off = checked.logsumexp(-1).abs()
    # Rounding, in half precision too, stays well below; logits and probabilities are far above.
    if (off > max(1e-3, 8 * torch.finfo(log_probs.dtype).eps)).any():
        particle, point = divmod(int(off.argmax()), off.shape[1])
        total = checked[particle, point].exp().sum().item()
        raise ArgumentError(
            f"log_probs must be normalised log probabilities, but those of particle {particle} at "
            f"point {point} are of probabilities that sum to {total:.4g}; take "
            f"logits.log_softmax(-1), or probs.log() of probabilities"
        )
    return checked


def check_densities(log_probs: Tensor) -> Tensor:
    """Log densities of observations under each particle."""
    if isinstance(log_probs, Tensor) and log_probs.dim() == 3:
        raise ArgumentError(
            f"log_probs is {describe(log_probs)}: log probabilities of classes need labels="
        )
    return check_floats("log_probs", log_probs, ("particle", "point"), log=True)


def check_several(log_probs: Tensor) -> Tensor:
    """Log probabilities of at least two particles."""
    log_probs = check_log_probs(log_probs)
    if len(log_probs) < 2:
        raise ArgumentError("log_probs must be of at least 2 particles to compare them, got 1")
    return log_probs


def check_classes(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities, and labels that fit them."""
    log_probs = check_log_probs(log_probs)
    _, points, classes = log_probs.shape
    wanted = f"labels must be integers ({points},), one per point,"
    if not isinstance(labels, Tensor):
        raise ArgumentError(f"{wanted} got {type(labels).__name__}")
    no_integers = labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool
    if no_integers or labels.shape != (points,):
        raise ArgumentError(f"{wanted} got {describe(labels)}")
    labels = labels.to(log_probs.device, torch.long)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ArgumentError(
            f"labels must be between 0 and {classes - 1}, as log_probs has {classes} classes; got "
            f"{low if low < 0 else high}"
        )
    return log_probs, labels
