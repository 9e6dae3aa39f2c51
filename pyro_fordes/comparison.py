"""Comparing methods on the same points: differences with intervals of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import ArgumentError, check_level, check_seed
from pyro_fordes.estimates import Plan
from pyro_fordes.evaluation import Evaluation
from pyro_fordes.resampling import Interval, interval
from pyro_fordes.tables import Table


def compare(
    methods: Mapping[str, Evaluation | Sequence[Evaluation]],
    *,
    baseline: str | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Table:
    """A table of several methods' evaluations, and of their differences to one of them.

    All methods are scored on the same resampled points, so that the interval of a difference is
    that of a paired comparison: much narrower than the intervals of the two values suggest. All
    corruptions of an image are resampled together, too. Intervals tell what other test points of
    the same kind would change, not what other trainings would: give several runs per method (with
    other seeds) for that, whose mean is shown, and look at ``run_error`` and
    ``difference_run_error``, standard errors over runs. Runs are paired in their order.

    Args:
        methods: for each method an `Evaluation`, or a list of them, one per run. All must be of the
            same points in the same order; other runs may be of other points.
        baseline: the method that others are compared with; None for the first.
        level: of the intervals.
        resamples: number of bootstrap resamples.
        seed: seed of the resamples.

    Returns:
        A `Table`: print it, or read its columns.

    Raises:
        ArgumentError: if evaluations are of different data, points or metrics, or the level is not
            between 0 and 1.

    Example:
        >>> from pyro_fordes.evaluation import Evaluation
        >>> y = torch.zeros(3)
        >>> def evaluation(nll):
        ...     scores = {("clean", 0): {"nll": torch.tensor(nll), "observed": y}}
        ...     return Evaluation("density", scores, {}, ("clean", 0), ("nll",))
        >>> one, two = evaluation([1.0, 2.0, 3.0]), evaluation([1.5, 2.5, 3.5])
        >>> table = compare({"one": one, "two": two})
        >>> row = table.select(method="two").rows()[0]
        >>> round(row["difference"], 6), round(row["difference_low"], 6)  # paired: always a half
        (0.5, 0.5)
    """
    check_level(level)
    check_seed(seed)
    runs = _paired(methods)
    names = list(runs)
    baseline = names[0] if baseline is None else baseline
    if baseline not in runs:
        raise ArgumentError(f"baseline={baseline!r} is none of the methods {names}")
    plan = Plan([one for evaluations in runs.values() for one in evaluations])
    values = {name: plan.per_run(evaluations) for name, evaluations in runs.items()}
    resampled = plan.resampled(runs, resamples, seed)
    columns: dict[str, list] = {}
    for name in names:
        ends = plan.within(interval(values[name].mean(0), resampled[name], level))
        own = _summary("", values[name], ends)
        if name == baseline:
            against: dict[str, list] = {end: [None] * len(plan.rows) for end in _DIFFERENCE}
        else:
            paired = _minus(values[name], values[baseline])
            drawn = _minus(resampled[name], resampled[baseline])
            against = _summary("difference", paired, interval(paired.mean(0), drawn, level))
        part = {"method": [name] * len(plan.rows), **plan.columns(), **own, **against}
        for column, cells in part.items():
            columns.setdefault(column, []).extend(cells)
    return Table(columns, level, baseline, len(runs[baseline]))


_DIFFERENCE = ("difference", "difference_low", "difference_high", "difference_run_error")


def _summary(name: str, per_run: Float[Tensor, "run row"], ends: Interval) -> dict[str, list]:
    """Columns of the mean over runs, its interval and its standard error over runs."""
    value = per_run.mean(0)
    prefix = f"{name}_" if name else ""
    columns = {name or "value": value, f"{prefix}low": ends.low, f"{prefix}high": ends.high}
    errors: list = [None] * len(value)
    if len(per_run) > 1:
        errors = (per_run.std(0) / len(per_run) ** 0.5).tolist()
    return {**{name: cells.tolist() for name, cells in columns.items()},
            f"{prefix}run_error": errors}  # fmt: skip


def _minus(first: Tensor, second: Tensor) -> Tensor:
    """A difference that is 0 where both are equally infinite."""
    return torch.where(first == second, 0.0, first - second)


def _paired(methods: Any) -> dict[str, list[Evaluation]]:
    """Evaluations of each method by run, all of the same data."""
    if (
        not isinstance(methods, Mapping)
        or not methods
        or not all(isinstance(name, str) for name in methods)
    ):
        raise ArgumentError(
            "compare(...) needs evaluations by method: {'ensemble': evaluate(...), ...}"
        )
    runs: dict[str, list[Evaluation]] = {}
    for name, given in methods.items():
        runs[name] = list(given) if isinstance(given, list | tuple) else [given]
        wrong = [type(one).__name__ for one in runs[name] if not isinstance(one, Evaluation)]
        if wrong or not runs[name]:
            raise ArgumentError(
                f"the method {name!r} must have an Evaluation or a list of them, as evaluate(...) "
                f"gives them; got {wrong or 'an empty list'}"
            )
    first_name, first = next(iter(runs.items()))
    for name, evaluations in runs.items():
        if len(evaluations) != len(first):
            raise ArgumentError(
                f"{name!r} has {len(evaluations)} runs and {first_name!r} has {len(first)}; they "
                f"are compared pair by pair"
            )
        for run, (one, other) in enumerate(zip(evaluations, first, strict=True)):
            _check_same(f"run {run} of {name!r}", one, f"run {run} of {first_name!r}", other)
            _check_wanted(name, one, first[0])
    return runs


def _check_wanted(name: str, one: Evaluation, first: Evaluation) -> None:
    """Data sets and metrics must be the same in all evaluations."""
    for what in ("metrics", "inside", "kind"):
        if getattr(one, what) != getattr(first, what):
            raise ArgumentError(
                f"an evaluation of {name!r} has {what} {getattr(one, what)}, the first one has "
                f"{getattr(first, what)}; evaluate all in the same way"
            )
    for what in ("scores", "outside"):
        if list(getattr(one, what)) != list(getattr(first, what)):
            raise ArgumentError(
                f"an evaluation of {name!r} is of the data {list(getattr(one, what))}, the first "
                f"one of {list(getattr(first, what))}; evaluate all on the same data"
            )


def _check_same(name: str, one: Evaluation, other_name: str, other: Evaluation) -> None:
    """Points must be the same ones in the same order."""
    for key in one.scores.keys() & other.scores.keys():
        if not torch.equal(one.scores[key]["observed"], other.scores[key]["observed"]):
            raise ArgumentError(
                f"{name} and {other_name} are not of the same points of {key[0]!r} in the same "
                f"order, so they cannot be paired; use loaders that do not shuffle"
            )
    for data in one.outside.keys() & other.outside.keys():
        sizes = len(one.outside[data]["entropy"]), len(other.outside[data]["entropy"])
        if sizes[0] != sizes[1]:
            raise ArgumentError(f"{name} has {sizes[0]} points of {data!r}, {other_name} has "
                                f"{sizes[1]}")  # fmt: skip
