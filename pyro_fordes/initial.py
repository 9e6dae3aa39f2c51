"""Where particles start."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_fordes._checks import ModelError
from pyro_fordes._random import preserved_rng
from pyro_fordes.bnn import FromNetwork, take_buffers
from pyro_fordes.log_joint import LogJoint
from pyro_fordes.prototype import Prototype, named_buffers


def initial_particles(
    log_joint: LogJoint,
    init_loc_fn: Any,
    num_particles: int,
    seed: int,
    args: tuple,
    kwargs: Mapping[str, Any],
    prototype: Prototype,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw every particle from a seed of its own and stack them.

    Args:
        log_joint: the model's log joint.
        init_loc_fn: a function of a site, or an object whose ``for_particle(index, shapes)`` gives
            one.
        num_particles: how many.
        seed: what the particles' seeds are drawn from; the first ones do not depend on how many
            there are.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        prototype: the model's prototype run for these.

    Returns:
        Unconstrained values, ``(particle, *shape)`` each, that require gradients, and the buffers
        that each particle has of its own.

    Raises:
        ModelError: if all particles are the same.
    """
    shapes = {name: prototype.trace.nodes[name]["value"].shape for name in prototype.latents}
    buffers = log_joint.stack_buffers(prototype, num_particles)
    module = log_joint.module
    parameters = [] if module is None else [name for name, _ in module.named_parameters()]
    with preserved_rng():
        torch.manual_seed(seed)
        seeds = torch.randint(2**62, (num_particles,)).tolist()
        drawn = []
        for index, own in enumerate(seeds):
            torch.manual_seed(own)
            init = init_loc_fn
            if hasattr(init, "for_particle"):
                init = init.for_particle(index, shapes)
            if isinstance(init, FromNetwork):
                take_buffers(init, index, buffers, named_buffers(log_joint.model), parameters)
            drawn.append(log_joint.initial(init, args, kwargs, prototype.latents))
    particles = {
        name: torch.stack([values[name] for values in drawn]) for name in prototype.latents
    }
    if num_particles > 1 and all((v == v[:1]).all() for v in particles.values()):
        raise ModelError(
            "all particles start at the same values, and no force could separate them; use an "
            "init_loc_fn that draws, such as init_to_sample or init_to_uniform"
        )
    return {name: value.requires_grad_() for name, value in particles.items()}, buffers
