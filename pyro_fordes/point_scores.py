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
from pyro_fordes.metrics.classification import (
    point_brier,
    point_confidence,
    point_correct,
    point_nll,
)
from pyro_fordes.metrics.regression import point_covered, point_crps, point_squared_error
from pyro_fordes.metrics.uncertainty import point_disagreement, uncertainty
from pyro_fordes.prediction import ParticlePredictive, eval_mode
from pyro_fordes.prototype import module_of
from pyro_fordes.sites import base_distribution

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
    """

    name: str
    kind: str
    distribution: type


def find_site(inference: Any, name: str | None, batch: Any) -> Site:
    """The observed site to score: the only one, or the one named.

    Raises:
        ArgumentError: if there is none, several and none is named, or none of that name.
    """
    args, kwargs = arguments(batch)
    # Refuses arguments without observations, whose values would be draws.
    observed = list(ParticlePredictive(inference).log_prob(*args, **kwargs))
    if name is None and len(observed) > 1:
        raise ArgumentError(f"the model observes the sites {observed}; choose one with site=")
    if name is not None and name not in observed:
        raise ArgumentError(f"site={name!r} is not observed with these data; the sites are "
                            f"{observed}")  # fmt: skip
    name = observed[0] if name is None else name
    # Not in train mode, in which BatchNorm refuses a batch of one point.
    with eval_mode(module_of(inference.model)):
        trace = inference.prototype(*args, **kwargs).trace
    base = type(base_distribution(trace.nodes[name]["fn"]))
    if issubclass(base, Categorical | OneHotCategorical | Bernoulli):
        kind = "classes"
    else:
        kind = "normal" if issubclass(base, Normal) else "density"
    return Site(name, kind, base)


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
        return _joined(self._inside(*arguments(batch)) for batch in batches)

    def outside(self, batches: Iterable[Any]) -> dict[str, Tensor]:
        """How uncertain predictions are, for points whose observations mean nothing."""
        return _joined(self._outside(*arguments(batch)) for batch in batches)

    def _outside(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        found = self._predictive.parameters(*args, **kwargs)[self.site.name]
        return _uncertainties(self._log_probs(found))

    def _inside(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        observed = self._observed(args, kwargs)
        if self.site.kind == "density":
            densities = self._predictive.log_prob(*args, **kwargs)[self.site.name]
            observed = observed.reshape(-1, *observed.shape[densities.dim() - 1 :])
            densities = densities.reshape(len(densities), -1)
            found = {"nll": point_nll(densities)}
            given: tuple[Tensor, ...] = (densities,)
        else:
            parameters = self._predictive.parameters(*args, **kwargs)[self.site.name]
            if self.site.kind == "classes":
                labels = observed
                if issubclass(self.site.distribution, OneHotCategorical):
                    labels = observed.argmax(-1)
                observed = labels.flatten().long()
                given = (self._log_probs(parameters), observed)
                found = self._classes(*given)
            else:
                observed = observed.flatten()
                mean, sd = (parameters[name].flatten(1) for name in ("loc", "scale"))
                given = (mean, observed, sd)
                found = _normal(*given)
        for name, function in self.functions.items():
            found[name] = _checked(name, function(*given), len(observed))
        return {**found, "observed": observed}

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

    def _log_probs(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Log probabilities ``(particle, point, class)`` from a site's parameters."""
        logits = parameters["logits"]
        if issubclass(self.site.distribution, Bernoulli):
            logits = torch.stack([torch.zeros_like(logits), logits], dim=-1)
        return logits.flatten(1, -2).log_softmax(-1)

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


def top_k_of(metric: str) -> int | None:
    """The number in a name such as ``"top-5"``; None for other names."""
    found = re.fullmatch(r"top-([1-9]\d*)", metric)
    return None if found is None else int(found.group(1))


def _uncertainties(log_probs: Tensor) -> dict[str, Tensor]:
    """Scores of how uncertain class probabilities are."""
    found = uncertainty(log_probs)
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


def _joined(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Scores of all batches, on the CPU."""
    listed = [{name: score.detach().cpu() for name, score in part.items()} for part in parts]
    if not listed:
        raise ArgumentError("a loader gave no batch; is the data set empty?")
    return {name: torch.cat([part[name] for part in listed]) for name in listed[0]}


def _is_same(leaf: Any, value: Tensor) -> bool:
    """Whether a leaf of a batch is a value, of whatever type of number."""
    same_shape = isinstance(leaf, Tensor) and leaf.shape == value.shape
    return same_shape and torch.equal(leaf.to(value.dtype), value)
