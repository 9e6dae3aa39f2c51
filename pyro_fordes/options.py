"""Options of `ParticleInference` that cannot be used are refused before anything runs."""

from collections.abc import Callable
from typing import Any

from pyro_fordes._checks import (
    ArgumentError,
    check_choice,
    check_number,
    check_part,
    check_positive_int,
)
from pyro_fordes.faults import POLICIES
from pyro_fordes.kernels import Kernel
from pyro_fordes.particles import Gather, Schedule, at_step
from pyro_fordes.transports import Transport


def check_options(
    *,
    model: Callable[..., Any],
    num_particles: int,
    kernel: Kernel,
    transport: Transport,
    init_loc_fn: Any,
    repulsion_scale: Schedule,
    repulsion_every: int,
    temperature: Schedule,
    num_data: int | None,
    vectorize: str,
    chunk_size: int | None,
    randomness: str,
    compile: bool,
    max_plate_nesting: int | None,
    seed: int | None,
    diagnostics_every: int,
    nan: str,
    clip_norm: float | None,
    gather: Gather,
) -> None:
    """See `ParticleInference` for the options.

    Raises:
        ArgumentError: naming the option, what it is and what it should be.
    """
    if isinstance(model, type) or not callable(model):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ArgumentError(
            f"model must be a Pyro model (a function, or an instance of a PyroModule), got {got}"
        )
    check_positive_int("num_particles", num_particles)
    check_part("kernel", kernel, "evaluate", "a base kernel such as RBF(Weights())")
    check_part("transport", transport, "repel", "an update rule such as WGD() or Ensemble()")
    if not callable(init_loc_fn) and not hasattr(init_loc_fn, "for_particle"):
        raise ArgumentError(
            f"init_loc_fn must be a function of a site, such as init_to_sample, or "
            f"init_to_modules(...), got {type(init_loc_fn).__name__}"
        )
    at_step("repulsion_scale", repulsion_scale, 0)
    check_positive_int("repulsion_every", repulsion_every)
    if repulsion_every > 1 and transport.uses_scores:
        raise ArgumentError(
            f"repulsion_every={repulsion_every} needs a transport whose repulsion can be left "
            f"out, such as WGD(), got {type(transport).__name__}"
        )
    at_step("temperature", temperature, 0, exclusive=True)
    check_choice("vectorize", vectorize, ("auto", "vmap", "loop"))
    check_choice("randomness", randomness, ("different", "same"))
    check_choice("nan", nan, POLICIES)
    check_positive_int("diagnostics_every", diagnostics_every)
    if chunk_size is not None:
        check_positive_int("chunk_size", chunk_size)
    if max_plate_nesting not in (None, 0):
        check_positive_int("max_plate_nesting", max_plate_nesting)
    for name, number in (("num_data", num_data), ("clip_norm", clip_norm)):
        if number is not None:
            check_number(name, number, minimum=0.0, exclusive=True)
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ArgumentError(f"seed must be an integer or None, got {seed!r}")
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ArgumentError(f"seed must be a number of 64 bits, as torch takes it, got {seed}")
    check_part("gather", gather, "split", "OneProcess() or distributed.Ranks()")
    if not isinstance(compile, bool):
        raise ArgumentError(f"compile must be True or False, got {compile!r}")
