"""Evaluating particles on clean, corrupted and out-of-distribution data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from pyro_fordes._checks import (
    ArgumentError,
    CheckpointError,
    check_level,
    check_positive_int,
    check_seed,
)
from pyro_fordes._random import preserved_rng
from pyro_fordes.checkpoint import read, write
from pyro_fordes.estimates import BINS, CORRUPTED, DETECTIONS, Plan, is_detection
from pyro_fordes.metrics.classification import Reliability, reliability_of
from pyro_fordes.point_scores import (
    SCORES,
    PointFunction,
    PointScores,
    Site,
    find_site,
    top_k_of,
)
from pyro_fordes.resampling import interval
from pyro_fordes.tables import Table

Key = tuple[str, int]
"""A data set: its name and severity, 0 for data as they are."""

_MEANS = {
    "classes": ("nll", "brier", "accuracy", "entropy", "mutual_information", "disagreement"),
    "normal": ("nll", "crps", "coverage"),
    "density": ("nll",),
}
_DERIVED = {"classes": ("ece", "ece_adaptive"), "normal": ("rmse",), "density": ()}
_DEFAULT = {
    "classes": ("nll", "accuracy", "brier", "ece"),
    "normal": ("nll", "rmse", "crps", "coverage"),
    "density": ("nll",),
}
_RESERVED = {
    *(name for names in (*_MEANS.values(), *_DERIVED.values()) for name in names),
    *SCORES,
    *DETECTIONS,
    "observed",
    "confidence",
    "squared_error",
}
"""Names that functions among the metrics cannot have."""
_DEFAULT_DETECTIONS = (*(f"auroc:{score}" for score in SCORES), "fpr95:entropy")


def evaluate(
    inference: Any,
    loaders: Mapping[str | Key, Iterable[Any]] | Iterable[Any],
    metrics: Sequence[str | PointFunction] | None = None,
    *,
    outside: Mapping[str, Iterable[Any]] | None = None,
    inside: str | None = None,
    site: str | None = None,
    chunk_size: int | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    progress_bar: bool = True,
) -> "Evaluation":
    """Score an inference's predictions on several data sets, with bootstrap intervals.

    Data stream through `ParticlePredictive` batch by batch; only scores per point are kept. Points
    are the elements of the observed site's batch shape; a site without one is a single point per
    batch. A Categorical, OneHotCategorical or Bernoulli site is scored by its class probabilities,
    a Normal site by its mixture of normals (element by element), any other by the log density of
    its observations. What is masked (``poutine.mask``, ``fn.mask``) does not count; an observation
    of several numbers counts by those that are not masked.

    Metrics, with their definitions in `pyro_fordes.metrics`:

    - classes: ``"nll"``, ``"brier"``, ``"accuracy"``, ``"top-5"`` (any number), ``"ece"``,
      ``"ece_adaptive"``, ``"entropy"``, ``"mutual_information"``, ``"disagreement"``;
    - classes, on data outside the distribution: ``"auroc"``, ``"aupr"``, ``"fpr95"``, each by a
      score: ``"auroc:entropy"`` (which ``"auroc"`` is short for), ``"auroc:mutual_information"``,
      ``"auroc:least_confidence"``;
    - normals: ``"nll"``, ``"rmse"``, ``"crps"``, ``"coverage"`` (of the 90 % interval);
    - other densities: ``"nll"``.

    A function among the metrics gets ``(log_probs, labels)``, ``(mean, observed, sd)`` or
    ``(log_densities,)``, tensors with particle axes where `pyro_fordes.metrics` has them, and gives
    a score per point; the metric is its mean, called by the function's name.

    Args:
        inference: a `ParticleInference` that has particles.
        loaders: batches as `ParticleInference.fit` takes them, observations included, by name; a
            corruption's by ``(name, severity)``, as `corruptions.loaders` gives them. One loader
            alone is called ``"data"``. Loaders must not shuffle if methods are to be compared.
        metrics: names and functions; None for some of each kind.
        outside: loaders of data outside the training distribution, whose observations are ignored
            or left out.
        inside: name of the data that those are told from; None for the first loader.
        site: the observed site that is scored; None for the only one.
        chunk_size: how many particles are run at a time; None for all.
        level: of the intervals.
        resamples: number of bootstrap resamples of the points.
        seed: seed of the resamples.
        progress_bar: whether to show one.

    Returns:
        An `Evaluation`: print it, or read its ``table``.

    Raises:
        ArgumentError: if an argument does not fit, before anything is scored; or if all points of
            a loader are masked.
        ModelError: if the model draws a minibatch, or masks other points for each particle.
        NumericalError: if a prediction is NaN.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_fordes import Ensemble, ParticleInference, evaluate
        >>> def model(x, y=None):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 5.0))
        ...     with pyro.plate("data", len(x)):
        ...         return pyro.sample("y", dist.Bernoulli(logits=slope * x), obs=y)
        >>> x = torch.linspace(-3.0, 3.0, 100)
        >>> y = (x > 0).float()
        >>> inference = ParticleInference(
        ...     model, pyro.optim.Adam({"lr": 0.1}), 5, transport=Ensemble(), seed=0
        ... )
        >>> losses = inference.run(50, x, y, progress_bar=False)
        >>> found = evaluate(inference, {"clean": [(x, y)]}, progress_bar=False)
        >>> found.table.select(metric="accuracy")["value"]
        [1.0]
    """
    named = named_loaders(loaders)
    outside = _checked_outside(outside)
    check_positive_int("resamples", resamples)
    check_level(level)
    check_seed(seed)
    with preserved_rng():
        first = next(iter(next(iter(named.values()))), None)
        if first is None:
            raise ArgumentError("a loader gave no batch; is the data set empty?")
        target = find_site(inference, site, first, chunk_size)
        chosen, functions = _chosen(target, metrics, bool(outside), inference.num_particles)
        reference = _reference(inside, named)
        top_k = [k for metric in chosen if (k := top_k_of(metric)) is not None]
        scores = PointScores(inference, target, chunk_size, functions, top_k)
        with _Progress([*named.values(), *outside.values()], progress_bar) as progress:
            found = {key: scores.inside(progress(key, loader)) for key, loader in named.items()}
            beyond = {
                name: scores.outside(progress((name, 0), loader))
                for name, loader in outside.items()
            }
    return Evaluation(target.kind, found, beyond, reference, chosen, level, resamples, seed)


class _Progress:
    """One bar for the batches of several loaders, with the name of the one that is read."""

    def __init__(self, loaders: Sequence[Iterable[Any]], shown: bool) -> None:
        lengths = [len(loader) if isinstance(loader, Sized) else None for loader in loaders]
        total = None if None in lengths else sum(length or 0 for length in lengths)
        self._bar = tqdm(total=total, disable=not shown, unit="batch")

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def __call__(self, key: Key, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches."""
        name, severity = key
        self._bar.set_description(f"{name} {severity}" if severity else name)
        for batch in loader:
            yield batch
            self._bar.update()


