"""What one inference has to say, as groups of variables for ArviZ."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_fordes._checks import StateError
from pyro_fordes.labels import Labels, Variable
from pyro_fordes.loops import arguments
from pyro_fordes.particles import Call
from pyro_fordes.prediction import ParticlePredictive
from pyro_fordes.sites import choose_sites, deterministic_sites, observed_sites
from pyro_fordes.state import sample_shapes, samples_of

DATA = ("observed_data", "constant_data", "predictions_constant_data")
GROUPS = (
    "posterior",
    "posterior_predictive",
    "predictions",
    "log_likelihood",
    "sample_stats",
    "prior",
    "prior_predictive",
    *DATA,
)

_MEASURED = ("driving_force", "repulsive_force", "force_ratio", "effective_particles", "bandwidth")


@dataclass(frozen=True)
class Request:
    """What the user asked for; see ``to_arviz``.

    Attributes:
        labels: names of dimensions.
        sites: names and patterns of sites.
        max_site_size: values per particle of a site that is not named.
        groups: which groups, None for all.
        max_size: values of a variable of predictions or data.
        predictions: arguments for new observations.
        prior: number of draws.
        chunk_size: particles that predict at a time.
    """

    labels: Labels
    sites: Collection[str] | None
    max_site_size: int
    groups: Collection[str] | None
    max_size: int
    predictions: Any
    prior: int | None
    chunk_size: int | None

    def wants(self, group: str) -> bool:
        """Whether a group is to be made."""
        return self.groups is None or group in self.groups


class SameMinibatch(Messenger):
    """Gives plates that draw a minibatch of the same size the same indices at every run.

    Args:
        indices: the indices, by plate.

    Example:
        >>> import pyro
        >>> with SameMinibatch({"data": torch.tensor([4, 2])}):
        ...     with pyro.plate("data", 10, subsample_size=2) as rows:
        ...         print(rows)
        tensor([4, 2])
    """

    def __init__(self, indices: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._indices = indices

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            return
        indices = self._indices.get(msg["name"])
        if indices is not None and len(indices) == msg["fn"].subsample_size:
            msg["value"] = indices
            msg["done"] = True


class DrawObservations(UnconditionMessenger):
    """Draws observed sites instead of observing them; deterministic sites and factors stay.

    Pyro's ``uncondition`` draws those too, from distributions that plates have made larger.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> with DrawObservations():
        ...     float(pyro.sample("y", dist.Delta(torch.ones(())), obs=torch.zeros(())))
        1.0
    """

    def _pyro_sample(self, msg: Any) -> None:
        infer = msg["infer"] or {}
        if not (infer.get("_deterministic", False) or infer.get("is_auxiliary", False)):
            super()._pyro_sample(msg)


class Exporter:
    """Makes the groups of one inference, and notes what it leaves out.

    Args:
        inference: a `ParticleInference` that has particles.
        args: positional arguments of its model.
        kwargs: keyword arguments.
        request: what the user asked for.

    Attributes:
        groups: variables by group; where there are draws, ``(chain, draw, ...)``.
        omitted_sites: sites left out for their size.
        omitted: other variables left out for their size, ``group[variable] (size)``.
        measured_step: the step that the statistics are of, None for none.
    """

    def __init__(
        self, inference: Any, args: tuple, kwargs: Mapping[str, Any], request: Request
    ) -> None:
        self.inference = inference
        self.args, self.kwargs = args, kwargs
        self.request, self.labels = request, request.labels
        prototype = inference.prototype(*args, **kwargs)
        self.nodes = prototype.trace.nodes
        self.enumerated = prototype.enumerated
        self.latents = list(inference._particles)
        self.deterministic = deterministic_sites(prototype.trace)
        self.observed = observed_sites(prototype.trace)
        self.groups: dict[str, dict[str, Variable]] = {}
        self.omitted_sites: list[str] = []
        self.omitted: list[str] = []
        self.measured_step: int | None = None

    def particles(self) -> None:
        """The groups of the particles as they are now."""
        shapes = sample_shapes(self.inference)
        chosen = self._choose({name: math.prod(shapes[name]) for name in self.latents})
        wanted = chosen if self.request.wants("posterior") else []
        samples = samples_of(self.inference, True, [name for name in wanted if name in shapes])
        for name in chosen:
            if name in samples:
                self._add("posterior", name, samples[name], self._of_site(name))
        self._add_draws([name for name in chosen if name not in shapes])
        self._add_densities()
        self._add_measured()
        self._add_prior(chosen)
        self._add_data()
        self._add_predictions()

    def trajectory(self) -> None:
        """What a `Trajectory` has recorded: a chain for each particle, a draw for each record."""
        record = self.inference._trajectory
        if record is None:
            raise StateError(
                "to_arviz(trajectory=True) needs a record of the particles as they moved; pass "
                "callback=Trajectory(every=...) to run or fit"
            )
        samples = record.samples()
        self.latents, self.deterministic = list(samples), []
        chosen = self._choose({name: value[0, 0].numel() for name, value in samples.items()})
        self.omitted_sites = [*record.omitted, *self.omitted_sites]
        for name in chosen:
            self._add("posterior", name, samples[name].transpose(0, 1), self._of_site(name))
        for name, values in record.stats().items():
            if not values.isnan().all():
                self._add("sample_stats", name, values.T, ())
        self._add_data()

    def _choose(self, sizes: dict[str, int]) -> list[str]:
        """The sites to export: latent ones of these sizes, and deterministic ones."""
        for name in self.deterministic:
            sizes[name] = torch.as_tensor(self.nodes[name]["value"]).numel()
        request = self.request
        chosen, self.omitted_sites = choose_sites(
            "to_arviz", sizes, request.sites, request.max_site_size
        )
        return chosen

    def names(self) -> list[str]:
        """All variables there could be."""
        return [*self.latents, *self.deterministic, *self.observed, *self._arguments()]

    def dims(self) -> set[str]:
        """Dimensions of all sites, exported or not."""
        return {
            dim
            for name in (*self.latents, *self.deterministic, *self.observed)
            for dim in self._of_site(name)
        }

    def _of_site(self, name: str) -> tuple[str, ...]:
        return self.labels.of_site(name, self.nodes[name])

    def _add(self, group: str, name: str, values: Any, dims: tuple[str, ...]) -> None:
        """Put a variable into a group; without a chain axis it gets one."""
        array = _array(values)
        if group not in DATA and array.ndim == 1 + len(dims):
            array = array[None]
        if self.request.wants(group):
            self.groups.setdefault(group, {})[name] = (array, dims)

    def _fits(self, group: str, name: str, size: int) -> bool:
        """Whether a variable is wanted and small enough; notes it if it is only too large."""
        if not self.request.wants(group):
            return False
        if self.request.groups is None and size > self.request.max_size:
            self.omitted.append(f"{group}[{name!r}] ({size:,} values)")
            return False
        return True

    def _add_draws(self, deterministic: list[str]) -> None:
        """Deterministic sites, and new observations with the same arguments."""
        count = self.inference.num_particles
        drawn = [
            name
            for name in self.observed
            if self._fits("posterior_predictive", name, count * _numel(self.nodes[name]["value"]))
        ]
        wanted = [*drawn, *(deterministic if self.request.wants("posterior") else [])]
        for name, values in self._draw(wanted, self.args, self.kwargs).items():
            group = "posterior_predictive" if name in drawn else "posterior"
            self._add(group, name, values, self._of_site(name))

    def _draw(
        self, names: list[str], args: tuple, kwargs: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """Values of sites under each particle, observations drawn anew."""
        if not names:
            return {}
        predict = ParticlePredictive(self.inference, names, self.request.chunk_size)
        with DrawObservations():
            return predict(*args, **kwargs)

    def _add_densities(self) -> None:
        """Pointwise log likelihoods, which are not known where discrete sites are summed out."""
        count = self.inference.num_particles
        sizes = {name: count * _numel(self.nodes[name]["log_prob"]) for name in self.observed}
        fitting = [n for n, size in sizes.items() if self._fits("log_likelihood", n, size)]
        if self.enumerated or not fitting:
            return
        predict = ParticlePredictive(self.inference, None, self.request.chunk_size)
        found = predict.log_prob(*self.args, **self.kwargs)
        for name in fitting:
            dims = self.labels.of_density(name, self.nodes[name], found[name].dim() - 1)
            self._add("log_likelihood", name, found[name], dims)

    def _add_measured(self) -> None:
        """The log joint of these arguments, and what the last measured step showed."""
        if not self.request.wants("sample_stats"):
            return
        self._add("sample_stats", "lp", self.inference.log_joint(*self.args, **self.kwargs), ())
        try:
            measured = self.inference.diagnostics()
        except StateError:  # no step yet
            return
        self.measured_step = measured["step"]
        for name in _MEASURED:
            values = torch.as_tensor(measured[name]).expand(self.inference.num_particles)
            if not values.isnan().any():
                self._add("sample_stats", name, values, ())

    def _add_prior(self, chosen: list[str]) -> None:
        """Draws from the prior, and observations drawn with them."""
        count = self.request.prior
        if count is None or not (
            self.request.wants("prior") or self.request.wants("prior_predictive")
        ):
            return
        drawn = [
            name
            for name in self.observed
            if self._fits("prior_predictive", name, count * _numel(self.nodes[name]["value"]))
        ]
        with DrawObservations():
            runs = [
                self.inference._log_joint.prior_trace(self.args, self.kwargs).nodes
                for _ in range(count)
            ]
        for name in (*chosen, *drawn):
            group = "prior_predictive" if name in drawn else "prior"
            values = torch.stack([torch.as_tensor(nodes[name]["value"]) for nodes in runs])
            self._add(group, name, values, self._of_site(name))

    def _add_data(self) -> None:
        """Observations, and the tensors among the arguments that are none."""
        values = self._observations()
        for name, value in values.items():
            if self._fits("observed_data", name, value.numel()):
                self._add("observed_data", name, value, self._of_site(name))
        self._add_arguments("constant_data", self._arguments(), values, self._plates())

    def _observations(self) -> dict[str, Tensor]:
        """Values of the observed sites with these arguments, not those of an earlier call."""
        inference = self.inference

        def capture(call: Call) -> dict[str, Tensor]:
            return {
                name: torch.as_tensor(call.trace.nodes[name]["value"]) for name in self.observed
            }

        if not self.observed:
            return {}
        found = inference._log_joint.replay(
            {name: value[:1].detach() for name, value in inference._particles.items()},
            self.args,
            self.kwargs,
            inference._latents,
            capture=capture,
            buffers={name: buffer[:1] for name, buffer in inference._buffers.items()},
        )
        return {name: value[0] for name, value in found.items()}

    def _add_predictions(self) -> None:
        """Observations drawn for other arguments, and the tensors among those."""
        if self.request.predictions is None:
            return
        args, kwargs = arguments(self.request.predictions)
        if self.request.wants("predictions"):
            for name, values in self._draw(self.observed, args, kwargs).items():
                if self._fits("predictions", name, values.numel()):
                    dims = self.labels.named(
                        name, self.nodes[name], values.dim() - 1, self.nodes[name]["fn"].event_dim
                    )
                    self._add("predictions", name, values, dims)
        given = self._arguments(args, kwargs)
        sizes: dict[str, int] = {}
        for values, dims in self.groups.get("predictions", {}).values():
            sizes.update(zip(dims, values.shape[2:], strict=True))
        self._add_arguments(
            "predictions_constant_data",
            given,
            {},
            {k: n for k, n in sizes.items() if k in self._plates()},
        )

    def _add_arguments(
        self,
        group: str,
        given: Mapping[str, Tensor],
        observations: Mapping[str, Tensor],
        plates: Mapping[str, int],
    ) -> None:
        """Arguments that are no observations."""
        for name, value in given.items():
            if any(_same(value, observation) for observation in observations.values()):
                continue
            if self._fits(group, name, value.numel()):
                self._add(group, name, value, self.labels.of_argument(name, value, plates))

    def _arguments(
        self, args: tuple | None = None, kwargs: Mapping[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Tensors and numbers among the arguments, by name."""
        args, kwargs = (self.args, self.kwargs) if args is None else (args, kwargs or {})
        known = self.inference._log_joint.arguments
        found = {}
        for key in (*range(len(args)), *kwargs):
            name, value = known.locate(key, args, kwargs)
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                inner = [str(getattr(step, "key", getattr(step, "idx", step))) for step in path]
                if isinstance(leaf, Tensor | np.ndarray | int | float) and not isinstance(
                    leaf, bool
                ):
                    found["_".join([name, *inner])] = torch.as_tensor(leaf)
        return found

    def _plates(self) -> dict[str, int]:
        """Lengths of the plates of all sites."""
        return {
            frame.name: frame.size
            for site in self.nodes.values()
            if site["type"] == "sample"
            for frame in site["cond_indep_stack"]
            if frame.vectorized
        }


def _array(values: Any) -> np.ndarray:
    """A tensor as numpy has it; bfloat16, which numpy lacks, becomes float32."""
    tensor = torch.as_tensor(values).detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _numel(value: Any) -> int:
    return torch.as_tensor(value).numel()


def _same(argument: Tensor, observation: Tensor) -> bool:
    """Whether an argument is what a site observes, of whatever type of number."""
    return argument.shape == observation.shape and bool((argument == observation).all())
