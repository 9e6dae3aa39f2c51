"""Which numbers follow from the scores of evaluated points, and what they are on resamples."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import check_positive_int
from pyro_fordes.metrics.classification import bin_index
from pyro_fordes.resampling import (
    Counts,
    Interval,
    Ranking,
    resample,
    weighted_means,
)

BINS = 15
"""Bins of a calibration error."""
DETECTIONS = ("auroc", "aupr", "fpr95")
_SHARES = ("accuracy", "ece", "ece_adaptive", "disagreement", "coverage")
_NEVER_NEGATIVE = ("brier", "entropy", "mutual_information", "rmse", "crps")
CORRUPTED = "corrupted"
"""Name of the mean over corruptions."""


class Row(NamedTuple):
    """What one number is about."""

    data: str
    severity: int | None
    metric: str


def is_detection(metric: str) -> bool:
    """Whether a metric compares data outside the distribution with those inside.

    Example:
        >>> is_detection("auroc:entropy"), is_detection("entropy")
        (True, False)
    """
    return metric.partition(":")[0] in DETECTIONS


class Plan:
    """Which numbers some evaluations have, in which order.

    Args:
        evaluations: `Evaluation` objects of the same data sets and metrics.

    Attributes:
        rows: what each number is about.
    """

    def __init__(self, evaluations: Sequence[Any]) -> None:
        first = evaluations[0]
        self._first = first
        self._points = _point_names(evaluations)
        self._largest = max(
            len(next(iter(found.values())))
            for one in evaluations
            for found in (*one.scores.values(), *one.outside.values())
        )
        means = [metric for metric in first.metrics if not is_detection(metric)]
        detections = [metric for metric in first.metrics if is_detection(metric)]
        self._single = [
            Row(name, severity, metric) for name, severity in first.scores for metric in means
        ]
        self._averages = {
            Row(name, severity, metric): [Row(one, level, metric) for one, level in keys]
            for (name, severity), keys in _averaged(first.scores).items()
            for metric in means
        }
        self._beyond = [Row(name, None, metric) for name in first.outside for metric in detections]
        self.rows = [*self._single, *self._averages, *self._beyond]

    def columns(self) -> dict[str, list]:
        """What each row is about, and how many points it is of."""
        data, severity, metric = map(list, zip(*self.rows, strict=True))
        points = [self._points_of(row) for row in self.rows]
        return {"data": data, "severity": severity, "metric": metric, "points": points}

    def within(self, ends: Interval) -> Interval:
        """Intervals cut to what the metrics can be: a shift may carry an end beyond it."""
        shares = [_is_share(row.metric) for row in self.rows]
        counted = [share or row.metric in _NEVER_NEGATIVE for share, row in
                   zip(shares, self.rows, strict=True)]  # fmt: skip
        least = torch.tensor([0.0 if one else -torch.inf for one in counted], dtype=torch.float64)
        most = torch.tensor([1.0 if share else torch.inf for share in shares], dtype=torch.float64)
        return Interval(ends.low.clamp(least, most), ends.high.clamp(least, most))

    def per_run(self, evaluations: Sequence[Any]) -> Float[Tensor, "run row"]:
        """The numbers of all points, run by run."""
        return torch.cat([self._estimate(one, Counts(0)) for one in evaluations])

    def resampled(
        self, runs: Mapping[str, Sequence[Any]], resamples: int, seed: int
    ) -> dict[str, Float[Tensor, "resample row"]]:
        """The numbers of the same resampled points for every method, mean over its runs."""
        check_positive_int("resamples", resamples)

        def estimate(counts: Counts) -> Tensor:
            found = [
                torch.stack([self._estimate(one, counts) for one in evaluations]).mean(0)
                for evaluations in runs.values()
            ]
            return torch.cat(found, dim=1)

        every = resample(estimate, resamples, seed, self._largest)
        return dict(zip(runs, every.split(len(self.rows), dim=1), strict=True))

    def _by_size(self, one: Any) -> dict[int, list[Row]]:
        """The rows of single sets, by how many points these have in an evaluation."""
        found: dict[int, list[Row]] = {}
        for row in self._single:
            size = len(one.scores[row.data, row.severity]["observed"])
            found.setdefault(size, []).append(row)
        return found

    def _points_of(self, row: Row) -> int:
        """How many points a row is of."""
        if row in self._averages:
            row = self._averages[row][0]
        if row.severity is None:
            return len(self._first.outside[row.data]["entropy"])
        return len(self._first.scores[row.data, row.severity]["observed"])

    def _estimate(self, one: Any, counts: Counts) -> Float[Tensor, "resample row"]:
        """The numbers of an evaluation, for each resample."""
        points = self._points[id(one)]
        found = {}
        for size, rows in self._by_size(one).items():
            # One product for all rows: nearly all the time of a table is spent here.
            columns = [columns_of(row.metric, one.scores[row.data, row.severity]) for row in rows]
            means = weighted_means(torch.cat(columns, dim=1), counts(points, size))
            parts = means.split([part.shape[1] for part in columns], dim=1)
            for row, part in zip(rows, parts, strict=True):
                found[row] = from_means(row.metric, part)
        for row, members in self._averages.items():
            found[row] = torch.stack([found[member] for member in members]).mean(0)
        rankings: dict[tuple[str, str], Ranking] = {}
        for row in self._beyond:
            which, _, score = row.metric.partition(":")
            if (row.data, score) not in rankings:
                inside, outside = one.scores[one.inside][score], one.outside[row.data][score]
                rankings[row.data, score] = Ranking(
                    inside,
                    outside,
                    counts(points, len(inside)),
                    counts(f"{points}, outside: {row.data}", len(outside)),
                )
            found[row] = getattr(rankings[row.data, score], which)
        return torch.stack([found[row] for row in self.rows], dim=1)


def _averaged(
    keys: Iterable[tuple[str, int]],
) -> dict[tuple[str, int | None], list[tuple[str, int]]]:
    """Which corrupted sets are averaged: of a corruption, of a severity, and all."""
    corrupted = [key for key in keys if key[1] > 0]
    names = dict.fromkeys(name for name, _ in corrupted)
    severities = sorted({severity for _, severity in corrupted})
    found: dict[tuple[str, int | None], list[tuple[str, int]]] = {}
    for name in names:
        found[name, None] = [key for key in corrupted if key[0] == name]
    for severity in severities:
        found[CORRUPTED, severity] = [key for key in corrupted if key[1] == severity]
    if corrupted:
        found[CORRUPTED, None] = corrupted
    return found


def _is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1."""
    return is_detection(metric) or metric.startswith("top-") or metric in _SHARES


