"""Where particles start."""

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyro_fordes._checks import ArgumentError, ModelError
from pyro_fordes._random import preserved_rng
from pyro_fordes.bnn import FromNetwork, take_buffers
from pyro_fordes.log_joint import LogJoint
from pyro_fordes.particles import Gather, OneProcess
from pyro_fordes.prototype import Prototype, named_buffers
from pyro_fordes.sites import observed_sites


def check_shares(prototype: Prototype, space: Any, gather: Gather) -> None:
    """Refuse models and spaces for which shares of a batch do not add up to the batch.

    The log joint of a batch is the mean of those of its shares if each scales its likelihood up to
    all data, and if no sum over a discrete site is of several shares.

    Args:
        prototype: the model's prototype run.
        space: where particles are compared; None for nowhere.
        gather: how processes are joined.

    Raises:
        ArgumentError: if something is not exact.
    """
    shares, nodes = gather.shares, prototype.trace.nodes
    if shares == 1:
        return
    if space is not None and not hasattr(space, "share_axis"):
        raise ArgumentError(
            f"{type(space).__name__} does not say how representations of shares of a batch are "
            f"joined, which Ranks(data={shares}) needs; give it an attribute share_axis (1 where "
            f"points are compared one by one, 2 for one long point, None for what does not depend "
            f"on the batch)"
        )
    summed = [name for name in prototype.enumerated if _rows_behind(nodes[name]) < shares]
    observed = {name: _scale(nodes[name]) for name in observed_sites(prototype.trace)}
    if summed or (observed and max(observed.values()) < shares):
        what = f"discrete sites {summed} are" if summed else f"observed sites {list(observed)} are"
        raise ArgumentError(
            f"with Ranks(data={shares}) every process sees one of {shares} shares of a batch, "
            f"but the {what} not in a plate that scales a share up to all data; write "
            f"pyro.plate(name, number of all rows, subsample_size=len(x))"
        )


def _rows_behind(site: Any) -> float:
    """How many rows of all data stand behind each row of a site, by its plates."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    return prod((frame.full_size or frame.size) / frame.size for frame in frames)


def _scale(site: Any) -> float:
    """The same for an observed site, which ``poutine.scale`` may have scaled instead."""
    scale = site["scale"]
    return max(_rows_behind(site), float(scale.max() if isinstance(scale, Tensor) else scale))


def share_parameters(log_joint: LogJoint, prototype: Prototype, gather: Gather) -> None:
    """Give parameters and buffers of the model the values that they have in the first process."""
    if isinstance(gather, OneProcess):
        return
    own = dict(log_joint.parameters(prototype))
    if log_joint.module is not None:
        own |= log_joint.module.state_dict()
    if own:
        values = gather.first(lambda: {name: one.detach().clone() for name, one in own.items()})
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(values[name])


def initial_particles(
    log_joint: LogJoint,
    init_loc_fn: Any,
    num_particles: int,
    seed: int,
    args: tuple,
    kwargs: Mapping[str, Any],
    prototype: Prototype,
    gather: Gather = OneProcess(),
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw every particle of this process from a seed of its own and stack them.

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
        gather: which of the particles are here.

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

        def draw(index: int) -> dict[str, Tensor]:
            torch.manual_seed(seeds[index])
            init = init_loc_fn
            if hasattr(init, "for_particle"):
                init = init.for_particle(index, shapes)
            if isinstance(init, FromNetwork):
                take_buffers(init, index, buffers, named_buffers(log_joint.model), parameters)
            return log_joint.initial(init, args, kwargs, prototype.latents)

        here = range(num_particles)[gather.rows]
        drawn = [draw(index) for index in here]
        first = drawn[0] if here[0] == 0 else draw(0)
    particles = {
        name: torch.stack([values[name] for values in drawn]) for name in prototype.latents
    }
    (differ,) = gather.any(any(bool((v != first[name]).any()) for name, v in particles.items()))
    if num_particles > 1 and not differ:
        raise ModelError(
            "all particles start at the same values, and no force could separate them; use an "
            "init_loc_fn that draws, such as init_to_sample or init_to_uniform"
        )
    own = {name: buffer[gather.rows].clone() for name, buffer in buffers.items()}
    if gather.shares > 1:  # a prior or an init_loc_fn may read the batch
        with gather.together("the start", lambda: {"particles": {**particles, **own}}):
            pass
    return {name: value.requires_grad_() for name, value in particles.items()}, own
