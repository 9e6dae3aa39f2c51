r"""How good predictions of several particles are, from tensors of theirs.

Classification takes ``log_probs``, normalised log probabilities ``(particle, point, class)``, and
``labels``, integers ``(point,)``. From logits take ``logits.log_softmax(-1)``, from probabilities
``probs.log()``; what is not normalised is refused. A probability of exactly 0 is fine.

Regression takes ``predictions``, ``(particle, point)``, and ``targets``, ``(point,)``. Each
particle predicts a number, or with ``sd`` a normal distribution around it.

The prediction that is scored is the equal mixture of the particles',
:math:`\bar p(y) = \frac1M \sum_i p_i(y)`. Logs are natural. Results are tensors on the device and
in the type of the predictions (float32 for half precision): without axes where one number describes
all points. Labels and targets may be on another device.

Scores of rankings come from scikit-learn (extra ``eval``). The others are a few lines each and need
no extra; they are tested against scikit-learn and torchmetrics.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import (
    ArgumentError,
    NumericalError,
    check_number,
    check_positive_int,
    describe,
    require,
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


# ---------------------------------------------------------------- classification


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
    if labels is not None:
        log_probs, labels = _check_classes(log_probs, labels)
        log_probs = log_probs[:, torch.arange(len(labels), device=labels.device), labels]
    elif isinstance(log_probs, Tensor) and log_probs.dim() == 3:
        raise ArgumentError(
            f"log_probs is {describe(log_probs)}: log probabilities of classes need labels="
        )
    else:
        log_probs = _check_floats("log_probs", log_probs, ("particle", "point"), log=True)
    return -_log_mean(log_probs).mean()


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
    log_probs, labels = _check_classes(log_probs, labels)
    probs = _log_mean(log_probs).exp()
    truth = torch.nn.functional.one_hot(labels, probs.shape[-1])
    return (probs - truth).square().sum(-1).mean()


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
    log_probs, labels = _check_classes(log_probs, labels)
    classes = log_probs.shape[-1]
    if check_positive_int("top_k", top_k) > classes:
        raise ArgumentError(f"top_k must be at most the number of classes, {classes}; got {top_k}")
    named = _log_mean(log_probs).topk(top_k).indices
    return (named == labels.unsqueeze(1)).any(1).to(log_probs.dtype).mean()


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
    log_probs, labels = _check_classes(log_probs, labels)
    check_positive_int("bins", bins)
    highest, predicted = _log_mean(log_probs).max(-1)
    confidence, count = highest.exp(), len(labels)
    if adaptive:
        last = (torch.arange(1, bins, device=labels.device) * count + bins - 1) // bins - 1
        edges = confidence.sort().values[last]
    else:
        edges = torch.arange(1, bins, device=labels.device).to(confidence) / bins
    gaps = confidence - (predicted == labels).to(confidence)
    sums = gaps.new_zeros(bins).index_add(0, torch.bucketize(confidence, edges), gaps)
    return sums.abs().sum() / count


# ---------------------------------------------------------------- uncertainty


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
    log_probs = _check_log_probs(log_probs)
    mean = _log_mean(log_probs)
    total, aleatoric = _entropy(mean), _entropy(log_probs).mean(0)
    # A sum of the other classes keeps digits that 1 minus the largest would lose near 1.
    others = mean.exp().scatter(-1, mean.argmax(-1, keepdim=True), 0.0)
    return Uncertainty(total, aleatoric, (total - aleatoric).clamp_min(0), others.sum(-1))


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
    inside = _check_floats("inside", inside, ("point",))
    outside = _check_floats("outside", outside, ("point",))
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
    log_probs = _check_several(log_probs)
    count, _, classes = log_probs.shape
    votes = torch.nn.functional.one_hot(log_probs.argmax(-1), classes).sum(0)
    agreeing = (votes * (votes - 1)).sum(-1).to(log_probs.dtype)
    return 1 - agreeing.mean() / (count * (count - 1))


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
    log_probs = _check_several(log_probs)
    total = log_probs.new_zeros(())
    for one in log_probs:  # a row of pairs at a time: all would need O(M^2) memory
        terms = torch.where(one > -math.inf, one.exp() * (one - log_probs), 0.0)
        total = total + terms.sum(-1).mean(-1).sum()
    return total / (len(log_probs) * (len(log_probs) - 1))


# ---------------------------------------------------------------- regression


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
    predictions, targets, _ = _check_regression(predictions, targets, None)
    return (predictions.mean(0) - targets).square().mean().sqrt()


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
    predictions, targets, sd = _check_regression(predictions, targets, sd)
    count = len(predictions)
    errors = predictions - targets
    if sd is None:
        # Over pairs, |x - x'| sums to the sorted values, each times how many lie below minus above.
        weights = torch.arange(1 - count, count, 2).to(errors).unsqueeze(1)
        return (errors.abs().mean(0) - (weights * errors.sort(0).values).mean(0) / count).mean()
    spread = torch.zeros_like(targets)
    for error, scale in zip(errors, sd, strict=True):  # a row of pairs at a time, for memory
        spread = spread + _mean_absolute(error - errors, torch.hypot(scale, sd)).mean(0)
    return (_mean_absolute(errors, sd).mean(0) - spread / (2 * count)).mean()


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
    predictions, targets, sd = _check_regression(predictions, targets, sd)
    if not 0 < check_number("level", level) < 1:
        raise ArgumentError(f"level must be between 0 and 1, such as 0.9; got {level}")
    low, high = (1 - level) / 2, (1 + level) / 2
    if sd is None:
        not_above = (predictions <= targets).to(targets.dtype).mean(0)
        below = (predictions < targets).to(targets.dtype).mean(0)
        covered = (not_above >= low) & (below < high)
    else:
        share = torch.special.ndtr((targets - predictions) / sd).mean(0)
        covered = (share >= low) & (share <= high)
    return covered.to(targets.dtype).mean()


# ---------------------------------------------------------------- formulas and checks


def _log_mean(logs: Float[Tensor, "particle *rest"]) -> Float[Tensor, "*rest"]:
    """Log of the mean over particles."""
    return logs.logsumexp(0) - math.log(len(logs))


def _entropy(logs: Float[Tensor, "*rest class"]) -> Float[Tensor, "*rest"]:
    """Entropy from log probabilities, where 0 log 0 is 0."""
    return (logs.exp() * (-logs).clamp_max(torch.finfo(logs.dtype).max)).sum(-1)


def _mean_absolute(
    mean: Float[Tensor, "*shape"], sd: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Mean absolute value of normals."""
    ratio = mean / sd
    density = math.sqrt(2 / math.pi) * (-0.5 * ratio.square()).exp()
    return sd * density + mean * torch.erf(ratio * math.sqrt(0.5))


