r"""The two forces on the particles, from one evaluation of the model and one backward pass.

With representation :math:`r` and the transport's velocity :math:`V` in its space, the gradient of

.. math:: -\sum_i \left(\frac1T \log p(D, \theta_i) + \log\lvert\det J\rvert_i\right)
    - \lambda \langle V, r \rangle

by the particles, :math:`V` held fixed, is the negative velocity.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes.diagnostics import effective_particles
from pyro_fordes.kernels import Kernel
from pyro_fordes.log_joint import LogJoint
from pyro_fordes.particles import Evaluation, Gather, Values, ravel, unravel
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
    """

    space: Space
    kernel: Kernel
    transport: Transport
    gather: Gather
    temperature: float
    repulsion_scale: float
    every: int
    num_data: float
    step: int

    @property
    def strength(self) -> float:
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
    """

    evaluation: Evaluation
    gradients: dict[str, Tensor]
    shared_gradients: dict[str, Tensor]
    diagnostics: dict[str, Any] | None


def compute_forces(
    log_joint: LogJoint,
    particles: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
    rule: Rule,
    *,
    measure: bool,
) -> Forces:
    """Evaluate the model at the particles and differentiate.

    Args:
        log_joint: the model's log joint.
        particles: unconstrained values, leaves of autograd.
        buffers: per-particle buffers of the model; not changed.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        rule: space, kernel, transport and scales.
        measure: whether to differentiate the two forces apart (one more backward pass) and
            return diagnostics.
    """
    space, repulsive = rule.space, rule.transport.repulsive and rule.step % rule.every == 0
    evaluation = evaluate_in(
        space if repulsive else None, log_joint, particles, buffers, args, kwargs
    )
    leaves = list(particles.values())
    drive = -(evaluation.log_density / rule.temperature + evaluation.log_det).sum()
    shared = _shared_gradients(evaluation, rule.num_data)
    if repulsive and isinstance(space, Weights):
        driving, repelling, seen = _in_weight_space(space, evaluation, drive, leaves, rule, measure)
    elif repulsive:
        representation = space.represent(evaluation)
        everyone = rule.gather(representation.detach())
        scores = None
        if rule.transport.uses_scores:
            scored = cast("ScoredSpace", space)
            scores = rule.gather(scored.scores(evaluation) / rule.temperature)
        repulsion = rule.transport.repel(
            rule.kernel, everyone, rule.gather.rows, rule.step, scores=scores
        )
        if repulsion.driving is not None:
            likelihood = cast("ScoredSpace", space).likelihood(evaluation)
            smoothed = (repulsion.driving * representation).sum()
            drive = _own_prior(evaluation, likelihood, repulsion, rule) - smoothed
        repel = -rule.strength * (repulsion.velocity * representation).sum()
        if not measure:
            gradients = _gradients((drive + repel) / rule.num_data, leaves, retain=False)
            named = dict(zip(particles, gradients, strict=True))
            return Forces(evaluation, named, shared, None)
        driving = _gradients(drive, leaves, retain=True)
        repelling = _gradients(repel, leaves, retain=False)
        seen = _seen(repulsion)
    else:
        driving, repelling, seen = _gradients(drive, leaves, retain=False), [], None
    gradients = _sum(driving, repelling, rule.num_data)
    diagnostics = _measure(rule, evaluation, seen, driving, repelling) if measure else None
    return Forces(evaluation, dict(zip(particles, gradients, strict=True)), shared, diagnostics)


def evaluate_in(
    space: Space | None,
    log_joint: LogJoint,
    values: Values,
    buffers: Values,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> Evaluation:
    """Evaluate the model, and capture what a space compares (None: nothing).

    Args:
        space: the space, prepared.
        log_joint: the model's log joint.
        values: unconstrained values.
        buffers: per-particle buffers of the model; not changed.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
    """
    if space is None:
        return log_joint.evaluate(values, args, kwargs, buffers=buffers)
    extra = space.extra()
    evaluation = log_joint.evaluate(
        values,
        args,
        kwargs,
        capture=space.capture if extra is None else None,
        submodules=space.submodules if extra is None else (),
        input=space.input,
        buffers=buffers,
    )
    if extra is None:
        return evaluation
    captured = log_joint.replay(
        values,
        *extra,
        log_joint.prototype(args, kwargs).latents,
        capture=space.capture,
        submodules=space.submodules,
        buffers=buffers,
    )
    return replace(evaluation, captured=captured)


def _own_prior(
    evaluation: Evaluation, likelihood: Tensor, repulsion: Repulsion, rule: Rule
) -> Tensor:
    """Minus the log prior, where the transport smooths the likelihood in another space.

    The prior is not known as a function of the representation. It acts on its particle alone, with
    the mean weight that the kernel gives the particle's likelihood.
    """
    weight = repulsion.kernel.mean.mean(0)[rule.gather.rows].detach()
    prior = (evaluation.log_density - likelihood) / rule.temperature + evaluation.log_det
    return -(weight * prior).sum()


def compute_scores(evaluation: Evaluation) -> dict[str, Tensor]:
    """Gradient of the log joint by each site's unconstrained values, ``(particle, *shape)``."""
    leaves = list(evaluation.values.values())
    gradients = _gradients(evaluation.log_joint.sum(), leaves, retain=False)
    return dict(zip(evaluation.values, gradients, strict=True))


