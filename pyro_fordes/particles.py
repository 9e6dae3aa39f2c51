"""Particles as stacked values, and the small records that pass between the parts.

Axes, always in this order: ``particle, point, feature`` for representations and
``(particle, *site shape)`` for values. ``local`` is the particle axis of this process where
particles are spread over several.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pyro_fordes._checks import ArgumentError, check_number

Values = Mapping[str, Tensor]
"""Stacked values: site name to a tensor of shape ``(particle, *site shape)``."""

Schedule = float | Callable[[int], float]
"""A number, or a function of the step (0, 1, ...) that gives one."""


def at_step(
    name: str, schedule: Schedule, step: int, *, minimum: float = 0.0, exclusive: bool = False
) -> float:
    """Value of a number or schedule at a step, checked.

    Args:
        name: the argument's name, for messages.
        schedule: a number or a function of the step.
        step: the step, counted from 0.
        minimum: lower bound of the value.
        exclusive: whether the bound itself is refused.

    Returns:
        The value as a float.

    Raises:
        ArgumentError: if the value is no finite number in the range.

    Example:
        >>> at_step("temperature", lambda step: 1.0 + step, 3)
        4.0
    """
    if not callable(schedule):
        return check_number(name, schedule, minimum=minimum, exclusive=exclusive)
    if isinstance(step, OpenStep):
        return step.value(name, schedule, minimum, exclusive)
    try:
        value = schedule(step)
    except Exception as error:
        raise ArgumentError(
            f"{name} must be a number or a function of the step; calling it with {step} raised "
            f"{type(error).__name__}: {error}"
        ) from error
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    return check_number(f"{name}({step})", value, minimum=minimum, exclusive=exclusive)


class OpenStep(int):
    """A step that is not known yet: what depends on it stays open while a step is traced.

    Schedules that `at_step` reads get a tensor in the place of their value. Any other use of the
    number would freeze it, and is refused.
    """

    schedules: list[Callable[[int], float]]
    _like: Tensor
    _values: list[Tensor] | None

    def __new__(cls, like: Tensor, values: list[Tensor] | None = None) -> "OpenStep":
        """Make one.

        Args:
            like: a tensor of the type and on the device that values of schedules shall have.
            values: the tensors to give, in the order in which schedules are read; None gives ones.
        """
        step = super().__new__(cls, 0)
        step._like, step._values, step.schedules = like, values, []
        return step

    def value(self, name: str, schedule: Any, minimum: float, exclusive: bool) -> Any:
        """A tensor for the schedule's value."""

        def at(step: int) -> float:
            return at_step(name, schedule, step, minimum=minimum, exclusive=exclusive)

        self.schedules.append(at)
        if self._values is None:
            return self._like.new_ones(())
        return self._values[len(self.schedules) - 1]

    def _frozen(self, *_: Any) -> Any:
        raise TypeError(
            "a number that depends on the step is computed where it cannot be traced; make it a "
            "schedule that is read with pyro_fordes.particles.at_step"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __mod__ = _frozen
    __rtruediv__ = __floordiv__ = __pow__ = __rpow__ = __neg__ = __abs__ = _frozen
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = __bool__ = __float__ = __index__ = _frozen
    __int__ = __hash__ = _frozen


def ravel(values: Values) -> Float[Tensor, "particle param"]:
    """Join stacked site values to one row per particle, sites in the mapping's order.

    Example:
        >>> ravel({"a": torch.zeros(2, 3), "b": torch.ones(2)}).shape
        torch.Size([2, 4])
    """
    if not values:
        raise ArgumentError("there is no site to join: got an empty mapping of values")
    return torch.cat([value.reshape(len(value), -1) for value in values.values()], dim=1)


def unravel(flat: Float[Tensor, "particle param"], like: Values) -> dict[str, Tensor]:
    """Undo `ravel`: split rows into sites with the shapes of ``like``.

    Args:
        flat: one row per particle.
        like: stacked values whose names, order and site shapes are taken.

    Raises:
        ArgumentError: if the row length is not the sites' total size.

    Example:
        >>> values = {"a": torch.zeros(2, 3), "b": torch.ones(2)}
        >>> unravel(ravel(values), values)["b"]
        tensor([1., 1.])
    """
    sizes = [value[0].numel() for value in like.values()]
    if flat.shape[1] != sum(sizes):
        raise ArgumentError(
            f"rows have {flat.shape[1]} entries, but the sites {list(like)} need {sum(sizes)}"
        )
    parts = flat.split(sizes, dim=1)
    return {
        name: part.reshape(len(flat), *value.shape[1:])
        for (name, value), part in zip(like.items(), parts, strict=True)
    }


class Gather(Protocol):
    """How a process that owns some particles works together with those that own the others.

    One process owns all particles (`OneProcess`); ``distributed.Ranks`` spreads them over several.
    Where the batch is split into shares, several processes own the same particles. All methods but
    `rows` are called by all processes alike, in the same order.
    """

    def split(self, num_particles: int) -> "Gather":
        """The one to work with, once the number of particles is known."""
        ...

    @property
    def rows(self) -> slice:
        """Which of all particles are here."""
        ...

    @property
    def leads(self) -> bool:
        """Whether this process is the first, which writes files."""
        ...

    @property
    def shares(self) -> int:
        """Into how many shares of the same size the batch is split."""
        ...

    @property
    def share(self) -> int:
        """Which of them is here."""
        ...

    def __call__(self, local: Tensor) -> Tensor:
        """Tensor of all particles from that of the particles here (first axis), detached."""
        ...

    def collect(self, local: Tensor) -> Tensor | None:
        """The same at the first process only; None at the others."""
        ...

    def total(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over processes of tensors that all of them have."""
        ...

    def mean(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Means over the shares of the batch of tensors of the particles here, detached."""
        ...

    def beside(self, local: Tensor, axis: int) -> Tensor:
        """Tensors of the shares of the batch, side by side along an axis, detached."""
        ...

    def first(self, make: Callable[[], Any]) -> Any:
        """What the first process makes: tensors and plain values in dicts, lists and tuples.

        An error that it raises is raised everywhere.
        """
        ...

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which flags are set in any process."""
        ...

    def together(
        self, what: str, content: Callable[[], Mapping[str, Any]] = dict
    ) -> AbstractContextManager[None]:
        """A context for work that all processes do at the same time.

        If it fails in one of them, the others fail as well. They also do if ``content``, trees of
        tensors and plain values by name, is not the same in all of them. Of ``"data"`` and
        ``"arguments"`` processes with other shares of the batch need have the same shapes only;
        ``"particles"`` are compared by those that own the same.
        """
        ...


@dataclass(frozen=True)
class OneProcess:
    """`Gather` of a process that owns all particles.

    Example:
        >>> OneProcess()(torch.ones(2)).shape
        torch.Size([2])
    """

    def split(self, num_particles: int) -> "OneProcess":
        """Itself."""
        return self

    @property
    def rows(self) -> slice:
        """All of them."""
        return slice(None)

    @property
    def leads(self) -> bool:
        """True."""
        return True

    @property
    def shares(self) -> int:
        """One: the batch is whole."""
        return 1

    @property
    def share(self) -> int:
        """The only one."""
        return 0

    def __call__(self, local: Tensor) -> Tensor:
        """Return the tensor itself, detached."""
        return local.detach()

    def collect(self, local: Tensor) -> Tensor:
        """Return the tensor itself, detached."""
        return local.detach()

    def total(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors themselves."""
        return dict(parts)

    def mean(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors themselves, detached."""
        return [part.detach() for part in parts]

    def beside(self, local: Tensor, axis: int) -> Tensor:
        """Return the tensor itself, detached."""
        return local.detach()

    def first(self, make: Callable[[], Any]) -> Any:
        """Return what is made."""
        return make()

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return the flags themselves."""
        return flags

    def together(
        self, what: str, content: Callable[[], Mapping[str, Any]] = dict
    ) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()


def count_of(rows: slice, num_particles: int) -> int:
    """How many of so many particles are in a slice.

    Example:
        >>> count_of(slice(4, None), 6)
        2
    """
    return len(range(num_particles)[rows])


def local_row(index: int, num_particles: int, gather: Gather) -> int:
    """Which of the particles here is number ``index`` of all.

    Args:
        index: number of the particle.
        num_particles: how many there are.
        gather: which of them are here.

    Raises:
        ArgumentError: if there is no such particle, or not here.

    Example:
        >>> local_row(2, 3, OneProcess())
        2
    """
    if isinstance(index, bool) or index not in range(num_particles):
        raise ArgumentError(
            f"module(index) must be a particle from 0 to {num_particles - 1}, got {index!r}"
        )
    here = range(num_particles)[gather.rows]
    if index not in here:
        raise ArgumentError(
            f"particle {index} is in another process, and those here are {list(here)}; call "
            f"module({index}) there, or load a checkpoint in one process"
        )
    return index - here[0]


@dataclass(frozen=True)
class Latent:
    """A continuous latent site.

    Attributes:
        name: the site's name.
        transform: bijection from unconstrained to constrained values (``biject_to`` of the
            support).
        shape: shape of one particle's unconstrained value.
        dtype: its floating-point type.
        device: where it lies.
    """

    name: str
    transform: Any
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Call:
    """What one particle's run of the model left behind, for a space to read.

    Attributes:
        trace: the Pyro trace (sites with ``fn`` and ``value``).
        modules: outputs of the submodules that the space asked for, by path.
    """

    trace: Any
    modules: Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is known about a model before any particle moves; spaces check themselves against it.

    Attributes:
        locate: finds a model argument by name or position and returns it with its name.
        modules: paths of the model's submodules (empty for a plain function).
        trace: the trace of the prototype run.
        latents: the latent sites.
        activation: the shape, dtype and device of what a submodule puts out, by its path.
        scores: whether the transport will ask for scores of the log joint.
    """

    locate: Callable[[int | str], tuple[str, Any]]
    modules: tuple[str, ...]
    trace: Any
    latents: Mapping[str, Latent]
    activation: Callable[[str], Tensor]
    scores: bool = False


@dataclass(frozen=True)
class Subsample:
    """The minibatch that a subsampled plate drew in this step, the same for all particles.

    Attributes:
        indices: the drawn indices.
        size: the plate's full size.
    """

    indices: Int[Tensor, " index"]
    size: int


@dataclass(frozen=True)
class Draw:
    """What is random in an evaluation, the same for all chunks and processes of a step.

    Attributes:
        subsamples: what the subsampled plates drew, by plate.
        seed: what the particles' own random numbers (dropout masks) follow from.
        seeds: seeds of the particles in place of those that follow from it, while a step is traced.
        rows: the rows of the batch at which particles are compared; None for all.
        share: which share of the batch is here, the one thing that differs between processes:
            particles draw other masks in each.
    """

    subsamples: Mapping[str, Subsample]
    seed: int
    seeds: Int[Tensor, " particle"] | None = None
    rows: Int[Tensor, " row"] | None = None
    share: int = 0


@dataclass(frozen=True)
class Evaluation:
    """The model evaluated at all particles of this process.

    Attributes:
        values: unconstrained values, ``(particle, *shape)`` each.
        log_density: full-data log density of the constrained values, ``(particle,)``.
        log_det: log absolute determinant of the transforms' Jacobian, ``(particle,)``.
        captured: what the space captured in each particle's run, with a leading particle axis.
        inputs: model arguments that were given a particle axis, by name.
        subsamples: what the subsampled plates drew, by plate.
        buffers: module buffers after the run, ``(particle, *shape)`` each.
        shared: the unconstrained parameters that the model read, which all particles share.
        representation: the representation of the particles, where it is known already.
    """

    values: Values
    log_density: Float[Tensor, " particle"]
    log_det: Float[Tensor, " particle"]
    captured: Any
    inputs: Mapping[str, Tensor]
    subsamples: Mapping[str, Subsample]
    buffers: Values
    shared: Mapping[str, Tensor]
    representation: Float[Tensor, "particle point feature"] | None = None

    @property
    def log_joint(self) -> Float[Tensor, " particle"]:
        """Log joint density of the unconstrained values, on the full-data scale."""
        return self.log_density + self.log_det
