"""Scores of single points: what a data set is reduced to while it streams through the model."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Bernoulli, Categorical, Normal, OneHotCategorical
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_fordes._checks import ArgumentError, ModelError
from pyro_fordes.loops import arguments
from pyro_fordes.metrics._inputs import check_classes, check_densities, check_log_probs
from pyro_fordes.metrics.classification import (
    point_brier,
    point_confidence,
    point_correct,
    point_nll,
)
from pyro_fordes.metrics.regression import (
    check_regression,
    point_covered,
    point_crps,
    point_squared_error,
)
from pyro_fordes.metrics.uncertainty import point_disagreement, point_uncertainty
from pyro_fordes.particles import Call
from pyro_fordes.prediction import ParticlePredictive, eval_mode
from pyro_fordes.prototype import module_of
from pyro_fordes.sites import counted, given_parameters, plain_distribution

PointFunction = Callable[..., Tensor]
"""Gives a score per point; see `evaluate`."""

SCORES = ("entropy", "mutual_information", "least_confidence")
"""Scores that tell points outside the distribution from those inside."""


@dataclass(frozen=True)
class Site:
    """An observed site and how its predictions are scored.

    Attributes:
        name: of the site.
        kind: ``"classes"``, ``"normal"`` or ``"density"``.
        distribution: class of its distribution, without wrappers.
        event_dim: how many of its last axes make one observation.
        classes: how many classes there are; None for other kinds.
    """

    name: str
    kind: str
    distribution: type
    event_dim: int = 0
    classes: int | None = None


def find_site(inference: Any, name: str | None, batch: Any, chunk_size: int | None = None) -> Site:
    """The observed site to score: the only one, or the one named.

    Raises:
        ArgumentError: if there is none, several and none is named, or none of that name.
    """
    args, kwargs = arguments(batch)
    # Refuses arguments without observations, whose values would be draws.
    observed = list(ParticlePredictive(inference, None, chunk_size).log_prob(*args, **kwargs))
    if name is None and len(observed) > 1:
        raise ArgumentError(f"the model observes the sites {observed}; choose one with site=")
    if name is not None and name not in observed:
        raise ArgumentError(f"site={name!r} is not observed with these data; the sites are "
                            f"{observed}")  # fmt: skip
    name = observed[0] if name is None else name
    # Not in train mode, in which BatchNorm refuses a batch of one point.
    with eval_mode(module_of(inference.model)):
        trace = inference.prototype(*args, **kwargs).trace
    whole = trace.nodes[name]["fn"]
    fn, event_dim = plain_distribution(whole), whole.event_dim
    if isinstance(fn, Bernoulli):
        return Site(name, "classes", type(fn), event_dim, 2)
    if isinstance(fn, Categorical | OneHotCategorical):
        return Site(name, "classes", type(fn), event_dim, fn.logits.shape[-1])
    return Site(name, "normal" if isinstance(fn, Normal) else "density", type(fn), event_dim)


class PointScores:
    """Streams data sets through an inference's particles and keeps scores per point only.

    Args:
        inference: a `ParticleInference`.
        site: what is scored.
        chunk_size: how many particles are run at a time; None for all.
        functions: further scores by name.
        top_k: further numbers of classes that may be named.
    """

    def __init__(
        self,
        inference: Any,
        site: Site,
        chunk_size: int | None,
        functions: Mapping[str, PointFunction],
        top_k: Sequence[int] = (),
    ) -> None:
        self.inference = inference
        self.site = site
        self.functions = functions
        self.top_k = top_k
        self._predictive = ParticlePredictive(inference, chunk_size=chunk_size)
        self._draws = ParticlePredictive(inference, [site.name], chunk_size)
        # Where the observations are in batches of a structure, and their type at the site.
        self._places: dict[str, tuple[int, torch.dtype] | None] = {}

    def inside(self, batches: Iterable[Any]) -> dict[str, Tensor]:
        """Scores of points with observations; ``"observed"`` has those.

        Returns:
            ``{score: (point,)}`` on the CPU; ``"observed"`` has the event axes of a density, too.
        """
        return self._joined(self._inside(*arguments(batch)) for batch in batches)

    def outside(self, batches: Iterable[Any]) -> dict[str, Tensor]:
        """How uncertain predictions are, for points whose observations mean nothing."""
        return self._joined(self._outside(*arguments(batch)) for batch in batches)

    def _outside(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        found, kept = self._predicted(args, kwargs)
        if not kept.any():
            return {}
        return _uncertainties(check_log_probs(self._log_probs(found, kept)))

    def _inside(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        observed = self._observed(args, kwargs)
        found, kept = self._predicted(args, kwargs)
        if not kept.any():
            return {}
        given: tuple[Tensor, ...]
        if self.site.kind == "density":
            densities = found["log_prob"]
            batch = densities.shape[1:]
            event = observed.shape[observed.dim() - self.site.event_dim :]
            # A point of which some elements are masked counts, by those that are not.
            kept = kept.reshape(batch.numel(), kept.shape[len(batch) :].numel()).any(1)
            observed = observed.expand(batch + event).reshape(batch.numel(), *event)[kept]
            given = (check_densities(densities.reshape(len(densities), -1)[:, kept]),)
            scores = {"nll": point_nll(*given)}
        elif self.site.kind == "classes":
            if issubclass(self.site.distribution, OneHotCategorical):
                observed = observed.argmax(-1)
            observed = observed.expand(kept.shape)[kept].long()
            given = check_classes(self._log_probs(found, kept), observed)
            scores = self._classes(*given)
        else:
            observed = observed.expand(kept.shape)[kept]
            mean, sd = found["loc"][:, kept], found["scale"][:, kept]
            mean, targets, _ = check_regression(mean, observed, sd)
            given = (mean, targets, sd.to(mean))
            scores = _normal(*given)
        for name, function in self.functions.items():
            scores[name] = _checked(name, function(*given), len(observed))
        return {**scores, "observed": observed}

    def _predicted(
        self, args: tuple, kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What the particles predict, and which elements no mask covers.

        Parameters of a site's distribution, or its log density; the former for each element.
        """

        def capture(call: Call) -> dict[str, Tensor]:
            site = call.trace.nodes.get(self.site.name)
            if site is None:
                raise ModelError(
                    f"without observations the model has no site '{self.site.name}', so data "
                    f"outside cannot be scored; let it sample the site with obs=None"
                )
            kept = counted(site)
            if self.site.kind == "density":
                found = {"log_prob": site["fn"].log_prob(site["value"])}
            else:
                fn = plain_distribution(site["fn"])
                found = {
                    name: value.expand(kept.shape + value.shape[len(fn.batch_shape) :])
                    for name, value in given_parameters(fn).items()
                }
            return {**found, "kept": kept.byte()}

        found = self._predictive.captured(capture, *args, **kwargs)
        kept = found.pop("kept").bool()
        if (kept != kept[0]).any():
            raise ModelError(
                f"the mask of site '{self.site.name}' differs between particles, so that they "
                f"would be scored on different points; let it depend on the data alone"
            )
        return found, kept[0]

    def _classes(self, log_probs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """All scores of class probabilities."""
        confidence, correct = point_confidence(log_probs, labels)
        found = {
            "nll": point_nll(log_probs, labels),
            "brier": point_brier(log_probs, labels),
            "accuracy": correct,
            "confidence": confidence,
            **_uncertainties(log_probs),
        }
        for k in self.top_k:
            found[f"top-{k}"] = point_correct(log_probs, labels, top_k=k)
        return found

    def _log_probs(self, parameters: Mapping[str, Tensor], kept: Tensor) -> Tensor:
        """Log probabilities ``(particle, point, class)`` from a site's parameters."""
        logits = parameters["logits"]
        if issubclass(self.site.distribution, Bernoulli):
            logits = torch.stack([torch.zeros_like(logits), logits], dim=-1)
        return logits[:, kept].log_softmax(-1)

    def _observed(self, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """What the site observes in a batch.

        It is nearly always an argument of the model as it is. Which one is found with the first
        batch of a structure; where it is none, a run of the model has it.
        """
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        structure = str(spec)
        known = self._places.get(structure)
        if known is not None:
            place, dtype = known
            return leaves[place].to(dtype)
        value = self._draws(*args, **kwargs)[self.site.name][0]
        if structure not in self._places:
            places = [place for place, leaf in enumerate(leaves) if _is_same(leaf, value)]
            # Where several arguments have these values, a later batch tells which it is.
            if len(places) <= 1:
                self._places[structure] = (places[0], value.dtype) if places else None
            if places:
                return value
        with eval_mode(module_of(self.inference.model)):
            plates = self.inference.prototype(*args, **kwargs).plates
        if plates:
            raise ModelError(
                f"site '{self.site.name}' observes no argument of the model as it is, and a plate "
                f"draws a minibatch: the points would be others at each run. Give the loader's "
                f"batches to the model as they are, and pyro.plate(..., subsample_size=len(batch))"
            )
        return value

    def _joined(self, parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Scores of all batches, on the CPU."""
        listed = [{name: score.detach().cpu() for name, score in part.items()} for part in parts]
        if not listed:
            raise ArgumentError("a loader gave no batch; is the data set empty?")
        listed = [part for part in listed if part]  # nothing where all points are masked
        if not listed:
            raise ArgumentError(
                f"all points of site '{self.site.name}' are masked in a loader's batches, so that "
                f"nothing is left to score"
            )
        observed = [part["observed"] for part in listed if "observed" in part]
        shapes = sorted({tuple(value.shape[1:]) for value in observed})
        if len(shapes) > 1:
            raise ArgumentError(
                f"site '{self.site.name}' observes things of the shapes {shapes} in a loader's "
                f"batches, which are no points of one kind. If those are rows of data, the model "
                f"makes a batch one observation: declare them with pyro.plate, and leave their "
                f"axis out of .to_event(...)"
            )
        return {name: torch.cat([part[name] for part in listed]) for name in listed[0]}


def top_k_of(metric: str) -> int | None:
    """The number in a name such as ``"top-5"``; None for other names."""
    found = re.fullmatch(r"top-([1-9]\d*)", metric)
    return None if found is None else int(found.group(1))


def _uncertainties(log_probs: Tensor) -> dict[str, Tensor]:
    """Scores of how uncertain class probabilities are."""
    found = point_uncertainty(log_probs)
    scores = dict(zip(SCORES, (found.total, found.epistemic, found.least_confidence), strict=True))
    if len(log_probs) > 1:
        scores["disagreement"] = point_disagreement(log_probs)
    return scores


def _normal(mean: Tensor, observed: Tensor, sd: Tensor) -> dict[str, Tensor]:
    """All scores of normals around means."""
    return {
        "nll": point_nll(torch.distributions.Normal(mean, sd).log_prob(observed)),
        "squared_error": point_squared_error(mean, observed),
        "crps": point_crps(mean, observed, sd),
        "coverage": point_covered(mean, observed, sd),
    }


def _checked(name: str, scores: Any, points: int) -> Tensor:
    """What a user's function gave, if it is a score per point."""
    if not isinstance(scores, Tensor) or scores.shape != (points,):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ArgumentError(
            f"the metric {name} must return one score per point, a tensor ({points},); got {got}"
        )
    return scores


def _is_same(leaf: Any, value: Tensor) -> bool:
    """Whether a leaf of a batch is a value, of whatever type of number."""
    same_shape = isinstance(leaf, Tensor) and leaf.shape == value.shape
    return same_shape and torch.equal(leaf.to(value.dtype), value)
