r"""The two forces on the particles, from one evaluation of the model and one backward pass.

With representation :math:`r` and the transport's velocity :math:`V` in its space, the gradient of

.. math:: -\sum_i \left(\frac1T \log p(D, \theta_i) + \log\lvert\det J\rvert_i\right)
    - \lambda \langle V, r \rangle

by the particles, :math:`V` held fixed, is the negative velocity.

Where a batch is split into :math:`S` shares of the same size, share :math:`s` with the log joint
:math:`\log p_s` (on the scale of the full data) and the representation :math:`r^{(s)}` of its
points, the batch has the log joint :math:`\frac1S \sum_s \log p_s`, the representation
:math:`r = (r^{(1)}, \dots, r^{(S)})` and a velocity with the parts :math:`V^{(s)}`. The gradient is
then the mean over shares of that of

.. math:: -\sum_i \left(\frac1T \log p_s(D, \theta_i) + \log\lvert\det J\rvert_i\right)
    - \lambda S \langle V^{(s)}, r^{(s)} \rangle,

since :math:`\langle V, r \rangle` is a sum over shares and not a mean. Scores of the log likelihood
by :math:`r^{(s)}` count :math:`1 / S` of what the share alone gives. A representation that is not
of the batch is the same in all shares, and needs no factor.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_fordes._checks import StateError
from pyro_fordes._random import preserved_rng, seeded
from pyro_fordes.diagnostics import effective_particles
from pyro_fordes.finite import finite_particles, repel_finite
from pyro_fordes.input_gradients import InputGradients
from pyro_fordes.kernels import Kernel
from pyro_fordes.log_joint import LogJoint
from pyro_fordes.particles import (
    Call,
    Draw,
    Evaluation,
    Gather,
    OneProcess,
    Values,
    ravel,
    unravel,
)
from pyro_fordes.spaces import ScoredSpace, Space, Weights
from pyro_fordes.transports import Repulsion, Transport


@dataclass(frozen=True)
class Rule:
    """Everything that decides a step's velocity beside model, particles and data.

    Attributes:
        space: where particles are compared, prepared for the model.
        kernel: the base kernel.
        transport: the update rule.
        gather: how particles of other processes are seen.
        temperature: T at this step.
        repulsion_scale: factor of the repulsive force at this step.
        every: particles are compared at every so many-th step, and repel so many times as hard.
        num_data: what the velocity is divided by.
        step: the step, for schedules.
        repulsive: whether particles are compared at this step.
        static: whether shapes must not follow from values; see `repel_finite`.
    """

    space: Space
    kernel: Kernel
    transport: Transport
    gather: Gather
    temperature: float | Tensor
    repulsion_scale: float | Tensor
    every: int
    num_data: float
    step: int
    repulsive: bool
    static: bool = False

    @property
    def strength(self) -> float | Tensor:
        """Factor of the repulsive force at a step at which particles are compared."""
        return self.every * self.repulsion_scale


@dataclass(frozen=True)
class Forces:
    """Everything an update needs.

    Attributes:
        evaluation: the model at the particles.
        gradients: negative velocity of each site, ``(particle, *shape)``.
        shared_gradients: gradients of parameters that all particles share.
        diagnostics: what was measured, None if it was not asked for.
        compared: which particles could be compared; None for all.
    """

    evaluation: Evaluation
    gradients: dict[str, Tensor]
    shared_gradients: dict[str, Tensor]
    diagnostics: dict[str, Any] | None
    compared: Bool[Tensor, " particle"] | None = None


@torch.enable_grad()
def compute_forces(
    log_joint: LogJoint,
    particles: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
    rule: Rule,
    *,
    measure: bool,
    chunk_size: int | None = None,
    draw: Draw | None = None,
) -> Forces:
    """Evaluate the model at the particles and differentiate.

    In chunks, no more than one chunk's graph is held at a time. Where particles are compared by
    what the model computes, it takes two rounds: the first keeps representations only, the second
    runs each chunk again (with the same random numbers) and goes back through it.

    Args:
        log_joint: the model's log joint.
        particles: unconstrained values, leaves of autograd.
        buffers: per-particle buffers of the model; not changed.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        rule: space, kernel, transport and scales.
        measure: whether to differentiate the two forces apart (one more backward pass) and
            return diagnostics.
        chunk_size: how many particles are evaluated at a time; None for all.
        draw: random numbers of the step; None draws.

    Raises:
        StateError: in ``torch.inference_mode``.
    """
    check_gradients()
    space, repulsive = rule.space, rule.repulsive
    count = len(next(iter(particles.values())))
    rounds = Rounds(
        log_joint,
        particles,
        buffers,
        args,
        kwargs,
        draw_for(space if repulsive else None, log_joint, args, kwargs) if draw is None else draw,
        space if repulsive else None,
        rule.gather.rows.start or 0,
    )
    chunks = rounds.chunks(chunk_size)
    repulsion = last = None
    if repulsive and not isinstance(space, Weights):
        repulsion, last = _compare(rounds, chunks, rule)
    driving = [_Rows(value) for value in particles.values()]
    repelling = [_Rows(value) for value in particles.values()] if measure and repulsion else []
    shared_gradients: dict[str, Tensor] = {}
    parts: list[Evaluation] = []
    for rows in reversed(chunks):  # the graph of the last one may be there already
        evaluation = last or rounds.evaluate(rows)
        last = None
        drive = -(evaluation.log_density / rule.temperature + evaluation.log_det).sum()
        for name, gradient in _shared_gradients(evaluation, rule.num_data * count).items():
            shared_gradients[name] = shared_gradients.get(name, 0) + gradient
        leaves = list(evaluation.values.values())
        if repulsion is None:
            _put(driving, rows, _gradients(drive, leaves, retain=False))
        else:
            drive, repel = _potentials(rule, repulsion, evaluation, drive, rows)
            if measure:
                _put(driving, rows, _gradients(drive, leaves, retain=True))
                _put(repelling, rows, _gradients(repel, leaves, retain=False))
            else:
                _put(driving, rows, _gradients(drive + repel, leaves, retain=False))
        parts.insert(0, _without_graph(evaluation))
    evaluation = _joined(parts, particles)
    drives = [part.tensor for part in driving]
    repels = [part.tensor for part in repelling]
    seen = None if repulsion is None else _seen(repulsion)
    finite = None if repulsion is None else repulsion.finite
    if rule.gather.shares > 1:
        evaluation, drives, repels = _of_batch(rule.gather, evaluation, drives, repels)
    if repulsive and isinstance(space, Weights):
        drives, repels, seen, finite = _in_weight_space(space, particles, drives, rule, measure)
    gradients = _sum(drives, repels, rule.num_data)
    diagnostics = _measure(rule, evaluation, seen, drives, repels) if measure else None
    named = dict(zip(particles, gradients, strict=True))
    return Forces(evaluation, named, shared_gradients, diagnostics, finite)


@dataclass(frozen=True)
class Rounds:
    """Evaluates chunks of particles, any number of times with the same random numbers.

    Attributes:
        log_joint: the model's log joint.
        particles: unconstrained values.
        buffers: per-particle buffers of the model; not changed.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        draw: the random numbers.
        space: what to capture for; None captures nothing.
        first: index of the first particle among those of all processes.
    """

    log_joint: LogJoint
    particles: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    args: tuple
    kwargs: Mapping[str, Any]
    draw: Draw
    space: Space | None = None
    first: int = 0

    def chunks(self, size: int | None) -> list[slice]:
        """Slices of so many particles; None for all."""
        count = len(next(iter(self.particles.values())))
        size = count if size is None else min(size, count)
        return [slice(i, min(i + size, count)) for i in range(0, count, size)]

    def evaluate(self, rows: slice, *, graph: bool = True) -> Evaluation:
        """Evaluate some particles, with the graph that leads back to their values or without."""
        values = self.particles
        if not graph or rows != self.chunks(None)[0]:
            values = {name: value.detach()[rows] for name, value in values.items()}
        if graph:
            values = {name: value.requires_grad_() for name, value in values.items()}
        return evaluate_in(
            self.space,
            self.log_joint,
            values,
            {name: buffer[rows] for name, buffer in self.buffers.items()},
            self.args,
            self.kwargs,
            draw=self.draw,
            first=self.first + rows.start,
            template=self.particles,
        )


def evaluate_all(
    rounds: Rounds,
    chunk_size: int | None,
    capture: Callable[[Call], Any] | None = None,
    gather: Gather = OneProcess(),
) -> Evaluation:
    """The model at all particles without a graph, a chunk at a time.

    Args:
        rounds: the model and its particles.
        chunk_size: how many particles at a time; None for all.
        capture: function of a particle's `Call` that returns a tree of tensors.
        gather: how processes are joined. The log density is that of the whole batch, what is
            captured is of the share here.
    """
    parts = [
        rounds.log_joint.evaluate(
            {name: value.detach()[rows] for name, value in rounds.particles.items()},
            rounds.args,
            rounds.kwargs,
            capture=capture,
            buffers={name: buffer[rows] for name, buffer in rounds.buffers.items()},
            draw=rounds.draw,
            first=rounds.first + rows.start,
        )
        for rows in rounds.chunks(chunk_size)
    ]
    evaluation = _joined(parts, rounds.particles)
    return replace(evaluation, log_density=gather.mean([evaluation.log_density])[0])


class _Rows:
    """A gradient that is filled chunk by chunk; a single chunk's is taken as it is."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.tensor: Tensor = like

    def put(self, rows: slice, part: Tensor) -> None:
        if len(part) == len(self.like):
            self.tensor = part
            return
        if self.tensor is self.like:
            self.tensor = torch.empty_like(self.like, requires_grad=False)
        self.tensor[rows] = part


