"""Numbers that are not finite: found per particle, and what is said and done about them.

On a CPU a step knows at once whether all is well. On other devices asking would wait for the
device, so what is found stays there, and `Faults.read` brings it to the host when something else
waits anyway.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pyro_fordes._checks import ArgumentError, NumericalError
from pyro_fordes.particles import Gather, OneProcess
from pyro_fordes.rollback import like, own_rows

POLICIES = ("raise", "skip", "reset")

Cause = tuple[str, str | None]
"""What is not finite, and at which site."""


def finite_rows(tensors: Iterable[Tensor]) -> Bool[Tensor, "tensor particle"]:
    """Whether each particle's share of each tensor is finite.

    One sum tells, since NaN and infinity survive it.

    Example:
        >>> finite_rows([torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])])
        tensor([[ True, False]])
    """
    sums = []
    for tensor in tensors:
        # In half precision a sum of finite numbers overflows.
        dtype = torch.float32 if tensor.dtype.itemsize < 4 else None
        sums.append(tensor.detach().reshape(len(tensor), -1).sum(1, dtype=dtype))
    return torch.stack(sums).isfinite()


def clipped(gradients: Mapping[str, Tensor], norm: float | None) -> dict[str, Tensor]:
    """Gradients of which no particle's norm, over all sites, is above a bound.

    Args:
        gradients: ``(particle, *shape)`` each.
        norm: the bound; None leaves them as they are.

    Example:
        >>> clipped({"a": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}, 1.0)["a"]
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    if norm is None or not gradients:
        return dict(gradients)
    rows = [gradient.reshape(len(gradient), -1) for gradient in gradients.values()]
    norms = torch.stack([row.norm(dim=1) for row in rows]).norm(dim=0)
    factor = (norm / norms).clamp(max=1.0)
    return {name: gradient * like(factor, gradient) for name, gradient in gradients.items()}


@dataclass(frozen=True)
class Broken:
    """What is not finite in a step.

    Attributes:
        causes: what each row is about.
        particles: whether it is so for each particle.
        shared_causes: the same for parameters that all particles share.
        shared: whether it is so.
    """

    causes: tuple[Cause, ...]
    particles: Bool[Tensor, "cause particle"]
    shared_causes: tuple[Cause, ...]
    shared: Bool[Tensor, " shared_cause"]

    @property
    def rows(self) -> Bool[Tensor, " particle"]:
        """Particles of which something is not finite."""
        return self.particles.any(0)

    @property
    def any(self) -> Bool[Tensor, ""]:
        """Whether there is anything."""
        return self.particles.any() | self.shared.any()

    def of_shared(self, name: str) -> Bool[Tensor, ""]:
        """Whether something about a shared parameter is not finite."""
        rows = [row for row, (_, site) in enumerate(self.shared_causes) if site == name]
        return torch.stack([self.shared[row] for row in rows]).any()

    def joined(self, other: "Broken") -> "Broken":
        """Both."""
        return Broken(
            self.causes + other.causes,
            torch.cat([self.particles, other.particles]),
            self.shared_causes + other.shared_causes,
            torch.cat([self.shared, other.shared]),
        )


def broken_forces(
    log_joint: Float[Tensor, " particle"],
    compared: Bool[Tensor, " particle"] | None,
    gradients: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
) -> Broken:
    """What of a step's forces is not finite.

    Args:
        log_joint: of each particle.
        compared: whether each particle's representation is finite; None if all are.
        gradients: of each site, ``(particle, *shape)``.
        shared: gradients of parameters that all particles share.
    """
    fine = log_joint.detach().isfinite()
    pair = torch.stack([fine, torch.ones_like(fine) if compared is None else compared])
    causes: tuple[Cause, ...] = (("log joint", None), ("representation", None))
    causes += tuple(("force", name) for name in gradients)
    broken = ~torch.cat([pair, finite_rows(gradients.values())])
    return Broken(causes, broken, *_of_shared("force", shared, fine))


