"""Kinds of uncertainty, what they detect, and how particles differ."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import require
from pyro_fordes.metrics._inputs import (
    check_floats,
    check_log_probs,
    check_several,
    entropy_of,
    log_mean,
)


class Uncertainty(NamedTuple):
    """What `uncertainty` returns, one number per point; larger is more uncertain.

    Attributes:
        total: entropy of the mean prediction.
        aleatoric: mean entropy of the particles' predictions.
        epistemic: their difference, the mutual information of label and particle.
        least_confidence: 1 minus the largest mean probability.
    """

    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    least_confidence: Tensor


class Detection(NamedTuple):
    """What `detection` returns; points outside the distribution are the positive class.

    Attributes:
        auroc: area under the receiver operating characteristic.
        aupr: average precision, the area under the precision-recall curve in steps.
        fpr95: share of inside points flagged where at least 95 % of those outside are.
    """

    auroc: Tensor
    aupr: Tensor
    fpr95: Tensor


def uncertainty(log_probs: Tensor) -> Uncertainty:
    r"""How uncertain each prediction is, and how much of that the particles disagree about.

    .. math:: \underbrace{H[\bar p]}_\text{total} =
        \underbrace{\textstyle\frac1M \sum_i H[p_i]}_\text{aleatoric} +
        \underbrace{I(y; i)}_\text{epistemic}, \qquad H[p] = -\sum_c p_c \log p_c

    in nats, and :math:`1 - \max_c \bar p_c`. With one particle, nothing is epistemic.

    Source: Depeweg, Hernández-Lobato, Doshi-Velez & Udluft, Decomposition of Uncertainty in
    Bayesian Deep Learning, 2018 (arXiv 1710.07283).

    Args:
        log_probs: log probabilities ``(particle, point, class)``.

    Returns:
        An `Uncertainty` of tensors ``(point,)``; each can be given to `detection`.

    Raises:
        ArgumentError: if the shape does not fit, or log probabilities are not normalised.
        NumericalError: if a value is NaN.

    Example:
        >>> certain = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]).log()  # of different classes
        >>> total, aleatoric, epistemic, least_confidence = uncertainty(certain)
        >>> total, aleatoric, epistemic  # log 2
        (tensor([0.6931]), tensor([0.]), tensor([0.6931]))
    """
    return point_uncertainty(check_log_probs(log_probs))


def detection(inside: Tensor, outside: Tensor) -> Detection:
    """How well a score tells points outside the training distribution from points inside.

    Points outside are the positive class, and a larger score says "outside", as all that
    `uncertainty` returns do. For inside points as the positive class, as some papers have it, give
    ``detection(-outside, -inside)``.

    Source: Hendrycks, Mazeika & Dietterich, Deep Anomaly Detection with Outlier Exposure, 2019
    (arXiv 1812.04606), section 4.1; computed by scikit-learn. `Detection.aupr` grows with the share
    of outside points: compare it only between sets of the same sizes.

    Args:
        inside: scores of points like the training data, ``(point,)``.
        outside: scores of other points, ``(point,)``.

    Returns:
        A `Detection` of three tensors without axes.

    Raises:
        ArgumentError: if one has no points or another shape.
        NumericalError: if a score is not finite.
        MissingDependencyError: if scikit-learn is not installed.

    Example:
        >>> detection(torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.5, 0.9]))
        Detection(auroc=tensor(0.8333), aupr=tensor(0.8333), fpr95=tensor(0.3333))
    """
    inside = check_floats("inside", inside, ("point",))
    outside = check_floats("outside", outside, ("point",))
    sklearn = require("sklearn.metrics")
    # Not torchmetrics: it puts scores outside [0, 1] through a sigmoid, which makes ties.
    scores = torch.cat([inside, outside.to(inside.device)]).detach().cpu().double().numpy()
    truth = [0] * len(inside) + [1] * len(outside)
    flagged, found, _ = sklearn.roc_curve(truth, scores, drop_intermediate=False)
    return Detection(
        inside.new_tensor(sklearn.auc(flagged, found)),
        inside.new_tensor(sklearn.average_precision_score(truth, scores)),
        inside.new_tensor(flagged[(found >= 0.95).argmax()]),
    )


def disagreement(log_probs: Tensor) -> Float[Tensor, ""]:
    """Share of points on which two particles name different classes, mean over pairs.

    Source: Fort, Hu & Lakshminarayanan, Deep Ensembles: A Loss Landscape Perspective, 2019 (arXiv
    1912.02757); not divided by the error rate as they do in their plots.

    Args:
        log_probs: log probabilities ``(particle, point, class)`` of at least 2 particles.

    Raises:
        ArgumentError: if the shape does not fit, log probabilities are not normalised, or there is
            only one particle.
        NumericalError: if a value is NaN.

    Example:
        >>> probs = torch.tensor([[[0.9, 0.1]], [[0.6, 0.4]], [[0.3, 0.7]]])
        >>> disagreement(probs.log())  # two pairs of three
        tensor(0.6667)
    """
    return point_disagreement(check_several(log_probs)).mean()


def pairwise_kl(log_probs: Tensor) -> Float[Tensor, ""]:
    r"""Kullback-Leibler divergence between two particles' predictions, mean over pairs and points.

    .. math:: \frac1{M (M-1)} \sum_{i \ne j} \frac1N \sum_n \mathrm{KL}(p_{in} \,\|\, p_{jn})

    It is infinite if one particle excludes a class that another does not.

    Source: as a measure of diversity in Fort, Hu & Lakshminarayanan, Deep Ensembles: A Loss
    Landscape Perspective, 2019 (arXiv 1912.02757).

    Args:
        log_probs: log probabilities ``(particle, point, class)`` of at least 2 particles.

    Raises:
        ArgumentError: if the shape does not fit, log probabilities are not normalised, or there is
            only one particle.
        NumericalError: if a value is NaN.

    Example:
        >>> pairwise_kl(torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]).log())
        tensor(0.1373)
    """
    log_probs = check_several(log_probs)
    total = log_probs.new_zeros(())
    for one in log_probs:  # a row of pairs at a time: all would need O(M^2) memory
        terms = torch.where(one > -math.inf, one.exp() * (one - log_probs), 0.0)
        total = total + terms.sum(-1).mean(-1).sum()
    return total / (len(log_probs) * (len(log_probs) - 1))


# ---------------------------------------------------------------- point by point, already checked


def point_uncertainty(log_probs: Float[Tensor, "particle point class"]) -> Uncertainty:
    """What `uncertainty` returns."""
    mean = log_mean(log_probs)
    total, aleatoric = entropy_of(mean), entropy_of(log_probs).mean(0)
    # A sum of the other classes keeps digits that 1 minus the largest would lose near 1.
    others = mean.exp().scatter(-1, mean.argmax(-1, keepdim=True), 0.0)
    return Uncertainty(total, aleatoric, (total - aleatoric).clamp_min(0), others.sum(-1))


def point_disagreement(log_probs: Tensor) -> Float[Tensor, " point"]:
    """The terms that `disagreement` is the mean of."""
    count, _, classes = log_probs.shape
    votes = torch.nn.functional.one_hot(log_probs.argmax(-1), classes).sum(0)
    agreeing = (votes * (votes - 1)).sum(-1).to(log_probs.dtype)
    return 1 - agreeing / (count * (count - 1))
