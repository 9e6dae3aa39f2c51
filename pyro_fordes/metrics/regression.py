"""Scores of numbers and of mixtures of normals."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import ArgumentError, check_level, describe
from pyro_fordes.metrics._inputs import check_floats


def rmse(predictions: Tensor, targets: Tensor) -> Float[Tensor, ""]:
    """Root mean squared error of the mean of the particles' predictions.

    Args:
        predictions: ``(particle, point)``.
        targets: the observed values, ``(point,)``.

    Raises:
        ArgumentError: if shapes do not fit.
        NumericalError: if a value is not finite.

    Example:
        >>> rmse(torch.tensor([[1.0, 2.0], [3.0, 2.0]]), torch.tensor([2.0, 4.0]))
        tensor(1.4142)
    """
    predictions, targets, _ = check_regression(predictions, targets, None)
    return point_squared_error(predictions, targets).mean().sqrt()


def crps(predictions: Tensor, targets: Tensor, sd: Tensor | None = None) -> Float[Tensor, ""]:
    r"""Continuous ranked probability score, mean over points, in the unit of the targets.

    .. math:: \int (F(x) - [x \ge y])^2 \, dx = \mathbb E |X - y| - \tfrac12 \mathbb E |X - X'|

    with :math:`X, X'` independent from the mixture :math:`F`. Without ``sd``, F steps up by 1 / M
    at each prediction, and the score of one particle is its absolute error. With ``sd``, F is a
    mixture of normals, and

    .. math:: \frac1M \sum_i A(y - \mu_i, \sigma_i^2)
        - \frac1{2M^2} \sum_{ij} A(\mu_i - \mu_j, \sigma_i^2 + \sigma_j^2), \qquad
        A(\mu, \sigma^2) = 2 \sigma\, \varphi(\mu / \sigma) + \mu\, (2 \Phi(\mu / \sigma) - 1).

    Operations are O(M log M) and O(M^2) per point, memory O(M) in both cases.

    Source: Gneiting & Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation, 2007,
    equation (21); the mixture by Grimit, Gneiting, Berrocal & Johnson, The Continuous Ranked
    Probability Score for Circular Variables, 2006, equation (5).

    Args:
        predictions: draws, or with ``sd`` means of normals, ``(particle, point)``.
        targets: the observed values, ``(point,)``.
        sd: standard deviations above 0, of the shape of ``predictions``.

    Raises:
        ArgumentError: if shapes do not fit or a standard deviation is not above 0.
        NumericalError: if a value is not finite.

    Example:
        >>> crps(torch.tensor([[1.0], [3.0]]), torch.tensor([2.0]))
        tensor(0.5000)
        >>> crps(torch.tensor([[0.0]]), torch.tensor([0.0]), torch.tensor([[1.0]]))
        tensor(0.2337)
    """
    return point_crps(*check_regression(predictions, targets, sd)).mean()


def coverage(
    predictions: Tensor, targets: Tensor, sd: Tensor | None = None, *, level: float = 0.9
) -> Float[Tensor, ""]:
    r"""Share of targets in the central prediction interval of a level; good is near the level.

    The interval is between the :math:`\frac{1 - \text{level}}2` and
    :math:`\frac{1 + \text{level}}2` quantiles of the mixture, ends included; a quantile is the
    smallest value that at least this share of the mixture does not exceed. No quantile is
    computed: a target lies between two quantiles where the distribution function there lies between
    their probabilities.

    With few draws the interval is too narrow: M predictions without ``sd`` that come from the
    truth cover at most (M - 1) / (M + 1) in expectation.

    Args:
        predictions: draws, or with ``sd`` means of normals, ``(particle, point)``.
        targets: the observed values, ``(point,)``.
        sd: standard deviations above 0, of the shape of ``predictions``.
        level: between 0 and 1.

    Raises:
        ArgumentError: if shapes do not fit, a standard deviation is not above 0, or the level is
            not between 0 and 1.
        NumericalError: if a value is not finite.

    Example:
        >>> mean, sd = torch.zeros(1, 3), torch.ones(1, 3)
        >>> coverage(mean, torch.tensor([-1.7, 0.0, 1.6]), sd)  # the interval is ±1.645
        tensor(0.6667)
    """
    given = check_regression(predictions, targets, sd)
    return point_covered(*given, level=check_level(level)).mean()


# ---------------------------------------------------------------- point by point, already checked


def point_squared_error(predictions: Tensor, targets: Tensor) -> Float[Tensor, " point"]:
    """The terms that `rmse` is the root of the mean of."""
    return (predictions.mean(0) - targets).square()


def point_crps(
    predictions: Tensor, targets: Tensor, sd: Tensor | None = None
) -> Float[Tensor, " point"]:
    """The terms that `crps` is the mean of."""
    count = len(predictions)
    errors = predictions - targets
    if sd is None:
        # Over pairs, |x - x'| sums to the sorted values, each times how many lie below minus above.
        weights = torch.arange(1 - count, count, 2).to(errors).unsqueeze(1)
        return errors.abs().mean(0) - (weights * errors.sort(0).values).mean(0) / count
    spread = torch.zeros_like(targets)
    for error, scale in zip(errors, sd, strict=True):  # a row of pairs at a time, for memory
        spread = spread + _mean_absolute(error - errors, torch.hypot(scale, sd)).mean(0)
    return _mean_absolute(errors, sd).mean(0) - spread / (2 * count)


def point_covered(
    predictions: Tensor, targets: Tensor, sd: Tensor | None = None, *, level: float = 0.9
) -> Float[Tensor, " point"]:
    """1 where the target lies in the interval of `coverage`, else 0."""
    low, high = (1 - level) / 2, (1 + level) / 2
    if sd is None:
        not_above = (predictions <= targets).to(targets.dtype).mean(0)
        below = (predictions < targets).to(targets.dtype).mean(0)
        covered = (not_above >= low) & (below < high)
    else:
        share = torch.special.ndtr((targets - predictions) / sd).mean(0)
        covered = (share >= low) & (share <= high)
    return covered.to(targets.dtype)


# ---------------------------------------------------------------- formulas and checks


def _mean_absolute(
    mean: Float[Tensor, "*shape"], sd: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Mean absolute value of normals."""
    ratio = mean / sd
    density = math.sqrt(2 / math.pi) * (-0.5 * ratio.square()).exp()
    return sd * density + mean * torch.erf(ratio * math.sqrt(0.5))


def check_regression(
    predictions: Tensor, targets: Tensor, sd: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Predictions, targets and standard deviations that fit each other, in one type."""
    axes = ("particle", "point")
    predictions = check_floats("predictions", predictions, axes)
    targets = check_floats("targets", targets, axes[1:])
    if len(targets) != predictions.shape[1]:
        raise ArgumentError(
            f"targets must have one value for each of the {predictions.shape[1]} points of "
            f"predictions, got {describe(targets)}"
        )
    if sd is not None:
        sd = check_floats("sd", sd, axes)
        if sd.shape != predictions.shape or not (sd > 0).all():
            raise ArgumentError(
                f"sd must have the shape of predictions, {tuple(predictions.shape)} (use .expand), "
                f"and values above 0; got {describe(sd)} with minimum {sd.min().item():.4g}"
            )
        sd = sd.to(predictions)
    return predictions, targets.to(predictions), sd