def of_all(
    gather: Gather, log_joint: Float[Tensor, " local"], broken: Broken, measured: dict[str, Any]
) -> tuple[Float[Tensor, " particle"], Broken, dict[str, Any]]:
    """The same of the particles of all processes, in one message.

    Args:
        gather: how the processes are joined.
        log_joint: of each particle here.
        broken: what is not finite of them; what is shared is the same in all processes.
        measured: diagnostics; tensors with one number per particle are joined, too.
    """
    if isinstance(gather, OneProcess):
        return log_joint, broken, measured
    names = [name for name, value in measured.items() if _per_particle(value, len(log_joint))]
    columns = [log_joint, *broken.particles, *(measured[name] for name in names)]
    rows = gather(torch.stack([column.to(torch.float64) for column in columns], dim=1))
    joint, *rest = rows.unbind(1)
    number = len(broken.particles)
    particles = torch.stack(rest[:number]).bool()
    everyone = {
        name: column.to(measured[name].dtype)
        for name, column in zip(names, rest[number:], strict=True)
    }
    return (
        joint.to(log_joint.dtype),
        replace(broken, particles=particles),
        {**measured, **everyone},
    )


def _per_particle(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.shape == (count,)


def broken_values(values: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Broken:
    """Which values are not finite after a step of the optimiser; see `broken_forces`."""
    broken = ~finite_rows(values.values())
    causes = tuple(("value", name) for name in values)
    return Broken(causes, broken, *_of_shared("value", shared, broken))


def broken_states(
    values: Mapping[str, Tensor], optimizers: Iterable[torch.optim.Optimizer]
) -> Broken:
    """Particles of which an optimiser's state is not finite, so that its step would spoil them.

    Args:
        values: of the particles.
        optimizers: theirs.
    """
    count = len(next(iter(values.values())))
    kept: dict[str, list[Tensor]] = {name: [] for name in values}
    for one in optimizers:
        for name, tensor in values.items():
            entries = one.state.get(tensor, {}).values()
            kept[name] += [e for e in entries if isinstance(e, Tensor) and own_rows(e, count)]
    rows = {name: finite_rows(entries).all(0) for name, entries in kept.items() if entries}
    if not rows:
        empty = torch.zeros(0, count, dtype=torch.bool)
        return Broken((), empty, (), torch.zeros(0, dtype=torch.bool))
    causes = tuple(("value", name) for name in rows)
    return Broken(causes, ~torch.stack(list(rows.values())), (), torch.zeros(0, dtype=torch.bool))


def _of_shared(
    what: str, shared: Mapping[str, Tensor], near: Tensor
) -> tuple[tuple[Cause, ...], Tensor]:
    if not shared:
        return (), torch.zeros(0, dtype=torch.bool, device=near.device)
    fine = torch.cat([finite_rows([tensor.reshape(1, -1)])[0] for tensor in shared.values()])
    return tuple((what, name) for name in shared), ~fine


@dataclass(frozen=True)
class Actions:
    """What `Faults.read` needs of an inference.

    Attributes:
        culprits: sites whose log probability is not finite for a particle.
        redraw: draws some particles again; returns whether there were others to draw from.
        rewind: sets the step back to that of the fault, after which nothing moved.
    """

    culprits: Callable[[int], Sequence[str]]
    redraw: Callable[[list[int], int], bool]
    rewind: Callable[[int], None]


@dataclass(frozen=True)
class _Record:
    """The step at which each cause came first (-1: never) since it was last read."""

    causes: tuple[Cause, ...]
    particles: Tensor
    shared_causes: tuple[Cause, ...]
    shared: Tensor
    log_joint: Tensor

    @property
    def any(self) -> Tensor:
        return (self.particles >= 0).any() | (self.shared >= 0).any()


class Faults:
    """What was not finite in the steps of an inference.

    Args:
        policy: ``"raise"``, ``"skip"`` or ``"reset"``.
        num_particles: number of particles.
    """

    def __init__(self, policy: str, num_particles: int) -> None:
        self.policy = policy
        self.count = torch.zeros(num_particles, dtype=torch.int64)
        self.deferred: bool | None = None  # None leaves it to the device
        self._record: _Record | None = None
        self._warned = False

    def check_split(self, split: bool) -> None:
        """Refuse a policy that needs the other particles, if these are in several processes."""
        if split and self.policy == "reset":
            raise ArgumentError(
                "nan='reset' draws a particle again near one of the others, whose values stay in "
                "their own process; use nan='skip' or nan='raise' with several processes"
            )

    def waits(self, device: torch.device) -> bool:
        """Whether what is found stays on the device till it is read."""
        return device.type != "cpu" if self.deferred is None else self.deferred

    def fits(self, broken: Broken) -> bool:
        """Whether the causes are those of what is not read yet."""
        record = self._record
        return record is None or (
            record.causes == broken.causes and record.shared_causes == broken.shared_causes
        )

    def note(self, broken: Broken, log_joint: Tensor, step: int) -> Bool[Tensor, ""]:
        """Remember what a step has found, on the device.

        Args:
            broken: what was found; its causes must fit.
            log_joint: of each particle.
            step: the step.

        Returns:
            Whether there is anything that was not read yet.
        """
        old = self._record
        if old is None:
            never = torch.full_like(broken.particles, -1, dtype=torch.int64)
            shared = torch.full_like(broken.shared, -1, dtype=torch.int64)
            old = _Record(broken.causes, never, broken.shared_causes, shared, log_joint)
        new = broken.particles & (old.particles < 0)
        self._record = _Record(
            old.causes,
            torch.where(new, step, old.particles),
            old.shared_causes,
            torch.where(broken.shared & (old.shared < 0), step, old.shared),
            torch.where(new[0], log_joint, old.log_joint),
        )
        self.count = self.count.to(broken.particles.device) + broken.rows
        return self._record.any

    def read(self, actions: Actions) -> None:
        """Bring what was found to the host, and act on it as the policy says.

        Args:
            actions: what the inference can do.

        Raises:
            NumericalError: under ``"raise"``, if something was found.
        """
        record, self._record = self._record, None
        if record is None or not record.any:
            return
        first, shared = record.particles.cpu(), record.shared.cpu()
        record = _Record(record.causes, first, record.shared_causes, shared, record.log_joint)
        found = torch.cat([first.flatten(), shared])
        step = int(found[found >= 0].min())
        what, hint = _describe(record, step, actions.culprits)
        if self.policy == "raise":
            actions.rewind(step)
            error = NumericalError(f"{what}; the particles were left as they are. {hint}")
            error.everywhere = True  # all processes see what was found in any
            raise error
        particles = (first >= 0).any(0).nonzero().flatten().tolist()
        done = f"particles {particles} were left as they are"
        if self.policy == "reset" and particles and actions.redraw(particles, step):
            done = f"particles {particles} were drawn again near others"
        self._warn(f"{what}; {done if particles else 'it was left as it is'}", hint)

    def refused(self, error: NumericalError, step: int) -> None:
        """Count a step at which the model could not be run, so that no particle moved."""
        self.count = self.count + 1
        self._warn(f"at step {step} no particle moved: {error}", "Check the data for NaN")

    def _warn(self, what: str, hint: str) -> None:
        """Say it, if it is the first time."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{what} (nan={self.policy!r}). {hint}. This is said once; "
                f"diagnostics()['faults'] counts further ones",
                stacklevel=6,
            )


def _describe(
    record: _Record, step: int, culprits: Callable[[int], Sequence[str]]
) -> tuple[str, str]:
    """What was found first, and what to do about it."""
    start = "at the start" if step == 0 else f"at step {step}"
    lower = "lower the learning rate"
    at = record.particles == step
    if not at.any():
        kind, site = record.shared_causes[int((record.shared == step).nonzero()[0])]
        whose = f"{'force on' if kind == 'force' else 'new value of'} {site!r}"
        return (
            f"{start} the {whose}, which all particles share, is not finite",
            f"Check the model's gradients there, or {lower}",
        )
    row = int(at.any(1).nonzero()[0])
    kind = record.causes[row][0]
    particle, *others = at[row].nonzero().flatten().tolist()
    whose = f"of particle {particle}"
    also = f", and that of particles {others}" if others else ""
    if kind == "log joint":
        guilty = ", ".join(map(repr, culprits(particle)))
        return (
            f"{start} the log joint {whose} is {record.log_joint[particle].item()}"
            f"{f' (not finite at site {guilty})' if guilty else ''}{also}",
            f"Check the data for NaN, {lower}, or start elsewhere with init_loc_fn",
        )
    forces = at[[kind == "force" for kind, _ in record.causes], particle]
    if kind == "representation" and not forces.any():
        return (
            f"{start} what the kernel compares {whose} is not finite, though the log joint is"
            f"{also}",
            f"Check the gradients of what the space names, or {lower}",
        )
    kind = "force" if kind == "representation" else kind
    sites = [
        repr(site)
        for (other, site), here in zip(record.causes, at[:, particle], strict=True)
        if other == kind and here
    ]
    if kind == "force":
        return (
            f"{start} the force on {', '.join(sites)} {whose} is not finite, though the log joint "
            f"is{also}",
            f"Check the model's gradients there, or {lower}",
        )
    return (
        f"{start} the optimiser's step made {', '.join(sites)} {whose} not finite, though the "
        f"force is{also}",
        f"Its state may be damaged there, or it overflows: {lower}",
    )