def columns_of(metric: str, scores: Mapping[str, Tensor]) -> Float[Tensor, "point column"]:
    """What a metric needs the means of: usually its score, of a calibration error one per bin.

    A resample is binned as all points are, also where bins hold equally many of them.
    """
    if metric in ("ece", "ece_adaptive"):
        bins = bin_index(scores["confidence"], BINS, metric == "ece_adaptive")
        gaps = scores["confidence"].double() - scores["accuracy"]
        return torch.nn.functional.one_hot(bins) * gaps.unsqueeze(1)
    return scores["squared_error" if metric == "rmse" else metric].double().unsqueeze(1)


def from_means(metric: str, means: Float[Tensor, "resample column"]) -> Float[Tensor, " resample"]:
    """A metric from the means of its columns."""
    if metric in ("ece", "ece_adaptive"):
        return means.abs().sum(1)
    return means.squeeze(1).sqrt() if metric == "rmse" else means.squeeze(1)


def _point_names(evaluations: Sequence[Any]) -> dict[int, str]:
    """A name for each evaluation's points, the same where the observations are the same."""
    found: dict[int, str] = {}
    distinct: list[Tensor] = []
    for one in evaluations:
        observed = one.scores[one.inside]["observed"]
        place = next((i for i, other in enumerate(distinct) if torch.equal(observed, other)), None)
        if place is None:
            place = len(distinct)
            distinct.append(observed)
        found[id(one)] = f"points {place}"
    return found
