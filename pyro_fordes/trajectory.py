"""Recording of particles while they move, in bounded memory."""

import math
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pyro_fordes._checks import ArgumentError, StateError, check_positive_int
from pyro_fordes.sites import choose_sites
from pyro_fordes.state import sample_shapes, samples_of

_PER_PARTICLE = {
    "lp": "log_joint",
    "driving_force": "driving_force",
    "repulsive_force": "repulsive_force",
}
_PER_STEP = ("effective_particles", "bandwidth")


class Trajectory:
    """A callback for ``run`` and ``fit`` that keeps the particles of every n-th step.

    ``to_arviz(inference, ..., trajectory=True)`` exports what it has kept, a chain for each
    particle. Values are those of `ParticleInference.get_samples`, copied to the CPU. Where a record
    would be the ``limit + 1``-th, every second one is dropped and ``every`` doubles, so that the
    records stay evenly spaced however long the run is.

    Args:
        every: steps 0, n, 2n, ... are kept.
        sites: names of latent sites, and patterns such as ``"net.2.*"``; None for all. Sites that
            are not named are kept up to ``max_site_size``.
        max_site_size: largest number of values per particle of a site that is not named.
        limit: largest number of records, at least 2.

    Attributes:
        steps: the steps that were kept.
        omitted: the sites that were left out for their size.

    Raises:
        ArgumentError: if an argument cannot be used; of unknown sites at the first step.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_fordes import RBF, ParticleInference, Trajectory, Weights
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> inference = ParticleInference(
        ...     model, pyro.optim.Adam({"lr": 0.1}), 3, kernel=RBF(Weights()), seed=0
        ... )
        >>> trajectory = Trajectory(every=10)
        >>> losses = inference.run(100, progress_bar=False, callback=trajectory)
        >>> trajectory.steps[:3], trajectory.samples()["z"].shape
        ([0, 10, 20], torch.Size([10, 3]))
    """

    def __init__(
        self,
        every: int = 1,
        *,
        sites: Collection[str] | None = None,
        max_site_size: int = 1000,
        limit: int = 1000,
    ) -> None:
        self.every = check_positive_int("every", every)
        self.max_site_size = check_positive_int("max_site_size", max_site_size)
        if check_positive_int("limit", limit) < 2:
            raise ArgumentError("limit must be at least 2, got 1")
        if sites is not None and (isinstance(sites, str) or not isinstance(sites, Collection)):
            raise ArgumentError(f"sites must be a list of names, got {sites!r}; write [{sites!r}]")
        self.sites = sites
        self.limit = limit
        self.steps: list[int] = []
        self.omitted: list[str] = []
        self._values: list[dict[str, Tensor]] = []
        self._stats: list[dict[str, Tensor]] = []
        self._of: weakref.ref[Any] | None = None

    def __call__(self, inference: Any, step: int, loss: float) -> None:
        """Keep the particles after a step, if it is one of the n-th.

        Args:
            inference: the inference that took the step, always the same one.
            step: the step.
            loss: its loss.

        Raises:
            ArgumentError: if a site is unknown or the inference is another one.
        """
        if self._of is None:
            self._of = weakref.ref(inference)
            inference._trajectory = self
        elif self._of() is not inference:
            raise ArgumentError(
                "a Trajectory records one inference, and this one has recorded another; make a "
                "new Trajectory(...) for each"
            )
        if step % self.every:
            return
        while len(self.steps) == self.limit:
            self._thin()
        if step % self.every:
            return
        sizes = {name: math.prod(shape) for name, shape in sample_shapes(inference).items()}
        chosen, self.omitted = choose_sites("Trajectory", sizes, self.sites, self.max_site_size)
        samples = samples_of(inference, True, chosen)
        self.steps.append(step)
        self._values.append({name: value.cpu() for name, value in samples.items()})
        self._stats.append(_stats(inference, step, loss, inference.num_particles))

    def _thin(self) -> None:
        """Keep the records of twice as rare steps."""
        self.every *= 2
        kept = [i for i, step in enumerate(self.steps) if step % self.every == 0]
        self.steps = [self.steps[i] for i in kept]
        self._values = [self._values[i] for i in kept]
        self._stats = [self._stats[i] for i in kept]

    def samples(self) -> dict[str, Tensor]:
        """The recorded values, ``{site: (record, particle, *site shape)}``.

        Raises:
            StateError: if nothing has been recorded.
        """
        return _stacked(self._values)

    def stats(self) -> dict[str, Tensor]:
        """What was measured at the recorded steps, ``{name: (record, particle)}``.

        ``loss`` of the step; and where it was a measured one (``diagnostics_every=1`` measures
        all), ``lp``, ``driving_force`` and ``repulsive_force`` of each particle before its update,
        ``effective_particles`` and ``bandwidth``. NaN where there is no value.

        Raises:
            StateError: if nothing has been recorded.
        """
        return _stacked(self._stats)


def _stacked(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Records joined along a first axis."""
    if not records:
        raise StateError(
            "the Trajectory has recorded nothing yet; pass it as callback= to run or fit"
        )
    return {name: torch.stack([record[name] for record in records]) for name in records[0]}


def _stats(inference: Any, step: int, loss: float, count: int) -> dict[str, Tensor]:
    """Numbers of a step, one for each of the particles of this process."""
    try:
        measured = inference.diagnostics()
    except StateError:  # none since the inference was loaded
        measured = {}
    if measured.get("step") != step:
        measured = {}
    stats = {"loss": torch.full((count,), loss)}
    for name, key in _PER_PARTICLE.items():
        stats[name] = torch.as_tensor(measured.get(key, math.nan)).cpu().expand(count)
    for name in _PER_STEP:
        stats[name] = torch.as_tensor(measured.get(name, math.nan)).expand(count)
    return {name: value.double() for name, value in stats.items()}
