"""Scores of class probabilities."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_fordes._checks import ArgumentError, check_positive_int
from pyro_fordes.metrics._inputs import check_classes, check_densities, log_mean


def nll(log_probs: Tensor, labels: Tensor | None = None) -> Float[Tensor, ""]:
    r"""Negative log likelihood per point of the mean prediction.

    .. math:: -\frac1N \sum_n \log \frac1M \sum_i p_i(y_n)

    It is infinite if some label has probability 0 under every particle.

    Source: the logarithmic score of Gneiting & Raftery, Strictly Proper Scoring Rules, Prediction,
    and Estimation, 2007, with its sign changed.

    Args:
        log_probs: log probabilities ``(particle, point, class)``; or, without labels, the log
            density of each observation under each particle, ``(particle, point)``.
        labels: the observed classes, ``(point,)``.

    Raises:
        ArgumentError: if shapes do not fit, or log probabilities are not normalised.
        NumericalError: if a value is NaN or plus infinity.

    Example:
        >>> probs = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]])  # two particles, one point
        >>> nll(probs.log(), torch.tensor([0]))  # -log(3/8)
        tensor(0.9808)
        >>> nll(torch.distributions.Normal(torch.zeros(2, 1), 1.0).log_prob(torch.zeros(1)))
        tensor(0.9189)
    """
    if labels is None:
        return point_nll(check_densities(log_probs)).mean()
    return point_nll(*check_classes(log_probs, labels)).mean()


def brier(log_probs: Tensor, labels: Tensor) -> Float[Tensor, ""]:
    r"""Brier score, between 0 and 2: squared distance of the mean prediction from the label.

    .. math:: \frac1N \sum_n \sum_c \big(\bar p_{nc} - [c = y_n]\big)^2

    With two classes, some halve it, which leaves the squared error of one probability.

    Source: Brier, Verification of Forecasts Expressed in Terms of Probability, 1950.

    Args:
        log_probs: log probabilities ``(particle, point, class)``.
        labels: the observed classes, ``(point,)``.

    Raises:
        ArgumentError: if shapes do not fit, or log probabilities are not normalised.
        NumericalError: if a value is NaN.

    Example:
        >>> brier(torch.tensor([[[0.75, 0.25]]]).log(), torch.tensor([0]))  # 2 (1/4)^2
        tensor(0.1250)
    """
    return point_brier(*check_classes(log_probs, labels)).mean()


def accuracy(log_probs: Tensor, labels: Tensor, *, top_k: int = 1) -> Float[Tensor, ""]:
    """Share of points whose label is among the ``top_k`` classes of the mean prediction.

    Which of several equally probable classes are taken is left to `torch.topk`.

    Args:
        log_probs: log probabilities ``(particle, point, class)``.
        labels: the observed classes, ``(point,)``.
        top_k: how many classes may be named.

    Raises:
        ArgumentError: if shapes do not fit, log probabilities are not normalised, or there are
            fewer than ``top_k`` classes.
        NumericalError: if a value is NaN.

    Example:
        >>> log_probs = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]]).log()
        >>> accuracy(log_probs, torch.tensor([0, 1]))
        tensor(0.5000)
        >>> accuracy(log_probs, torch.tensor([0, 1]), top_k=2)
        tensor(1.)
    """
    log_probs, labels = check_classes(log_probs, labels)
    classes = log_probs.shape[-1]
    if check_positive_int("top_k", top_k) > classes:
        raise ArgumentError(f"top_k must be at most the number of classes, {classes}; got {top_k}")
    return point_correct(log_probs, labels, top_k=top_k).mean()


def ece(
    log_probs: Tensor, labels: Tensor, *, bins: int = 15, adaptive: bool = False
) -> Float[Tensor, ""]:
    r"""Expected calibration error of the most probable class.

    .. math:: \sum_b \frac{|B_b|}{N} \big|\mathrm{accuracy}(B_b) - \mathrm{confidence}(B_b)\big|

    where the confidence is the largest mean probability. Bins are of equal width,
    :math:`(\frac{b-1}{B}, \frac bB]`; with ``adaptive``, they hold equally many points, up to one,
    but points of the same confidence share a bin. The value depends on the number of bins and is
    biased upwards with few points in each.

    Source: Guo, Pleiss, Sun & Weinberger, On Calibration of Modern Neural Networks, 2017 (arXiv
    1706.04599), equation (3); bins of equal size by Nguyen & O'Connor, Posterior Calibration and
    Exploratory Analysis for Natural Language Processing Models, 2015 (arXiv 1508.05154).
    torchmetrics closes bins at the other end, and so has one more for a confidence of exactly 1.

    Args:
        log_probs: log probabilities ``(particle, point, class)``.
        labels: the observed classes, ``(point,)``.
        bins: how many bins.
        adaptive: whether bins hold equally many points.

    Raises:
        ArgumentError: if shapes do not fit, log probabilities are not normalised, or ``bins`` is
            no positive integer.
        NumericalError: if a value is NaN.

    Example:
        >>> log_probs = torch.tensor([[[0.8, 0.2], [0.7, 0.3], [0.4, 0.6]]]).log()
        >>> ece(log_probs, torch.tensor([0, 1, 1]), bins=1)  # |2/3 - 0.7|
        tensor(0.0333)
    """
    found = point_confidence(*check_classes(log_probs, labels))
    _, gaps = _binned(*found, bins, adaptive)
    return gaps.abs().sum() / log_probs.shape[1]


class Reliability(NamedTuple):
    """What `reliability` returns, one number per bin that has points.

    Attributes:
        confidence: mean confidence of the points in the bin.
        accuracy: share of them whose most probable class is the label.
        points: how many they are.
    """

    confidence: Tensor
    accuracy: Tensor
    points: Tensor


def reliability(
    log_probs: Tensor, labels: Tensor, *, bins: int = 15, adaptive: bool = False
) -> Reliability:
    """Accuracy by confidence, what a reliability diagram shows; empty bins are left out.

    The mean over bins of their distance, weighted by their points, is `ece`, which has the same
    arguments and bins.

    Source: Niculescu-Mizil & Caruana, Predicting Good Probabilities With Supervised Learning, 2005.

    Args:
        log_probs: log probabilities ``(particle, point, class)``.
        labels: the observed classes, ``(point,)``.
        bins: how many bins.
        adaptive: whether bins hold equally many points.

    Returns:
        A `Reliability` of tensors ``(bin,)``, from low to high confidence.

    Raises:
        ArgumentError: if shapes do not fit, log probabilities are not normalised, or ``bins`` is
            no positive integer.
        NumericalError: if a value is NaN.

    Example:
        >>> log_probs = torch.tensor([[[0.8, 0.2], [0.7, 0.3], [0.4, 0.6]]]).log()
        >>> found = reliability(log_probs, torch.tensor([0, 1, 1]), bins=3)
        >>> found.confidence, found.accuracy, found.points
        (tensor([0.6000, 0.7500]), tensor([1.0000, 0.5000]), tensor([1., 2.]))
    """
    found = point_confidence(*check_classes(log_probs, labels))
    return reliability_of(*found, bins=bins, adaptive=adaptive)


# ---------------------------------------------------------------- point by point, already checked


def point_nll(log_probs: Tensor, labels: Tensor | None = None) -> Float[Tensor, " point"]:
    """The terms that `nll` is the mean of."""
    if labels is not None:
        log_probs = log_probs[:, torch.arange(len(labels), device=labels.device), labels]
    return -log_mean(log_probs)


def point_brier(log_probs: Tensor, labels: Tensor) -> Float[Tensor, " point"]:
    """The terms that `brier` is the mean of."""
    probs = log_mean(log_probs).exp()
    truth = torch.nn.functional.one_hot(labels, probs.shape[-1])
    return (probs - truth).square().sum(-1)


def point_correct(log_probs: Tensor, labels: Tensor, *, top_k: int = 1) -> Float[Tensor, " point"]:
    """1 where the label is among the ``top_k`` most probable classes, else 0."""
    named = log_mean(log_probs).topk(top_k).indices
    return (named == labels.unsqueeze(1)).any(1).to(log_probs.dtype)


def point_confidence(
    log_probs: Tensor, labels: Tensor
) -> tuple[Float[Tensor, " point"], Float[Tensor, " point"]]:
    """The largest mean probability of each point, and 1 where its class is the label, else 0."""
    highest, predicted = log_mean(log_probs).max(-1)
    return highest.exp(), (predicted == labels).to(highest.dtype)


def reliability_of(
    confidence: Float[Tensor, " point"],
    correct: Float[Tensor, " point"],
    *,
    bins: int = 15,
    adaptive: bool = False,
) -> Reliability:
    """`reliability` from confidences and whether each was right."""
    index, _ = _binned(confidence, correct, bins, adaptive)
    sums = torch.stack([confidence, correct, torch.ones_like(correct)])
    sums = sums.new_zeros(3, bins).index_add(1, index, sums)
    mean, right, count = sums[:, sums[2] > 0]
    return Reliability(mean / count, right / count, count)


def bin_index(
    confidence: Float[Tensor, " point"], bins: int, adaptive: bool = False
) -> Int[Tensor, " point"]:
    """The bin of each point, as `ece` has them."""
    check_positive_int("bins", bins)
    if adaptive:
        last = torch.arange(1, bins, device=confidence.device) * len(confidence) + bins - 1
        edges = confidence.sort().values[last // bins - 1]
    else:
        edges = torch.arange(1, bins, device=confidence.device).to(confidence) / bins
    return torch.bucketize(confidence, edges)


def _binned(
    confidence: Tensor, correct: Tensor, bins: int, adaptive: bool
) -> tuple[Int[Tensor, " point"], Float[Tensor, " bin"]]:
    """The bin of each point, and the sum of confidence minus accuracy in each bin."""
    index = bin_index(confidence, bins, adaptive)
    gaps = confidence - correct
    return index, gaps.new_zeros(bins).index_add(0, index, gaps)
