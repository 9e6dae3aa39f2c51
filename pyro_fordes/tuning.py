"""Choosing the arguments of an inference on validation data, by successive halving."""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
from pyro.optim import PyroOptim
from tqdm.auto import tqdm

from pyro_fordes._checks import (
    ArgumentError,
    NumericalError,
    check_part,
    check_positive_int,
)
from pyro_fordes._random import global_state, set_global_state
from pyro_fordes.estimates import is_detection
from pyro_fordes.evaluation import evaluate, named_loaders
from pyro_fordes.point_scores import top_k_of
from pyro_fordes.prototype import module_of
from pyro_fordes.tables import Table

Candidate = dict[str, Any]
"""Arguments of the user's function, by name."""
Metric = str | Callable[[Any], float]
"""A metric of `evaluate`, or a function of the inference, of which less is better."""

_LESS = ("nll", "brier", "ece", "ece_adaptive", "rmse", "crps")
"""Metrics of which less is better; of accuracies more is."""


class Rung(NamedTuple):
    """How many candidates are trained up to how many epochs."""

    candidates: int
    epochs: int


def rungs(
    candidates: int, epochs: int, minimum_epochs: int | None = None, reduction: int = 3
) -> tuple[Rung, ...]:
    r"""The rungs of successive halving.

    Rung :math:`k` has :math:`\max(1, \lfloor n / \eta^k \rfloor)` of the :math:`n` candidates and
    :math:`r \eta^k` epochs, with the reduction :math:`\eta`. The first rung that has one candidate,
    or as many epochs as there are, is the last, and has all epochs.

    Args:
        candidates: :math:`n`.
        epochs: epochs of the last rung.
        minimum_epochs: :math:`r`, epochs of the first rung. None for
            :math:`\lceil \text{epochs} / \eta^K \rceil` with the largest :math:`\eta^K \le n`: as
            late a choice as there is with these rungs.
        reduction: :math:`\eta`.

    Example:
        >>> rungs(9, 27)
        (Rung(candidates=9, epochs=3), Rung(candidates=3, epochs=9), Rung(candidates=1, epochs=27))
        >>> rungs(6, 60), rungs(6, 60, minimum_epochs=1)[1:]
        ((Rung(candidates=6, epochs=20), Rung(candidates=2, epochs=60)),
         (Rung(candidates=2, epochs=3), Rung(candidates=1, epochs=60)))
    """
    if minimum_epochs is None:
        factor = 1
        while factor * reduction <= candidates:
            factor *= reduction
        minimum_epochs = -(-epochs // factor)
    found = []
    count, reached = candidates, minimum_epochs
    while count > 1 and reached < epochs:
        found.append(Rung(count, reached))
        count, reached = max(1, count // reduction), reached * reduction
    return (*found, Rung(count, epochs))


def tune(
    make: Callable[..., Any],
    candidates: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
    train: Iterable[Any],
    validation: Any = None,
    *,
    epochs: int,
    minimum_epochs: int | None = None,
    reduction: int = 3,
    metric: Metric = "nll",
    site: str | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    progress_bar: bool = True,
) -> "Tuning":
    """Choose repulsion scale, alpha or any other arguments on validation data.

    Successive halving: all candidates are trained for a few epochs, the best third goes on from
    where it is to three times as many, and so on, until those that are left have all ``epochs``.
    See `rungs` for the numbers: 9 candidates and 27 epochs cost 63 epochs instead of 243.

    All candidates start alike: from the same random state, the same order of batches and an empty
    parameter store. Results do not depend on their order (of two with equal scores, that whose
    arguments come first in the alphabet is kept), and Pyro's parameter store, the global random
    state and the loaders' generators are left as they were, but for the parameters of the model
    that is returned. ``pyro.set_rng_seed(seed)`` before ``make(**best)``, and again before ``fit``,
    trains the same inference, if the loader has no generator of its own.

    A learning-rate schedule goes on from rung to rung, one step per epoch, as in a single `fit`.
    One that falls until a last epoch must know the ``epochs`` of the last rung, and is at its
    beginning when candidates are compared first. A candidate that needs small steps looks bad
    early, and so does strong repulsion, which slows the fit down and pays late: give the first rung
    enough epochs for a model that has nearly fitted.

    Models of all candidates are made at once, which are small beside particles. Particles and
    the optimiser's state are kept for those that may go on only: at most one more than a
    ``reduction``-th of the candidates at any time, all in memory, on their device.

    Args:
        make: your function: called with a candidate's arguments, returns a new `ParticleInference`
            with a model and an optimiser of its own.
        candidates: a list of dicts of arguments, or a dict of lists, of which all combinations are
            tried. Values are numbers, texts, None, or tuples of these.
        train: batches, as `ParticleInference.fit` takes them.
        validation: batches that are not trained on, or several loaders by name, as `evaluate` takes
            them; the score is then the mean over them. Not used by a metric that is a function.
        epochs: of the last rung.
        minimum_epochs: of the first rung; None for as many as the rungs leave.
        reduction: one in how many goes on, and how many times as many epochs it gets.
        metric: name of a metric of `evaluate`, or a function of the inference that returns a
            number, of which less is better.
        site: the observed site that is scored; None for the only one.
        chunk_size: how many particles are scored at a time; None for all.
        seed: what all candidates start from.
        progress_bar: whether to show one.

    Returns:
        A `Tuning`: print it, or read ``best``, ``inference`` and ``table``. A candidate with a
        `NumericalError` (or a score that is not finite) has the worst score there is, and its
        error is in the table.

    Raises:
        ArgumentError: if an argument does not fit, before anything is trained; or if metric and
            site do not fit the model, at the first score.
        NumericalError: if no candidate is left.

    References:
        Jamieson & Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter
        Optimization, AISTATS 2016 (successive halving); Li, Jamieson, DeSalvo, Rostamizadeh &
        Talwalkar, Hyperband, JMLR 18, 2018 (with a number of epochs that is multiplied).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_fordes import RBF, ParticleInference, Weights, tune
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> def make(lr):
        ...     optim = pyro.optim.Adam({"lr": lr})
        ...     return ParticleInference(model, optim, 5, kernel=RBF(Weights()))
        >>> y = torch.tensor([4.0, 5.0, 6.0])
        >>> found = tune(make, {"lr": [1e-4, 1e-3, 0.1]}, [y], [y], epochs=60, progress_bar=False)
        >>> found.best, len(found.table)  # three after 20 epochs, one after 60
        ({'lr': 0.1}, 4)
    """
    listed = _candidates(candidates)
    _check_signature(make, listed)
    for name, value in (("epochs", epochs), ("reduction", reduction)):
        check_positive_int(name, value)
    if reduction < 2:
        raise ArgumentError("reduction must be at least 2, or nobody would be left out; got 1")
    if minimum_epochs is not None and check_positive_int("minimum_epochs", minimum_epochs) > epochs:
        raise ArgumentError(f"minimum_epochs={minimum_epochs} is more than epochs={epochs}")
    # `pyro.set_rng_seed` seeds numpy, too, which takes no negative ones.
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ArgumentError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}")
    larger = _is_larger_better(metric)
    _check_loader("train", train)
    named = {} if callable(metric) else _validation(metric, validation)
    plan = rungs(len(listed), epochs, minimum_epochs, reduction)

    def score(inference: Any) -> float:
        if callable(metric):
            return _number(metric, metric(inference))
        table = evaluate(inference, named, [metric], site=site, chunk_size=chunk_size,
                         resamples=1, progress_bar=False).table  # fmt: skip
        values = [
            table.select(data=name, severity=severity)["value"][0] for name, severity in named
        ]
        return sum(values) / len(values)

    loaders = [train, *named.values()]
    with _kept_random(loaders):
        pyro.set_rng_seed(seed)
        search = _Search([global_state(loader) for loader in loaders], loaders, score, larger)
        runs = [search.start(make, candidate) for candidate in listed]
        _check_separate(runs)
        shown = progress_bar and runs[0].inference._gather.leads
        before = (0, *(rung.epochs for rung in plan[:-1]))
        total = sum(r.candidates * (r.epochs - done) for r, done in zip(plan, before, strict=True))
        with tqdm(total=total, disable=not shown, unit="epoch") as bar:
            for number, rung in enumerate(plan):
                bar.set_description(f"rung {number + 1}/{len(plan)}")
                keep = plan[number + 1].candidates if number + 1 < len(plan) else 1
                runs = search.climb(runs, number, rung.epochs, keep, bar)
    best = runs[0]
    pyro.get_param_store().set_state(best.store)
    columns = {name: [row[name] for row in search.rows] for name in search.rows[0]}
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "score")
    return Tuning(best.candidate, best.inference, Table(columns), name, larger)