@dataclass(frozen=True)
class Evaluation:
    """Scores of every point of some data sets, and the table that follows from them.

    Attributes:
        kind: ``"classes"``, ``"normal"`` or ``"density"``.
        scores: ``{(data, severity): {score: (point,)}}``; ``"observed"`` is what was observed,
            with the event axes of a density.
        outside: ``{data: {score: (point,)}}`` of data outside the distribution.
        inside: the data set that those are told from.
        metrics: names of the metrics in the table.
        level: of the intervals.
        resamples: number of bootstrap resamples.
        seed: of the resamples.

    Example:
        >>> scores = {"nll": torch.tensor([1.0, 2.0]), "observed": torch.tensor([0.0, 0.0])}
        >>> found = Evaluation("density", {("clean", 0): scores}, {}, ("clean", 0), ("nll",))
        >>> found.table["value"]
        [1.5]
    """

    kind: str
    scores: Mapping[Key, Mapping[str, Tensor]]
    outside: Mapping[str, Mapping[str, Tensor]]
    inside: Key
    metrics: tuple[str, ...]
    level: float = 0.95
    resamples: int = 1000
    seed: int = 0

    @cached_property
    def table(self) -> Table:
        """Values and intervals: a tidy table of columns."""
        plan = Plan([self])
        values = plan.per_run([self])[0]
        resampled = plan.resampled({"": [self]}, self.resamples, self.seed)[""]
        low, high = plan.within(interval(values, resampled, self.level))
        numbers = {"value": values.tolist(), "low": low.tolist(), "high": high.tolist()}
        return Table({**plan.columns(), **numbers}, self.level)

    def to_frame(self) -> Any:
        """The table as a ``pandas.DataFrame``."""
        return self.table.to_frame()

    def reliability(
        self, data: str = "", severity: int = 0, *, bins: int = BINS, adaptive: bool = False
    ) -> Reliability:
        """Accuracy by confidence on a data set, as `metrics.reliability` gives it.

        Args:
            data: name of the data; empty for the ``inside`` data.
            severity: of the corruption; 0 for none.
            bins: how many bins.
            adaptive: whether bins hold equally many points.

        Raises:
            ArgumentError: if there are no such data or they have no classes.
        """
        key = (data, severity) if data else self.inside
        if key not in self.scores or self.kind != "classes":
            raise ArgumentError(f"no class probabilities were scored on {key}; there are "
                                f"{list(self.scores)}, of kind {self.kind!r}")  # fmt: skip
        found = self.scores[key]
        return reliability_of(found["confidence"], found["accuracy"], bins=bins, adaptive=adaptive)

    def save(self, path: str | Path) -> None:
        """Write the scores to a file, which `load` reads; ``torch.load`` reads it, too.

        Raises:
            CheckpointError: if it cannot be written.
        """
        state = {name: getattr(self, name) for name in self.__dataclass_fields__}
        state["scores"] = [[*key, dict(found)] for key, found in self.scores.items()]
        state["outside"] = {name: dict(found) for name, found in self.outside.items()}
        write(path, state)

    @staticmethod
    def load(path: str | Path) -> "Evaluation":
        """Read what `save` has written.

        Raises:
            CheckpointError: if there is no such file, or it is damaged or of another kind.
        """
        state = read(path)
        if set(state) != set(Evaluation.__dataclass_fields__):
            raise CheckpointError(
                f"{path} has no evaluation; Evaluation.save writes one, and particles are read by "
                f"ParticleInference.load"
            )
        state["scores"] = {(name, severity): found for name, severity, found in state["scores"]}
        return Evaluation(**state)

    def __str__(self) -> str:
        """The table as text."""
        return str(self.table)