def _check_floats(name: str, value: Tensor, axes: tuple[str, ...], *, log: bool = False) -> Tensor:
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


def _check_log_probs(log_probs: Tensor) -> Tensor:
    """Log probabilities of classes must be normalised."""
    axes = ("particle", "point", "class")
    checked = _check_floats("log_probs", log_probs, axes, log=True)
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


def _check_several(log_probs: Tensor) -> Tensor:
    """Log probabilities of at least two particles."""
    log_probs = _check_log_probs(log_probs)
    if len(log_probs) < 2:
        raise ArgumentError("log_probs must be of at least 2 particles to compare them, got 1")
    return log_probs


def _check_classes(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities, and labels that fit them."""
    log_probs = _check_log_probs(log_probs)
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


def _check_regression(
    predictions: Tensor, targets: Tensor, sd: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Predictions, targets and standard deviations that fit each other, in one type."""
    axes = ("particle", "point")
    predictions = _check_floats("predictions", predictions, axes)
    targets = _check_floats("targets", targets, axes[1:])
    if len(targets) != predictions.shape[1]:
        raise ArgumentError(
            f"targets must have one value for each of the {predictions.shape[1]} points of "
            f"predictions, got {describe(targets)}"
        )
    if sd is not None:
        sd = _check_floats("sd", sd, axes)
        if sd.shape != predictions.shape or not (sd > 0).all():
            raise ArgumentError(
                f"sd must have the shape of predictions, {tuple(predictions.shape)} (use .expand), "
                f"and values above 0; got {describe(sd)} with minimum {sd.min().item():.4g}"
            )
        sd = sd.to(predictions)
    return predictions, targets.to(predictions), sd
