"""One update of a `ParticleInference`: forces, the optimiser's step, and what may go wrong."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_fordes._checks import NumericalError
from pyro_fordes._random import preserved_rng
from pyro_fordes.forces import Forces, Rule, compute_forces
from pyro_fordes.particles import Call, at_step


def check_start(inference: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Evaluate the initial particles and refuse to start if something is not finite."""
    _check_finite(inference, forces_of(inference, args, kwargs, measure=False), args, kwargs)


def _culprits(inference: Any, args: tuple, kwargs: Mapping[str, Any], particle: int) -> str:
    """Sites whose log probability is not finite for a particle, for a message."""

    def capture(call: Call) -> dict[str, Tensor]:
        call.trace.compute_log_prob()
        return {
            name: torch.as_tensor(site["log_prob_sum"])
            for name, site in call.trace.nodes.items()
            if site["type"] == "sample"
        }

    with torch.no_grad(), preserved_rng():
        evaluation = inference._log_joint.evaluate(
            inference._particles, args, kwargs, capture=capture, buffers=inference._buffers
        )
    names = [name for name, value in evaluation.captured.items() if not value[particle].isfinite()]
    return f" (not finite at site {', '.join(map(repr, names))})" if names else ""


def forces_of(inference: Any, args: tuple, kwargs: Mapping[str, Any], measure: bool) -> Forces:
    """Evaluate the model and differentiate: the negative velocity of every site."""
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
    )
    compute = compute_forces if inference._compiled is None else inference._compiled
    return compute(
        inference._log_joint,
        inference._particles,
        inference._buffers,
        args,
        kwargs,
        rule,
        measure=measure,
        chunk_size=inference.chunk_size,
    )


def update(inference: Any, args: tuple, kwargs: Mapping[str, Any]) -> Float[Tensor, ""]:
    """One update; returns the loss before it, on the particles' device."""
    inference.setup(*args, **kwargs)
    # The first step with a repulsion after each so many.
    repels = inference._step % inference.repulsion_every == 0
    measure = repels and inference._step % inference.diagnostics_every < inference.repulsion_every
    with inference._random.active():
        forces = forces_of(inference, args, kwargs, measure)
    log_joint = forces.evaluation.log_joint.detach()
    # On a CPU the check is cheap; on other devices it would wait for the device.
    if log_joint.device.type == "cpu":
        _check_finite(inference, forces, args, kwargs)
    shared = {name: forces.evaluation.shared[name] for name in forces.shared_gradients}
    inference._shared.update(shared)
    parameters = {**inference._particles, **shared}
    gradients = {**forces.gradients, **forces.shared_gradients}
    for name, tensor in parameters.items():
        tensor.grad = gradients[name]
    before = _copy(inference, parameters)
    try:
        with inference._random.active():  # an optimiser may draw noise
            inference._stepper.step(parameters)
    except BaseException:
        # An optimiser may fail (or be interrupted) after it has moved some of the tensors.
        with torch.no_grad():
            for name, tensor in parameters.items():
                tensor.copy_(before[name])
        raise
    finally:
        for tensor in parameters.values():
            tensor.grad = None
    inference._buffers = dict(forces.evaluation.buffers)
    if forces.diagnostics is not None:
        inference._diagnostics = forces.diagnostics
    inference._step += 1
    loss = -log_joint.mean()
    inference._losses.add(loss)
    return loss


def _copy(inference: Any, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, in memory that is kept: getting it anew costs more than the copy."""
    with torch.no_grad():
        for name, tensor in parameters.items():
            kept = inference._before.get(name)
            if kept is None or kept.shape != tensor.shape or kept.device != tensor.device:
                inference._before[name] = tensor.detach().clone()
            else:
                kept.copy_(tensor)
    return inference._before


def _check_finite(inference: Any, forces: Forces, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse an update that would make a particle useless, before it is made."""
    start = "at the start" if inference._step == 0 else f"at step {inference._step}"
    log_joint = forces.evaluation.log_joint
    if not log_joint.isfinite().all():
        particle = int((~log_joint.isfinite()).nonzero()[0])
        raise NumericalError(
            f"{start} the log joint of particle {particle} is {log_joint[particle].item()}"
            f"{_culprits(inference, args, kwargs, particle)}; the particles were left as they are. "
            f"Check the data for NaN, lower the learning rate, or start elsewhere with "
            f"init_loc_fn"
        )
    named = {**forces.gradients, **forces.shared_gradients}
    # One sum tells, since NaN and infinity survive it.
    if not torch.stack([gradient.sum() for gradient in named.values()]).sum().isfinite():
        sites = [name for name, gradient in named.items() if not gradient.isfinite().all()]
        raise NumericalError(
            f"{start} the force on {', '.join(map(repr, sites)) or 'all sites together'} is "
            f"not finite, though the log joint is; the particles were left as they are. Check "
            f"the model's gradients there, or lower the learning rate"
        )