def _put(gradients: list[_Rows], rows: slice, parts: list[Tensor]) -> None:
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.put(rows, part)


def _compare(rounds: Rounds, chunks: list[slice], rule: Rule) -> tuple[Repulsion, Evaluation]:
    """What the transport makes of all representations, and the last chunk with its graph."""
    space = rule.space
    representations, scores = [], []
    for rows in chunks:
        last = rows == chunks[-1]
        evaluation = rounds.evaluate(rows, graph=last)
        with torch.enable_grad() if last else torch.no_grad():
            representations.append(space.represent(evaluation))
        if rule.transport.uses_scores:
            scores.append(cast("ScoredSpace", space).scores(evaluation).detach())
    everyone = _at_all_points(rule.gather, space, torch.cat([r.detach() for r in representations]))
    gathered = None
    if scores:
        scale = rule.temperature * rule.gather.shares  # scores are known on the batch only
        gathered = _at_all_points(rule.gather, space, torch.cat(scores) / scale)
    repulsion = repel_finite(
        rule.transport,
        rule.kernel,
        everyone,
        rule.gather.rows,
        rule.step,
        finite=finite_particles(everyone, gathered),
        scores=gathered,
        static=rule.static,
    )
    repulsion = _of_share(repulsion, rule.gather, space)
    return repulsion, replace(evaluation, representation=representations[-1])


