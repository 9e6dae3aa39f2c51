"""The state of a `ParticleInference`: what is saved, and how another one takes it over."""

from collections.abc import Callable, Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_fordes._checks import ArgumentError, CheckpointError
from pyro_fordes._random import RandomStream
from pyro_fordes.checkpoint import read
from pyro_fordes.faults import Faults
from pyro_fordes.loops import Position
from pyro_fordes.optimizers import stepper
from pyro_fordes.particles import OneProcess
from pyro_fordes.prototype import Prototype
from pyro_fordes.rollback import Before
from pyro_fordes.spaces import Space
from pyro_fordes.summary import LossHistory

_PARTS = (
    "num_particles",
    "particles",
    "samples",
    "buffers",
    "shared",
    "enumerated",
    "optimizer",
    "step",
    "random",
    "position",
    "faults",
)


def state_of(inference: Any, join: Callable[[Tensor], Any]) -> dict[str, Any]:
    """The state itself, its tensors those that later steps change: copy it to keep it.

    Args:
        inference: whose state.
        join: makes of a tensor of the particles here that of all particles.
    """
    if inference._loaded is not None:
        return _loaded_state(inference)
    local, shared = inference._particles, inference._shared
    position = inference._position or inference._resumable
    particles = {name: join(value.detach()) for name, value in local.items()}
    constrained = inference._log_joint.constrain(local, inference._latents)
    # The rest of the samples are the particles' own values.
    identical = [torch.equal(value, local[name]) for name, value in constrained.items()]
    moved = inference._gather.any(*(not one for one in identical))
    transformed = {
        name: join(value)
        for (name, value), moved in zip(constrained.items(), moved, strict=True)
        if moved
    }
    optimizer = inference._stepper.state_dict({**local, **shared})
    return {
        "versions": {
            "pyro_fordes": version("pyro-fordes"),
            "torch": str(torch.__version__),
            "pyro": pyro.__version__,
        },
        "num_particles": inference.num_particles,
        "particles": particles,
        "samples": transformed,
        "buffers": {name: join(buffer) for name, buffer in inference._buffers.items()},
        "shared": {name: value.detach() for name, value in shared.items()},
        "enumerated": list(inference._enumerated),
        "optimizer": per_particle(optimizer, local, join),
        "step": inference._step,
        "random": inference._random.state_dict(),
        "position": None if position is None else position.state_dict(),
        "faults": inference._faults.count,
        # What `diagnostics` and `summary` show; no step depends on it. Older states have none.
        "record": {
            "diagnostics": inference._diagnostics,
            "losses": inference._losses.state_dict(),
            "batches_per_epoch": inference._batches_per_epoch,
        },
    }


def _loaded_state(inference: Any) -> dict[str, Any]:
    """A loaded state that waits for the model's arguments; samples may have been drawn since."""
    state, now = inference._loaded, inference._random.state_dict()
    place = state["random"]["cpu"]
    if now["cpu"] is None or (place is not None and torch.equal(now["cpu"], place)):
        return state
    return {**state, "random": now}