@dataclass(frozen=True)
class Tuning:
    """What `tune` has found.

    Attributes:
        best: the best candidate of the last rung.
        inference: its `ParticleInference`, trained.
        table: a row for each score: ``candidate`` (its arguments), ``rung`` (from 0), ``epochs``,
            ``score``, and ``error``, the message of a candidate that failed or None.
        metric: name of the metric.
        larger_is_better: whether the best score is the largest.

    Example:
        >>> columns = {"candidate": [{"lr": 0.1}, {"lr": 9.0}, {"lr": 0.1}], "rung": [0, 0, 1]}
        >>> columns |= {"epochs": [1, 1, 3], "score": [0.5, math.inf, 0.25]}
        >>> columns["error"] = [None, "particle 0 is NaN", None]
        >>> print(Tuning({"lr": 0.1}, None, Table(columns), "nll"))
        nll on validation data after 1, 3 epochs; best: lr=0.1
        <BLANKLINE>
                         1         3
        lr=0.1      0.5000    0.2500
        lr=9.0      failed
        <BLANKLINE>
        lr=9.0: particle 0 is NaN
    """

    best: Candidate
    inference: Any
    table: Table
    metric: str
    larger_is_better: bool = False

    def __str__(self) -> str:
        """A row per candidate, a column per rung, the best ones first; and what failed."""
        epochs = list(dict.fromkeys(self.table["epochs"]))
        rows: dict[str, dict[int, float]] = {}
        errors = []
        for row in self.table.rows():
            name = _text(row["candidate"])
            rows.setdefault(name, {})[row["epochs"]] = row["score"]
            if row["error"] is not None:
                errors.append(f"{name}: {row['error']}")
        sign = -1 if self.larger_is_better else 1

        def place(name: str) -> tuple[int, float]:
            last = max(rows[name])
            return -last, sign * rows[name][last]

        width = max(map(len, rows))
        texts = {name: [_cell(rows[name].get(count)) for count in epochs] for name in rows}
        wide = 1 + max(9, *(len(cell) for cells in texts.values() for cell in cells))
        lines = [
            f"{self.metric} on validation data after {', '.join(map(str, epochs))} epochs; "
            f"best: {_text(self.best)}",
            "",
            " " * width + "".join(f"{count:{wide}}" for count in epochs),
        ]
        for name in sorted(rows, key=place):
            cells = "".join(f"{cell:>{wide}}" for cell in texts[name])
            lines.append(f"{name:{width}}{cells}".rstrip())
        return "\n".join([*lines, *([""] if errors else []), *errors])