# ---------------------------------------------------------------- arguments


def named_loaders(loaders: Any) -> dict[Key, Iterable[Any]]:
    """Loaders by name and severity."""
    given = loaders if isinstance(loaders, Mapping) else {"data": loaders}
    if not given:
        raise ArgumentError("loaders must have at least one loader, such as {'clean': loader}")
    found: dict[Key, Iterable[Any]] = {}
    for name, loader in given.items():
        key = (name, 0) if isinstance(name, str) else name
        is_key = isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str)
        if not is_key or isinstance(key[1], bool) or not isinstance(key[1], int) or key[1] < 0:
            raise ArgumentError(
                f"loaders must be named by texts, or by (corruption, severity) with a severity "
                f"from 1; got {name!r}"
            )
        _check_loader(name, loader)
        if key in found:
            raise ArgumentError(
                f"loaders names {key} twice: {key[0]!r} alone is short for {key}; give one of them "
                f"another name"
            )
        found[key] = loader
    if any(name == CORRUPTED for name, _ in found) and any(severity for _, severity in found):
        raise ArgumentError(
            f"a loader is called {CORRUPTED!r}, which is the name of the mean over corruptions; "
            f"give it another"
        )
    return found


def _check_loader(name: object, loader: object) -> None:
    """Refuse what gives no batches, or gives them once only."""
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator | str):
        raise ArgumentError(
            f"the loader {name!r} must be a list of batches or a DataLoader, which can be "
            f"iterated again; got {type(loader).__name__}"
        )