def sample_shapes(inference: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each site's constrained value, without the particle axis."""
    if inference._loaded is not None:
        samples = {**inference._particles, **inference._loaded["samples"]}
        return {name: tuple(value.shape[1:]) for name, value in samples.items()}
    return {
        name: tuple(latent.transform.forward_shape(latent.shape))
        for name, latent in inference._latents.items()
    }


def samples_of(
    inference: Any, gather: bool, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Constrained values of the particles here, or of all processes; of all sites or some."""
    join = inference._gather
    chosen = {
        name: value
        for name, value in inference._particles.items()
        if names is None or name in names
    }
    if inference._loaded is None:
        samples = inference._log_joint.constrain(chosen, inference._latents)
    else:  # without the model's supports, as the state has them
        saved = inference._loaded["samples"]
        samples = {
            name: saved[name][join.rows] if name in saved else chosen[name] for name in chosen
        }
    if gather:
        with join.together("get_samples"):
            samples = {name: join(value) for name, value in samples.items()}
    return {name: value.detach().clone() for name, value in samples.items()}


def take_state(inference: Any, state: Mapping[str, Any]) -> None:
    """See ``ParticleInference.load_state_dict``."""
    missing = [name for name in _PARTS if not isinstance(state, Mapping) or name not in state]
    if missing:
        raise CheckpointError(
            f"this is no state of a ParticleInference: it lacks {missing}; state_dict() or "
            f"load(path) give one"
        )
    if state["num_particles"] != inference.num_particles:
        raise CheckpointError(
            f"the state has {state['num_particles']} particles, this inference "
            f"{inference.num_particles}; make it with num_particles={state['num_particles']}"
        )
    try:
        taken = _taken(inference, state)
    except Exception as error:
        raise CheckpointError(
            f"this is no state of a ParticleInference, though it has the parts of one "
            f"({type(error).__name__}: {error}); state_dict() or load(path) give one"
        ) from error
    if inference._latents:  # the model is known
        _checked_particles(taken["_particles"], inference._latents)
    # Some of a state can be checked with the model only; till then there is a way back.
    inference._fallback = {name: getattr(inference, name) for name in taken}
    for name, value in taken.items():
        setattr(inference, name, value)


def _taken(inference: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """What of an inference a state replaces; of the particles, those of this process."""
    count, rows = inference.num_particles, inference._gather.rows
    if any(len(value) != count for value in (*state["particles"].values(), state["faults"])):
        raise ValueError(f"not every site has {count} particles")
    particles = {
        name: value.detach()[rows].clone().requires_grad_()
        for name, value in state["particles"].items()
    }
    random = RandomStream(state["random"]["seed"])
    random.load_state_dict(state["random"])
    faults = Faults(inference._faults.policy, count)
    faults.count = state["faults"].clone()
    position, record = state["position"], state.get("record", {})
    return {
        "_particles": particles,
        "_buffers": {name: value[rows].clone() for name, value in state["buffers"].items()},
        "_space": inference.kernel.space,
        "_before": Before(),
        "_shared": {},
        "_latents": inference._latents,
        "_diagnostics": copied(record.get("diagnostics")),
        "_losses": LossHistory.from_state(record.get("losses")),
        "_batches_per_epoch": record.get("batches_per_epoch", 0),
        "_enumerated": tuple(state["enumerated"]),
        "_step": state["step"],
        "_seed": state["random"]["seed"],
        "_random": random,
        "_faults": faults,
        "_resumable": None if position is None else Position.from_state(position),
        "_stepper": stepper(inference.optim),
        "_loaded": dict(state),
    }


def fall_back(inference: Any) -> None:
    """Undo `take_state`, whose state turned out to be another model's."""
    for name, value in inference._fallback.items():
        setattr(inference, name, value)
    inference._fallback = {}


def finish_loading(
    inference: Any, state: Mapping[str, Any], space: Space, prototype: Prototype
) -> None:
    """Check a loaded state against the model, and give the rest of it to its owners.

    Raises:
        CheckpointError: if it is another model's.
    """
    log_joint, latents = inference._log_joint, prototype.latents
    particles = _checked_particles(inference._particles, latents)
    buffers = log_joint.stack_buffers(prototype, len(next(iter(particles.values()))))
    wrong = [
        name
        for name in buffers.keys() | inference._buffers.keys()
        if name not in buffers
        or name not in inference._buffers
        or buffers[name].shape != inference._buffers[name].shape
    ]
    if wrong:
        raise CheckpointError(f"the state and the model differ in the buffers {sorted(wrong)}")
    shared = _checked_shared(state, log_joint.parameters(prototype))
    rows = inference._gather.rows
    own = per_particle(state["optimizer"], state["particles"], lambda value: value[rows])
    # torch's optimisers take tensors as they are, and the state is the caller's.
    inference._stepper.load_state_dict(copied(own), {**particles, **shared})
    _take_shared(state, shared)
    inference._buffers = {
        name: value.to(buffers[name].device) for name, value in inference._buffers.items()
    }
    inference._particles, inference._shared = particles, shared
    inference._space, inference._latents, inference._loaded = space, latents, None
    inference._stepper.forget(inference._fallback.get("_particles", {}).values())
    inference._fallback = {}


def share_loaded(inference: Any) -> None:
    """Give the model the shared parameters of a loaded state that waits for the model's arguments.

    A prediction or a particle's network is then that of the state. The model must have its
    parameters, as a function has after its first run.

    Raises:
        CheckpointError: if the model lacks some, or has them in another shape.
    """
    state = inference._loaded
    if state is not None:
        module, store = inference._log_joint.module, pyro.get_param_store()
        known = {} if module is None else dict(module.named_parameters())
        own = {name: known.get(name.replace("$$$", ".")) for name in state["shared"]}
        found = {
            name: store[name].unconstrained() if tensor is None else tensor
            for name, tensor in own.items()
            if tensor is not None or name in store
        }
        _take_shared(state, _checked_shared(state, found))


def _checked_shared(
    state: Mapping[str, Any], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The model's parameters that a state has values for."""
    absent = [name for name in state["shared"] if name not in parameters]
    if absent:
        raise CheckpointError(
            f"the state has the shared parameters {absent}, which the model lacks"
        )
    for name, value in state["shared"].items():
        here = parameters[name]
        if value.shape != here.shape or value.dtype != here.dtype:
            raise CheckpointError(
                f"the state has the shared parameter '{name}' as {tuple(value.shape)} of "
                f"{value.dtype}, the model as {tuple(here.shape)} of {here.dtype}"
            )
    return {name: parameters[name] for name in state["shared"]}


@torch.no_grad()
def _take_shared(state: Mapping[str, Any], shared: Mapping[str, Tensor]) -> None:
    for name, tensor in shared.items():
        tensor.copy_(state["shared"][name])


def per_particle(
    optimizer: Mapping[str, Any] | None,
    particles: Mapping[str, Tensor],
    change: Callable[[Tensor], Any],
) -> dict[str, Any] | None:
    """An optimiser's state, its tensors that have the particles' shape changed.

    Args:
        optimizer: what a `Stepper` gave.
        particles: values of the sites in the shapes that the state has.
        change: function of a tensor with a particle axis.
    """
    if optimizer is None:
        return None

    def changed(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
        like = particles.get(name)
        return {
            key: change(value)
            if like is not None and isinstance(value, Tensor) and value.shape == like.shape
            else value
            for key, value in entry.items()
        }

    def restated(names: list[str], state: Mapping[str, Any]) -> dict[str, Any]:
        entries = {place: changed(names[place], entry) for place, entry in state["state"].items()}
        return {**state, "state": entries}

    if "order" in optimizer:
        return {**optimizer, "state": restated(optimizer["order"], optimizer["state"])}
    sites = {}
    for name, state in optimizer["sites"].items():
        if "state" in state:
            sites[name] = restated([name], state)
        else:  # a scheduler's, with the optimiser's in it
            sites[name] = {
                key: restated([name], value)
                if isinstance(value, Mapping) and "state" in value
                else value
                for key, value in state.items()
            }
    return {"sites": sites}


def _checked_particles(particles: Mapping[str, Tensor], latents: Any) -> dict[str, Tensor]:
    """Particles of the model's sites, shapes and dtype, on its device."""
    if set(particles) != set(latents):
        raise CheckpointError(
            f"the state has the latent sites {list(particles)}, the model {list(latents)}; it is "
            f"that of another model"
        )
    for name, latent in latents.items():
        value = particles[name]
        if value.shape[1:] != latent.shape or value.dtype != latent.dtype:
            raise CheckpointError(
                f"the state has the unconstrained site '{name}' as {tuple(value.shape[1:])} of "
                f"{value.dtype}, the model as {tuple(latent.shape)} of {latent.dtype}"
            )
    return {
        name: particles[name].detach().to(latent.device).requires_grad_()
        for name, latent in latents.items()
    }


class Load:
    """`load` on the class makes an inference from a file, on an instance it fills that one."""

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        """The one or the other."""

        def load_new(path: str | Path, model: Any, optim: Any, **options: Any) -> Any:
            """Make an inference from a file: ``ParticleInference.load(path, model, optim, ...)``.

            Args:
                path: what `save` wrote.
                model: the model.
                optim: the optimiser.
                **options: other arguments of `ParticleInference`; the number of particles is the
                    file's.

            Raises:
                CheckpointError: if the file cannot be read or is no state.
                ArgumentError: if an option cannot be used.
            """
            if "num_particles" in options:
                raise ArgumentError(
                    "load(path, model, optim) makes as many particles as the file has; leave "
                    "num_particles out"
                )
            first = getattr(options.get("gather"), "first", OneProcess().first)
            state = first(lambda: read(path))
            made = owner(model, optim, state.get("num_particles", 1), **options)
            made.load_state_dict(state)
            return made

        def load_here(path: str | Path) -> None:
            """Take over a file's state: ``inference.load(path)``; see `load_state_dict`.

            Raises:
                CheckpointError: if the file cannot be read or does not fit.
            """
            instance.load_state_dict(instance._gather.first(lambda: read(path)))

        return load_new if instance is None else load_here


def copied(tree: Any) -> Any:
    """A tree of tensors and plain values, its tensors copied so that later steps leave them."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(copied(value) for value in tree)
    return tree