def _in_weight_space(
    space: Weights,
    evaluation: Evaluation,
    drive: Tensor,
    leaves: list[Tensor],
    rule: Rule,
    measure: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Driving and repulsive gradients where the representation is the particle itself.

    Nothing has to be pulled back, and each group of values has a kernel of its own.
    """
    driving = _gradients(drive, leaves, retain=False)
    named = dict(zip(evaluation.values, driving, strict=True))
    compared = space.compared(evaluation.values)
    rows = ravel({name: value.detach() for name, value in compared.items()}).unsqueeze(1)
    everyone = space.split(rule.gather(rows), evaluation.values)
    scores: list[Tensor | None] = [None] * len(everyone)
    if rule.transport.uses_scores:
        gradient = ravel({name: named[name] for name in compared}).unsqueeze(1)
        scores = list(space.split(rule.gather(-gradient), evaluation.values))
    pooled = space.group != "coordinate"
    velocities, smoothed = [], []
    seen = rows.new_zeros(3)
    for block, score in zip(everyone, scores, strict=True):
        # Its kernel goes at the end of the round: those of all coordinates would not fit.
        repulsion = rule.transport.repel(
            rule.kernel, block, rule.gather.rows, rule.step, scores=score, pooled=pooled
        )
        velocities.append(repulsion.velocity)
        if repulsion.driving is not None:
            smoothed.append(repulsion.driving)
        if measure:
            seen += _seen(repulsion)
    repelling = unravel(-rule.strength * space.join(velocities).squeeze(1), compared)
    if smoothed:
        named.update(unravel(-space.join(smoothed).squeeze(1), compared))
    return (
        list(named.values()),
        [repelling.get(name, torch.zeros_like(value)) for name, value in named.items()],
        seen,
    )


def _seen(repulsion: Repulsion) -> Float[Tensor, "3"]:
    """What is measured of kernels, in sums: their number, mean of 1 / effective, bandwidth."""
    kernel = repulsion.kernel
    return torch.stack(
        [
            kernel.value.new_tensor(len(kernel.value)),
            len(kernel.value) / effective_particles(kernel.mean),
            len(kernel.value) * kernel.bandwidth.mean(),
        ]
    )


def _sum(driving: list[Tensor], repelling: list[Tensor], num_data: float) -> list[Tensor]:
    """Sum of the two forces over ``num_data``."""
    total = [d + r for d, r in zip(driving, repelling, strict=True)] if repelling else driving
    return total if num_data == 1 else [gradient / num_data for gradient in total]


def _shared_gradients(evaluation: Evaluation, num_data: float) -> dict[str, Tensor]:
    """Gradient of the mean loss by parameters that all particles share.

    The repulsive force is that of the particles' entropy, which does not depend on them.
    """
    trained = {name: tensor for name, tensor in evaluation.shared.items() if tensor.requires_grad}
    if not trained:
        return {}
    loss = -evaluation.log_joint.mean() / num_data
    gradients = _gradients(loss, list(trained.values()), retain=True)
    return dict(zip(trained, gradients, strict=True))


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
    """Diagnostics of a step, on the device."""
    drive = _norms(driving)
    # On average over steps.
    repel = _norms(repelling) / rule.every if repelling else torch.zeros_like(drive)
    effective = bandwidth = drive.new_tensor(math.nan)
    if seen is not None:
        number, inverse, width = seen
        effective, bandwidth = number / inverse, width / number
    return {
        "step": rule.step,
        "log_joint": evaluation.log_joint.detach(),
        "driving_force": drive,
        "repulsive_force": repel,
        "force_ratio": repel.mean() / drive.mean(),
        "effective_particles": effective,
        "bandwidth": bandwidth,
    }


def _norms(parts: list[Tensor]) -> Float[Tensor, " particle"]:
    """Euclidean norm of each particle's share of some stacked tensors."""
    return torch.stack([part.reshape(len(part), -1).norm(dim=1) for part in parts]).norm(dim=0)