def _checked_outside(outside: Any) -> dict[str, Iterable[Any]]:
    """Loaders of data outside the distribution, by name."""
    if outside is None:
        return {}
    if not isinstance(outside, Mapping) or not all(isinstance(name, str) for name in outside):
        got = list(outside) if isinstance(outside, Mapping) else type(outside).__name__
        raise ArgumentError(
            f"outside must have loaders by name, such as {{'noise': loader}}; got {got}"
        )
    for name, loader in outside.items():
        _check_loader(name, loader)
    return dict(outside)


def _reference(inside: str | None, loaders: Mapping[Key, Any]) -> Key:
    """The data that those outside are told from."""
    if inside is None:
        return next(iter(loaders))
    if (inside, 0) not in loaders:
        raise ArgumentError(f"inside={inside!r} is no loader; there are {list(loaders)}")
    return inside, 0


def _chosen(
    site: Site, metrics: Any, outside: bool, particles: int
) -> tuple[tuple[str, ...], dict[str, Callable[..., Tensor]]]:
    """Names of the metrics, and the functions among them by name."""
    kind = site.kind
    if outside and kind != "classes":
        raise ArgumentError(
            "outside= needs a site with class probabilities, whose entropy tells data apart"
        )
    if metrics is None:
        return (*_DEFAULT[kind], *(_DEFAULT_DETECTIONS if outside else ())), {}
    if isinstance(metrics, str) or not isinstance(metrics, Sequence) or not metrics:
        raise ArgumentError(f"metrics must be a list of names and functions, got {metrics!r}")
    names = [_name(metric) for metric in metrics]
    functions = {n: metric for n, metric in zip(names, metrics, strict=True) if callable(metric)}
    known = [*_MEANS[kind], *_DERIVED[kind]]
    detections = [f"{d}:{s}" for d in DETECTIONS for s in SCORES] if kind == "classes" else []
    for name, given in zip(names, metrics, strict=True):
        top_k = top_k_of(name) if kind == "classes" else None
        if name in functions:
            if name in _RESERVED:
                raise ArgumentError(f"a function among metrics is called {name!r}, which is the "
                                    f"name of another score; give it another")  # fmt: skip
        elif top_k is None and name not in (*known, *detections):
            raise ArgumentError(
                f"metrics has {given!r}, which a site of kind {kind!r} does not have; there are "
                f"{[*known, *(['top-5'] if kind == 'classes' else []), *detections]}"
            )
        if top_k is not None and top_k > (site.classes or 0):
            raise ArgumentError(
                f"the metric {given!r} needs at least {top_k} classes, but site '{site.name}' has "
                f"{site.classes}"
            )
        if is_detection(name) and not outside:
            raise ArgumentError(f"the metric {given!r} needs data outside: outside={{...}}")
        if name == "disagreement" and particles == 1:
            raise ArgumentError("the metric 'disagreement' compares particles, and there is one")
    if len(set(names)) < len(names):
        raise ArgumentError(f"metrics names something twice: {names}")
    return tuple(names), functions


def _name(metric: Any) -> str:
    """Name of a metric in the table."""
    if isinstance(metric, str):
        return f"{metric}:entropy" if metric in DETECTIONS else metric
    return getattr(metric, "__name__", type(metric).__name__)