def _at_all_points(gather: Gather, space: Space, local: Tensor) -> Tensor:
    """What all particles have at the points of all shares of a batch.

    Args:
        gather: how the processes are joined.
        space: whose representation it is.
        local: of the particles and points here, ``(particle, point, feature)``.
    """
    everyone = gather(local)
    if gather.shares == 1 or space.share_axis is None:
        return everyone
    return gather.beside(everyone, space.share_axis)


def _of_share(repulsion: Repulsion, gather: Gather, space: Space) -> Repulsion:
    """What a transport says of the points here, on a scale for the mean over shares."""
    if gather.shares == 1 or space.share_axis is None:
        return repulsion
    axis = space.share_axis

    def own(part: Tensor) -> Tensor:
        return gather.shares * part.chunk(gather.shares, axis)[gather.share]

    driving = None if repulsion.driving is None else own(repulsion.driving)
    return replace(repulsion, velocity=own(repulsion.velocity), driving=driving)


def _of_batch(
    gather: Gather, evaluation: Evaluation, drives: list[Tensor], repels: list[Tensor]
) -> tuple[Evaluation, list[Tensor], list[Tensor]]:
    """Log density, gradients and buffers of a batch from those of its shares.

    Buffers such as BatchNorm's running statistics are averaged, so that the processes with the same
    particles keep the same.
    """
    averaged = [name for name, one in evaluation.buffers.items() if one.is_floating_point()]
    buffers = [evaluation.buffers[name] for name in averaged]
    log_density, *means = gather.mean([evaluation.log_density, *drives, *repels, *buffers])
    first, second = len(drives), len(drives) + len(repels)
    kept = {**evaluation.buffers, **dict(zip(averaged, means[second:], strict=True))}
    evaluation = replace(evaluation, log_density=log_density, buffers=kept)
    return evaluation, means[:first], means[first:second]


