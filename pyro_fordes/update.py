"""One update of a `ParticleInference`: forces, the optimiser's step, and what may go wrong."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import NumericalError
from pyro_fordes._random import RandomStream
from pyro_fordes.faults import (
    Actions,
    Broken,
    Faults,
    broken_forces,
    broken_states,
    broken_values,
    clipped,
    of_all,
)
from pyro_fordes.forces import (
    Forces,
    Rule,
    check_gradients,
    compute_forces,
    joined_diagnostics,
)
from pyro_fordes.particles import Call, OneProcess, at_step, count_of
from pyro_fordes.randomness import Noise
from pyro_fordes.rollback import like, redraw

# Packages whose optimisers follow from gradients alone.
_NOISELESS = ("torch.optim.", "pyro.optim.")


def check_start(inference: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Evaluate the initial particles and refuse to start if something is not finite.

    Whatever the policy is: one that goes on is for runs that were well once.
    """
    forces = forces_of(inference, args, kwargs, measure=False)
    log_joint = forces.evaluation.log_joint
    faults = Faults("raise", inference.num_particles)
    broken = broken_forces(log_joint, forces.compared, forces.gradients, forces.shared_gradients)
    log_joint, broken, _ = of_all(inference._gather, log_joint, broken, {})
    faults.note(broken, log_joint, inference._step)
    faults.read(_actions(inference, args, kwargs))


def update(inference: Any, args: tuple, kwargs: Mapping[str, Any]) -> Float[Tensor, ""]:
    """One update; returns the loss before it, on the particles' device."""
    with inference._together(f"step {inference._step}", args, kwargs):
        check_gradients()
        inference.setup(*args, **kwargs)
        place = inference._random.place
        try:
            loss = _move(inference, args, kwargs)
        except BaseException:
            inference._random.place = place  # as if the step had not been tried
            raise
    inference._step += 1
    inference._losses.add(loss)
    if inference._faults.waits(loss.device):
        inference._last = args, kwargs
        if inference._step % inference.diagnostics_every == 0:
            read_faults(inference)
    return loss


def _move(inference: Any, args: tuple, kwargs: Mapping[str, Any]) -> Float[Tensor, ""]:
    """Forces, and the optimiser's step of all that is finite."""
    # The first step with a repulsion after each so many.
    repels = inference._step % inference.repulsion_every == 0
    measure = repels and inference._step % inference.diagnostics_every < inference.repulsion_every
    place = inference._random.place
    faults = inference._faults
    try:
        with inference._random.active():
            forces = forces_of(inference, args, kwargs, measure)
    except NumericalError as error:
        # The model cannot even be run: NaN in a batch of a new shape, or outside a support.
        if faults.policy == "raise" or inference._gather.shares > 1:
            raise  # others may have had no trouble with their share, and would wait for this one
        faults.refused(error, inference._step)
        like_one = next(iter(inference._particles.values()))
        return like_one.new_full((), math.nan)
    log_joint = forces.evaluation.log_joint.detach()
    gradients = clipped(forces.gradients, inference.clip_norm)
    shared_gradients = _clipped_together(forces.shared_gradients, inference.clip_norm)
    broken = broken_forces(log_joint, forces.compared, gradients, shared_gradients)
    waits = faults.waits(log_joint.device)
    gather = inference._gather
    alone = isinstance(gather, OneProcess)  # else faults elsewhere are known at the end of the step
    # chunk_size is for little memory: then nothing is copied, and what an optimiser would spoil is
    # looked for before it moves.
    spare = inference.chunk_size is not None and alone and not waits and faults.policy == "raise"
    if spare:
        own = inference._stepper.optimizers(inference._particles)
        broken = broken.joined(broken_states(inference._particles, own))
    fault = waits or bool(broken.any)
    if alone and fault and not waits and (faults.policy == "raise" or bool(broken.rows.all())):
        # Nothing has moved yet, and nothing will.
        _tell(inference, broken, log_joint, args, kwargs, place)
        return -log_joint.mean()
    shared = {name: forces.evaluation.shared[name] for name in shared_gradients}
    inference._shared.update(shared)
    parameters = {**inference._particles, **shared}
    if fault:
        gradients = {
            name: torch.where(like(broken.rows, gradient), 0.0, gradient)
            for name, gradient in gradients.items()
        }
        shared_gradients = {
            name: torch.where(broken.of_shared(name), 0.0, gradient)
            for name, gradient in shared_gradients.items()
        }
    for name, gradient in {**gradients, **shared_gradients}.items():
        parameters[name].grad = gradient
    stepper, before = inference._stepper, inference._before
    if not spare:
        before.take(parameters, stepper.optimizers(parameters))
    try:
        with inference._random.active(), _noise_of(inference, stepper.optimizers(parameters)):
            stepper.step(parameters)
        broken = broken.joined(broken_values(inference._particles, shared))
        measured = forces.diagnostics or {}
        log_joint, broken, measured = of_all(gather, log_joint, broken, measured)
        fault = waits or bool(broken.any)
        if spare and fault:
            raise NumericalError(
                f"at step {inference._step} the optimiser moved a particle to a place that is not "
                f"finite, and with chunk_size no copy is kept to go back to; load the last "
                f"checkpoint, and lower the learning rate"
            )
    except BaseException:
        # An optimiser may fail (or be interrupted) after it has moved some of the tensors.
        if not spare:
            before.restore(parameters, stepper.optimizers(parameters))
        raise
    finally:
        for tensor in parameters.values():
            tensor.grad = None
    if not waits and fault and (faults.policy == "raise" or bool(broken.rows.all())):
        before.restore(parameters, stepper.optimizers(parameters))
        _tell(inference, broken, log_joint, args, kwargs, place)
        return _mean_loss(log_joint, broken)
    buffers = dict(forces.evaluation.buffers)
    if fault:
        rows = broken.rows
        whole = {name: broken.of_shared(name) for name in shared}
        if waits:
            if not faults.fits(broken):
                read_faults(inference)
            halted = faults.note(broken, log_joint, inference._step) & (faults.policy == "raise")
            rows, whole = rows | halted, {name: one | halted for name, one in whole.items()}
        rows = rows[gather.rows]
        before.restore_broken(parameters, rows, whole)
        buffers = {
            name: torch.where(like(rows, buffer), inference._buffers[name], buffer)
            for name, buffer in buffers.items()
        }
    inference._buffers = buffers
    if forces.diagnostics is not None:
        inference._diagnostics = joined_diagnostics(measured)
    if fault and not waits:
        _tell(inference, broken, log_joint, args, kwargs, place)
    return _mean_loss(log_joint, broken) if fault else -log_joint.mean()