# ---------------------------------------------------------------- the search


@dataclass(eq=False)
class _Run:
    """A candidate that is under way.

    Attributes:
        candidate: its arguments.
        inference: what `make` made of them.
        store: Pyro's parameter store, with the model's own parameters.
        random: global random state and the train loader's, where its training stopped.
        epochs: how many it has.
        rank: its last score, less is better, and its arguments, for ties.
    """

    candidate: Candidate
    inference: Any
    store: Any
    random: dict[str, Any]
    epochs: int = 0
    rank: tuple[float, str] = (math.inf, "")


@dataclass
class _Search:
    """Trains and scores candidates one after the other, each in a world of its own.

    Attributes:
        fresh: random states that all start from, the global one's and that of each loader.
        loaders: that of the training data, and those of the validation data.
        score: gives an inference's score.
        larger: whether larger scores are better.
        rows: of the table.
    """

    fresh: list[dict[str, Any]]
    loaders: list[Any]
    score: Callable[[Any], float]
    larger: bool
    rows: list[dict[str, Any]] = field(default_factory=list)

    def start(self, make: Callable[..., Any], candidate: Candidate) -> _Run:
        """Make an inference that has not been trained."""
        self._refresh()
        with pyro.get_param_store().scope() as store:
            inference = make(**candidate)
        for method in ("fit", "get_unconstrained"):
            name = f"what make returned for {_text(candidate)}"
            check_part(name, inference, method, "a ParticleInference")
        return _Run(candidate, inference, store, self.fresh[0])

    def climb(self, runs: list[_Run], number: int, epochs: int, keep: int, bar: Any) -> list[_Run]:
        """Train all to a rung and score them; returns the best ones, in their order.

        The list is emptied, so that nothing else holds the particles of those that are left out.

        Raises:
            NumericalError: if all failed.
        """
        alive: list[_Run] = []
        runs.reverse()
        while runs:
            run = runs.pop()
            bar.set_postfix_str(_text(run.candidate))
            more = epochs - run.epochs
            error = self._advance(run, more, epochs)
            bar.update(more)
            value = run.rank[0] if error is None else math.inf
            self.rows.append(
                {
                    "candidate": run.candidate,
                    "rung": number,
                    "epochs": epochs,
                    "score": -value if self.larger else value,
                    "error": error,
                }
            )
            if error is None:
                alive.append(run)
            if len(alive) > keep:
                alive.remove(max(alive, key=lambda one: one.rank))
        if not alive:
            failed = [row for row in self.rows if row["rung"] == number]
            raise NumericalError(
                f"all {len(failed)} candidates that were trained to {epochs} epochs failed; try "
                f"smaller learning rates or repulsion. "
                + "; ".join(f"{_text(row['candidate'])}: {row['error']}" for row in failed)
            )
        return alive

    def _advance(self, run: _Run, more: int, epochs: int) -> str | None:
        """Train a candidate on and score it; returns what failed."""
        train = self.loaders[0]
        try:
            with pyro.get_param_store().scope(run.store):
                set_global_state(run.random, train)
                run.inference.fit(train, more, progress_bar=False)
                run.random = global_state(train)
                self._refresh()
                score = self.score(run.inference)
        except NumericalError as error:
            return str(error)
        if not math.isfinite(score):
            return f"its score is {score}"
        run.epochs = epochs
        run.rank = (-score if self.larger else score, _order(run.candidate))
        return None

    def _refresh(self) -> None:
        """The random state that all start from, the loaders' included."""
        for state, loader in zip(self.fresh, self.loaders, strict=True):
            set_global_state(state, loader)