def _potentials(
    rule: Rule, repulsion: Repulsion, evaluation: Evaluation, drive: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """Two numbers whose gradients by a chunk's values are the negative forces."""
    representation = evaluation.representation
    if representation is None:
        representation = rule.space.represent(evaluation)
    if repulsion.driving is not None:
        scores = cast("ScoredSpace", rule.space).scores(evaluation).detach()
        # Its gradient is that part of the likelihood's which is smoothed.
        carried = (scores * representation).sum((1, 2))
        smoothed = (repulsion.driving[rows] * representation).sum()
        drive = _own_part(evaluation, carried, repulsion, rule, rows) - smoothed
    return drive, -rule.strength * (repulsion.velocity[rows] * representation).sum()


def _without_graph(evaluation: Evaluation) -> Evaluation:
    """What is left of an evaluation after the backward pass."""
    return replace(
        evaluation,
        values={},
        log_density=evaluation.log_density.detach(),
        log_det=evaluation.log_det.detach(),
        captured=(),
        inputs={},
        representation=None,
    )


def _joined(parts: list[Evaluation], particles: Values) -> Evaluation:
    """The evaluation of all particles from those of chunks."""
    if len(parts) == 1:
        return replace(parts[0], values=particles)
    return replace(
        parts[0],
        values=particles,
        log_density=torch.cat([part.log_density for part in parts]),
        log_det=torch.cat([part.log_det for part in parts]),
        captured=pytree.tree_map(lambda *t: torch.cat(t), *(part.captured for part in parts)),
        buffers={
            name: torch.cat([part.buffers[name] for part in parts]) for name in parts[0].buffers
        },
        shared={name: tensor for part in parts for name, tensor in part.shared.items()},
    )


def draw_for(
    space: Space | None, log_joint: LogJoint, args: tuple, kwargs: Mapping[str, Any]
) -> Draw:
    """Random numbers of an evaluation, and the rows at which a space compares particles.

    Args:
        space: the space, prepared; None if nothing is compared.
        log_joint: the model's log joint.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
    """
    draw = log_joint.draw(args, kwargs)
    if not isinstance(space, InputGradients) or space.points is None:
        return draw
    return log_joint.with_rows(draw, space.count, space.input, args, kwargs)


def evaluate_in(
    space: Space | None,
    log_joint: LogJoint,
    values: Values,
    buffers: Values,
    args: tuple,
    kwargs: Mapping[str, Any],
    *,
    draw: Draw | None = None,
    first: int = 0,
    template: Values | None = None,
) -> Evaluation:
    """Evaluate the model, and capture what a space compares (None: nothing).

    Args:
        space: the space, prepared.
        log_joint: the model's log joint.
        values: unconstrained values.
        buffers: per-particle buffers of the model; not changed.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        draw: random numbers; None draws.
        first: index of the first of these particles among all.
        template: see ``LogJoint.replay``.
    """
    draw = draw_for(space, log_joint, args, kwargs) if draw is None else draw
    if space is None:
        return log_joint.evaluate(values, args, kwargs, buffers=buffers, draw=draw, first=first)
    # Points that a function draws are the same for all chunks and rounds.
    drawn = callable(getattr(space, "points", None))
    extra = seeded(draw.seed, space.extra) if drawn else space.extra()
    evaluation = log_joint.evaluate(
        values,
        args,
        kwargs,
        capture=space.capture if extra is None else None,
        submodules=space.submodules if extra is None else (),
        input=space.input,
        buffers=buffers,
        draw=draw,
        first=first,
    )
    if extra is None:
        return evaluation
    with preserved_rng():
        torch.manual_seed(draw.seed)
        captured = log_joint.replay(
            values,
            *extra,
            log_joint.prototype(args, kwargs).latents,
            capture=space.capture,
            submodules=space.submodules,
            buffers=buffers,
            template=template,
            # The points are the same for all shares of the batch, and so are masks.
            draws=log_joint.streams(replace(draw, share=0), args, kwargs, first),
        )
    return replace(evaluation, captured=captured)


def _own_part(
    evaluation: Evaluation, carried: Tensor, repulsion: Repulsion, rule: Rule, rows: slice
) -> Tensor:
    """Minus the log joint but for what the transport smooths in another space.

    The prior is not known as a function of the representation, nor is what a likelihood has of
    parameters that are not in it. They act on their particle alone, with the mean weight that the
    kernel gives the particle's likelihood. ``carried`` has the gradient of what is smoothed.
    """
    weight = repulsion.weight[rule.gather.rows][rows].detach()
    own = (evaluation.log_density - carried) / rule.temperature + evaluation.log_det
    return -(weight * own).sum()


def represent_all(
    rounds: Rounds, chunk_size: int | None, gather: Gather = OneProcess()
) -> Float[Tensor, "particle point feature"]:
    """The representation of all particles, detached.

    Args:
        rounds: the model, its particles and the space.
        chunk_size: how many particles at a time; None for all.
        gather: how processes are joined.
    """
    check_gradients()
    space, parts = cast("Space", rounds.space), []
    for rows in rounds.chunks(chunk_size):
        evaluation = rounds.evaluate(rows, graph=False)  # nothing leads back to the particles
        with torch.no_grad():
            parts.append(space.represent(evaluation).detach())
    return _at_all_points(gather, space, torch.cat(parts))


def compute_scores(
    rounds: Rounds, chunk_size: int | None, gather: Gather = OneProcess()
) -> dict[str, Tensor]:
    """Gradient of the log joint by each site's unconstrained values, ``(particle, *shape)``.

    Args:
        rounds: the model and its particles.
        chunk_size: how many particles at a time; None for all.
        gather: how processes are joined.
    """
    check_gradients()
    scores = [_Rows(value) for value in rounds.particles.values()]
    for rows in rounds.chunks(chunk_size):
        evaluation = rounds.evaluate(rows)
        leaves = list(evaluation.values.values())
        _put(scores, rows, _gradients(evaluation.log_joint.sum(), leaves, retain=False))
    means = gather.mean([score.tensor for score in scores])
    return dict(zip(rounds.particles, means, strict=True))


def _in_weight_space(
    space: Weights,
    particles: Values,
    driving: list[Tensor],
    rule: Rule,
    measure: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]:
    """Driving and repulsive gradients where the representation is the particle itself.

    Nothing has to be pulled back, and each group of values has a kernel of its own.
    """
    named = dict(zip(particles, driving, strict=True))
    compared = space.compared(particles)
    rows = ravel({name: value.detach() for name, value in compared.items()}).unsqueeze(1)
    everyone = space.split(rule.gather(rows), particles)
    scores: list[Tensor | None] = [None] * len(everyone)
    finite = None  # the values themselves always are
    if rule.transport.uses_scores:
        gradient = ravel({name: named[name] for name in compared}).unsqueeze(1)
        gathered = rule.gather(-gradient)
        finite = finite_particles(gathered)
        scores = list(space.split(gathered, particles))
    pooled = space.group != "coordinate"
    velocities, smoothed = [], []
    seen = rows.new_zeros(3)
    for block, score in zip(everyone, scores, strict=True):
        # Its kernel goes at the end of the round: those of all coordinates would not fit.
        if finite is None:
            repulsion = rule.transport.repel(
                rule.kernel, block, rule.gather.rows, rule.step, pooled=pooled
            )
        else:
            repulsion = repel_finite(
                rule.transport,
                rule.kernel,
                block,
                rule.gather.rows,
                rule.step,
                finite=finite,
                scores=score,
                pooled=pooled,
                static=rule.static,
            )
        velocities.append(repulsion.velocity)
        if repulsion.driving is not None:
            smoothed.append(repulsion.driving)
        if measure:
            seen += _seen(repulsion)
    repelling = unravel(-rule.strength * space.join(velocities).squeeze(1), compared)
    if smoothed and finite is not None:
        # What could not be smoothed stays as it is, for the report to name its sites.
        own = torch.where(
            finite[rule.gather.rows].reshape(-1, 1, 1), space.join(smoothed), -gradient
        )
        named.update(unravel(-own.squeeze(1), compared))
    return (
        list(named.values()),
        [repelling.get(name, torch.zeros_like(value)) for name, value in named.items()],
        seen,
        None if finite is None else finite[rule.gather.rows],
    )


def _seen(repulsion: Repulsion) -> Float[Tensor, "3"]:
    """What is measured of kernels, in sums: their number, mean of 1 / effective, bandwidth."""
    kernel = repulsion.kernel
    return torch.stack(
        [
            kernel.value.new_full((), len(kernel.value)),
            len(kernel.value) / effective_particles(kernel.mean),
            len(kernel.value) * kernel.bandwidth.mean(),
        ]
    )


def _sum(driving: list[Tensor], repelling: list[Tensor], num_data: float) -> list[Tensor]:
    """Sum of the two forces over ``num_data``."""
    total = [d + r for d, r in zip(driving, repelling, strict=True)] if repelling else driving
    return total if num_data == 1 else [gradient / num_data for gradient in total]


def _shared_gradients(evaluation: Evaluation, divisor: float) -> dict[str, Tensor]:
    """Gradient of the loss, summed and divided, by parameters that all particles share.

    The repulsive force is that of the particles' entropy, which does not depend on them.
    """
    trained = {name: tensor for name, tensor in evaluation.shared.items() if tensor.requires_grad}
    if not trained:
        return {}
    loss = -evaluation.log_joint.sum() / divisor
    gradients = _gradients(loss, list(trained.values()), retain=True)
    return dict(zip(trained, gradients, strict=True))


def check_gradients() -> None:
    """Refuse a mode in which nothing can be differentiated, and all forces would be zero."""
    if torch.is_inference_mode_enabled():
        raise StateError(
            "particles move by gradients, and there are none in torch.inference_mode(); call step, "
            "run, fit, scores and representation outside of it"
        )


def _gradients(total: Tensor, leaves: list[Tensor], *, retain: bool) -> list[Tensor]:
    """Gradient of a scalar by tensors, zero where it does not depend on one."""
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    gradients = torch.autograd.grad(total, leaves, retain_graph=retain, allow_unused=True)
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for gradient, leaf in zip(gradients, leaves, strict=True)
    ]


