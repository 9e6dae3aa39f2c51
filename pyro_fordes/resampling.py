r"""Metrics of resampled points, many resamples at a time.

A bootstrap resample is described by how often each point is in it, its counts. What a metric is on
many resamples follows from the scores of the points and a matrix of counts, without computing any
score again.

Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_ENTRIES = 4_000_000
"""How many counts are held at a time."""


class Interval(NamedTuple):
    """Ends of a bootstrap interval."""

    low: Tensor
    high: Tensor


class Counts:
    """Counts of the same resamples for whoever asks with the same key.

    Args:
        resamples: how many resamples; 0 for one that has every point once.
        seed: seed of the draws.

    Example:
        >>> counts = Counts(3, seed=0)
        >>> counts("test", 4).sum(1)
        tensor([4., 4., 4.])
        >>> torch.equal(counts("test", 4), counts("test", 4))
        True
    """

    def __init__(self, resamples: int, seed: int = 0) -> None:
        self.resamples = resamples
        self.seed = seed
        self._drawn: dict[tuple[str, int], Tensor] = {}

    def __call__(self, key: str, points: int) -> Float[Tensor, "resample point"]:
        """The counts of a set of so many points."""
        if self.resamples == 0:
            return torch.ones(1, points)
        if (key, points) not in self._drawn:
            # A number of its own for every key, the same in every process.
            own = int.from_bytes(f"{key}:{points}".encode().rjust(8, b"\0")) % (2**31 - 1)
            generator = torch.Generator().manual_seed(self.seed + own)
            drawn = torch.randint(points, (self.resamples, points), generator=generator)
            counts = torch.zeros(self.resamples, points)
            counts.scatter_add_(1, drawn, torch.ones_like(counts))
            self._drawn[key, points] = counts
        return self._drawn[key, points]


def resample(
    estimate: Callable[[Counts], Float[Tensor, "resample metric"]],
    resamples: int,
    seed: int,
    points: int,
) -> Float[Tensor, "resample metric"]:
    """Metrics of many resamples, some at a time for memory.

    Args:
        estimate: gives the metrics from `Counts`.
        resamples: how many.
        seed: seed of the draws.
        points: of the largest set.
    """
    at_once = max(1, min(resamples, _ENTRIES // points))
    parts = []
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        parts.append(estimate(Counts(count, seed * 1_000_003 + start)))
    return torch.cat(parts)


def interval(
    value: Float[Tensor, " metric"],
    resampled: Float[Tensor, "resample metric"],
    level: float,
) -> Interval:
    """Percentile intervals, shifted so that the resamples' mean is the value.

    Resampling makes a calibration error larger; without the shift its interval could lie above the
    value. On means it does next to nothing.

    Args:
        value: of all points.
        resampled: of the resamples.
        level: such as 0.95.
    """
    shift = value - resampled.mean(0)
    shift = torch.where(shift.isfinite(), shift, 0.0)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=resampled.dtype)
    low, high = _quantiles(resampled, ends) + shift
    return Interval(low, high)


def _quantiles(
    values: Float[Tensor, "resample metric"], probabilities: Float[Tensor, " end"]
) -> Float[Tensor, "end metric"]:
    """Quantiles between order statistics that may be infinite."""
    ordered = values.sort(0).values
    place = probabilities * (len(ordered) - 1)
    below, above = ordered[place.floor().long()], ordered[place.ceil().long()]
    weight = (place - place.floor()).unsqueeze(1)
    return torch.where(below == above, below, below + weight * (above - below))


# ---------------------------------------------------------------- metrics


def weighted_means(
    values: Float[Tensor, "point column"], counts: Float[Tensor, "resample point"]
) -> Float[Tensor, "resample column"]:
    """Means of columns over each resample; infinite where it has a point with an infinite value.

    Example:
        >>> values, counts = torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        >>> weighted_means(values, counts)
        tensor([[1.0000],
                [2.5000]], dtype=torch.float64)
    """
    counts, values = counts.double(), values.double()
    endless = values.isposinf()
    means = counts @ values.masked_fill(endless, 0.0) / counts.sum(1, keepdim=True)
    columns = endless.any(0)
    if columns.any():
        drawn = counts @ endless[:, columns].double() > 0
        means[:, columns] = means[:, columns].masked_fill(drawn, torch.inf)
    return means


class Ranking:
    """What `metrics.detection` returns, for each resample.

    Args:
        inside: scores of points inside the distribution, ``(point,)``.
        outside: scores of points outside, ``(point,)``.
        inside_counts: ``(resample, point)``.
        outside_counts: ``(resample, point)``.

    Example:
        >>> inside, outside = torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.5, 0.9])
        >>> Ranking(inside, outside, torch.ones(1, 3), torch.ones(1, 2)).auroc
        tensor([0.8333], dtype=torch.float64)
    """

    def __init__(
        self,
        inside: Float[Tensor, " inside"],
        outside: Float[Tensor, " outside"],
        inside_counts: Float[Tensor, "resample inside"],
        outside_counts: Float[Tensor, "resample outside"],
    ) -> None:
        scores, order = torch.cat([inside.double(), outside.double()]).sort(descending=True)
        counts = torch.cat([inside_counts, outside_counts], 1)[:, order]
        # Flagged at each threshold; in single precision, which counts exactly up to 2^24.
        self._false = (counts * (order < len(inside))).cumsum(1)
        self._true = counts.cumsum(1) - self._false
        # A threshold flags all points of the same score at once.
        last = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
        if not last.all():
            self._false, self._true = self._false[:, last], self._true[:, last]

    @property
    def auroc(self) -> Float[Tensor, " resample"]:
        """Area under the receiver operating characteristic, by trapezoids."""
        total = self._true[:, -1].double() * self._false[:, -1]
        width = torch.diff(self._false, dim=1, prepend=self._false.new_zeros(len(total), 1))
        height = torch.diff(self._true, dim=1, prepend=self._true.new_zeros(len(total), 1))
        middle = self._true.sub(height, alpha=0.5)
        return middle.mul_(width).sum(1, dtype=torch.float64) / total

    @property
    def aupr(self) -> Float[Tensor, " resample"]:
        """Average precision."""
        true = self._true.double()
        steps = torch.diff(true, dim=1, prepend=true.new_zeros(len(true), 1))
        precision = true / (true + self._false).clamp_min_(1.0)
        return steps.mul_(precision).sum(1) / true[:, -1]

    @property
    def fpr95(self) -> Float[Tensor, " resample"]:
        """Share of inside points flagged where at least 95 % of those outside are."""
        true = self._true.double()
        first = (true / true[:, -1:] >= 0.95).byte().argmax(1, keepdim=True)
        false = self._false.gather(1, first).double()
        return false.squeeze(1) / self._false[:, -1]