@contextmanager
def _kept_random(loaders: Sequence[Any]) -> Iterator[None]:
    """Leave the global random state and the loaders' generators as they were."""
    states = [global_state(loader) for loader in loaders]
    try:
        yield
    finally:
        for state, loader in zip(states, loaders, strict=True):
            set_global_state(state, loader)


# ---------------------------------------------------------------- arguments


def _candidates(given: Any) -> list[Candidate]:
    """All candidates, checked."""
    if isinstance(given, Mapping):
        for name, values in given.items():
            if isinstance(values, str) or not isinstance(values, Sequence) or not values:
                raise ArgumentError(
                    f"a dict of candidates must have a list of values for each argument, got "
                    f"{name!r}: {values!r}"
                )
        combinations = itertools.product(*given.values()) if given else ()
        listed = [dict(zip(given, values, strict=True)) for values in combinations]
    elif isinstance(given, Sequence) and all(isinstance(one, Mapping) for one in given):
        listed = [dict(one) for one in given]
    else:
        raise ArgumentError(
            f"candidates must be a list of dicts, such as [{{'alpha': 0.2}}, {{'alpha': 0.4}}], or "
            f"a dict of lists, such as {{'alpha': [0.2, 0.4]}}; got {given!r}"
        )
    if not listed:
        raise ArgumentError("candidates is empty; give at least one, such as {'alpha': [0.2, 0.4]}")
    for place, candidate in enumerate(listed):
        for name, value in candidate.items():
            if not isinstance(name, str):
                raise ArgumentError(f"arguments of candidates are named by texts, got {name!r}")
            if not _is_plain(value):
                raise ArgumentError(
                    f"the candidate's argument {name!r} is {value!r}, of type "
                    f"{type(value).__name__}; values must be numbers, texts, None or tuples of "
                    f"these, so that candidates can be compared and printed. Give a name, and let "
                    f"make look up what it stands for"
                )
        if candidate in listed[:place]:
            raise ArgumentError(f"the candidate {_text(candidate)} is there twice")
    return listed