def _measure(
    rule: Rule,
    evaluation: Evaluation,
    seen: Tensor | None,
    driving: list[Tensor],
    repelling: list[Tensor],
) -> dict[str, Any]:
    """Diagnostics of a step for each particle here, on the device; see `joined_diagnostics`."""
    drive = _norms(driving)
    # On average over steps.
    repel = _norms(repelling) / rule.every if repelling else torch.zeros_like(drive)
    inverse = bandwidth = drive.new_full((), math.nan)
    if seen is not None:
        inverse, bandwidth = seen[1] / seen[0], seen[2] / seen[0]
    return {
        "step": rule.step,
        "log_joint": evaluation.log_joint.detach(),
        "driving_force": drive,
        "repulsive_force": repel,
        "inverse_effective": inverse.expand(len(drive)),
        "bandwidth": bandwidth.expand(len(drive)),
    }


def joined_diagnostics(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Diagnostics of a step from those of all particles."""
    found = dict(measured)
    found["force_ratio"] = found["repulsive_force"].mean() / found["driving_force"].mean()
    # Where a process knows the kernel of its own particles only, this is the mean over processes.
    found["effective_particles"] = 1 / found.pop("inverse_effective").mean()
    found["bandwidth"] = found["bandwidth"].mean()
    return found


def _norms(parts: list[Tensor]) -> Float[Tensor, " particle"]:
    """Euclidean norm of each particle's share of some stacked tensors."""
    return torch.stack([part.reshape(len(part), -1).norm(dim=1) for part in parts]).norm(dim=0)