def _noise_of(
    inference: Any, optimizers: Sequence[torch.optim.Optimizer]
) -> AbstractContextManager[Any]:
    """What optimisers that may draw noise step in: those that torch and Pyro come with draw none.

    Before the first step there is none yet, and nothing is known.
    """
    if optimizers and all(type(one).__module__.startswith(_NOISELESS) for one in optimizers):
        return nullcontext()
    return Noise(inference._particles.values(), inference._gather.rows.start or 0)


def _mean_loss(log_joint: Tensor, broken: Broken) -> Float[Tensor, ""]:
    """Mean over the particles whose log joint is finite, if there is any."""
    fine = ~broken.particles[0]
    some = -torch.where(fine, log_joint, 0.0).sum() / fine.sum()
    return torch.where(fine.all(), -log_joint.mean(), some)


def _clipped_together(gradients: Mapping[str, Tensor], norm: float | None) -> dict[str, Tensor]:
    """Gradients of shared parameters, their joint norm bounded."""
    rows = clipped({name: one.unsqueeze(0) for name, one in gradients.items()}, norm)
    return {name: one[0] for name, one in rows.items()}


def _tell(
    inference: Any,
    broken: Broken,
    log_joint: Tensor,
    args: tuple,
    kwargs: Mapping[str, Any],
    place: Any,
) -> None:
    """Report a fault at once, and do what the policy says."""
    faults = inference._faults
    if not faults.fits(broken):  # left by a state that was never read
        faults.read(_actions(inference, args, kwargs))
    faults.note(broken, log_joint, inference._step)
    faults.read(_actions(inference, args, kwargs, place))


def read_faults(inference: Any) -> None:
    """Bring faults that are still on the device to the host; see `Faults.read`."""
    args, kwargs = inference._last or ((), {})
    inference._faults.read(_actions(inference, args, kwargs))


def _actions(inference: Any, args: tuple, kwargs: Mapping[str, Any], place: Any = None) -> Actions:
    """What an inference can do about faults."""

    def again(broken: list[int], step: int) -> bool:
        parameters = {**inference._particles, **inference._shared}
        return redraw(
            inference._particles,
            inference._stepper.optimizers(parameters),
            inference._buffers,
            broken,
            (inference._seed * 1_000_003 + step) % 2**63,
        )

    def rewind(step: int) -> None:
        inference._step = step

    return Actions(
        lambda particle: _culprits(inference, args, kwargs, particle, place), again, rewind
    )


def _culprits(
    inference: Any, args: tuple, kwargs: Mapping[str, Any], particle: int, place: Any
) -> list[str]:
    """Sites whose log probability is not finite for a particle, with the step's random numbers."""

    def capture(call: Call) -> dict[str, Tensor]:
        call.trace.compute_log_prob()
        return {
            name: torch.as_tensor(site["log_prob_sum"])
            for name, site in call.trace.nodes.items()
            if site["type"] == "sample"
        }

    here = range(inference.num_particles)[inference._gather.rows]
    if particle not in here:
        return []
    stream = RandomStream(inference._seed)
    stream.place = inference._random.place if place is None else place
    with torch.no_grad(), stream.active():
        evaluation = inference._log_joint.evaluate(
            inference._particles,
            args,
            kwargs,
            capture=capture,
            buffers=inference._buffers,
            first=here[0],
        )
    found = evaluation.captured.items()
    return [name for name, value in found if not value[particle - here[0]].isfinite()]


def forces_of(inference: Any, args: tuple, kwargs: Mapping[str, Any], measure: bool) -> Forces:
    """Evaluate the model and differentiate: the negative velocity of every site."""
    device = next(iter(inference._particles.values())).device
    rule = Rule(
        space=inference._space,
        kernel=inference.kernel,
        transport=inference.transport,
        gather=inference._gather,
        temperature=at_step("temperature", inference.temperature, inference._step, exclusive=True),
        repulsion_scale=at_step("repulsion_scale", inference.repulsion_scale, inference._step),
        every=inference.repulsion_every,
        num_data=1.0 if inference.num_data is None else float(inference.num_data),
        step=inference._step,
        repulsive=(
            inference.transport.repulsive and inference._step % inference.repulsion_every == 0
        ),
        static=(inference._faults.waits(device) or not isinstance(inference._gather, OneProcess)),
    )
    compute = compute_forces if inference._compiled is None else inference._compiled
    forces = compute(
        inference._log_joint,
        inference._particles,
        inference._buffers,
        args,
        kwargs,
        rule,
        measure=measure,
        chunk_size=inference.chunk_size,
    )
    gather = inference._gather
    share = count_of(gather.rows, inference.num_particles) / inference.num_particles / gather.shares
    means = {name: share * one for name, one in forces.shared_gradients.items()}
    return replace(forces, shared_gradients=gather.total(means))