def _is_plain(value: Any) -> bool:
    """Whether a value can be compared, printed and written to a file."""
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or (isinstance(value, bool | int | float | str) and value == value)


def _check_signature(make: Any, candidates: Sequence[Candidate]) -> None:
    """Refuse candidates that `make` cannot be called with."""
    if not callable(make):
        raise ArgumentError(
            f"make must be a function that returns a ParticleInference, got {type(make).__name__}"
        )
    try:
        signature = inspect.signature(make)
    except ValueError:  # of some functions that are written in C
        return
    for candidate in candidates:
        try:
            signature.bind(**candidate)
        except TypeError as error:
            raise ArgumentError(
                f"make{signature} cannot be called with the candidate {_text(candidate)}: {error}"
            ) from error


def _check_loader(name: str, loader: Any) -> None:
    """Refuse a loader that cannot be iterated again and again, or is empty."""
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        raise ArgumentError(
            f"{name} must be a list of batches or a DataLoader, which can be iterated again; got "
            f"{type(loader).__name__}"
        )
    with _kept_random([loader]):
        empty = len(loader) == 0 if isinstance(loader, Sized) else not any(True for _ in loader)
    if empty:
        raise ArgumentError(
            f"the loader {name} gave no batch; is the data set empty, or drop_last=True with fewer "
            f"points than a batch?"
        )


def _validation(metric: str, validation: Any) -> dict[tuple[str, int], Iterable[Any]]:
    """Validation loaders by name and severity, checked."""
    if validation is None:
        raise ArgumentError(
            f"the metric {metric!r} needs validation data; only a metric that is a function of the "
            f"inference does without"
        )
    if not isinstance(validation, Mapping):
        _check_loader("validation", validation)
    named = named_loaders(validation)
    for (name, severity), loader in named.items():
        _check_loader(f"{name} {severity}" if severity else name, loader)
    return named


def _is_larger_better(metric: Any) -> bool:
    """Whether larger scores are better."""
    if callable(metric):
        return False
    if not isinstance(metric, str):
        raise ArgumentError(
            f"metric must be the name of one, such as 'nll', or a function of the inference; got "
            f"{metric!r}"
        )
    if metric == "accuracy" or top_k_of(metric) is not None:
        return True
    if metric not in _LESS:
        reason = (
            "compares two data sets, and would choose by the data that are to be surprising"
            if is_detection(metric)
            else "has no better and worse, or is none"
        )
        raise ArgumentError(
            f"the metric {metric!r} {reason}; choose one of {[*_LESS, 'accuracy', 'top-5']}, or "
            f"give a function of the inference"
        )
    return False


def _number(metric: Any, value: Any) -> float:
    """What a user's metric gave, as a number."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"the metric {getattr(metric, '__name__', metric)} must return a number, got {value!r}"
        ) from error


def _check_separate(runs: Sequence[_Run]) -> None:
    """Refuse inferences that would train each other's parameters."""
    seen: dict[int, str] = {}
    for run in runs:
        inference, parts = run.inference, [(run.inference, "the inference")]
        if isinstance(inference.optim, PyroOptim):
            parts.append((inference.optim, "the optimiser"))
        module = module_of(inference.model)
        for name, parameter in [] if module is None else module.named_parameters():
            if parameter.requires_grad:
                parts.append((parameter, f"the parameter {name!r}"))
        for part, name in parts:
            if id(part) in seen:
                raise ArgumentError(
                    f"make returned {name} of the candidate {seen[id(part)]} once more for "
                    f"{_text(run.candidate)}, and one would train the other; build model, "
                    f"optimiser and ParticleInference inside make"
                )
        seen |= {id(part): _text(run.candidate) for part, _ in parts}


# ---------------------------------------------------------------- texts


def _text(candidate: Mapping[str, Any]) -> str:
    """A candidate in a line."""
    parts = [f"{name}={value!r}" for name, value in candidate.items()]
    return ", ".join(parts) or "no arguments"


def _order(candidate: Mapping[str, Any]) -> str:
    """A text that tells candidates apart, whatever the order of their arguments."""
    return repr(sorted(candidate.items()))


def _cell(score: float | None) -> str:
    """A score in a table."""
    if score is None:
        return ""
    return f"{score:.4f}" if math.isfinite(score) else "failed"
