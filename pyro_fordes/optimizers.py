"""One way to call Pyro's optimisers and torch's: a step on named tensors that have gradients."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from pyro.optim.optim import _get_state_dict, _load_state_dict
from torch import Tensor

from pyro_fordes._checks import ArgumentError, CheckpointError

Optim = PyroOptim | Callable[[list[Tensor]], torch.optim.Optimizer]
"""A Pyro optimiser, or a function of a list of tensors that gives a torch optimiser."""


class Stepper(Protocol):
    """Updates named tensors from their gradients."""

    def step(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the tensors against their ``.grad``."""
        ...

    def check_split(self, split: bool) -> None:
        """Refuse options that look across particles, if these are spread over processes."""
        ...

    def optimizers(self, parameters: Mapping[str, Tensor]) -> list[torch.optim.Optimizer]:
        """The torch optimisers of these tensors that were made so far."""
        ...

    def end_epoch(self, loss: float) -> None:
        """Let a learning-rate scheduler know that an epoch is over."""
        ...

    def state_dict(self, parameters: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """State of the optimisers of these tensors; None before the first step."""
        ...

    def load_state_dict(
        self, state: Mapping[str, Any] | None, parameters: Mapping[str, Tensor]
    ) -> None:
        """Make optimisers of new tensors and give them a state."""
        ...

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Let go of what is kept for tensors that are used no more."""
        ...


class PyroStepper:
    """`Stepper` of a ``PyroOptim``: one torch optimiser per site where they differ, else one.

    Pyro makes an optimiser for each parameter. Where all have the same options, one optimiser of
    all sites takes the same steps in fewer and larger operations; ``optim_objs`` then names it for
    each of them.
    """

    def __init__(self, optim: PyroOptim) -> None:
        self.optim = optim
        self._together: torch.optim.Optimizer | None = None
        self._joined: set[Tensor] = set()

    def step(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the tensors; optimisers of new ones are made with the site's name."""
        tensors = list(parameters.values())
        new = [tensor for tensor in tensors if tensor not in self.optim.optim_objs]
        if self._together is None and len(new) == len(tensors) and self._alike():
            self._together = self._make(parameters)
            self._joined.update(tensors)
        if self._together is not None:
            late = [tensor for tensor in tensors if tensor not in self._joined]
            if late:  # a shared parameter that earlier steps did not meet
                self._together.add_param_group({"params": late})
                self.optim.optim_objs.update(dict.fromkeys(late, self._together))
                self._joined.update(late)
            self._together.step()
        elif new:
            self._first_step(parameters, tensors)
        else:
            self.optim(tensors)

    def state_dict(self, parameters: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """One state for all sites together, or one per site (with its scheduler's)."""
        optims = self.optim.optim_objs
        if self._together is not None:
            names = {tensor: name for name, tensor in parameters.items()}
            order = [names[tensor] for tensor in _tensors(self._together)]
            kind = type(self._together).__name__
            return {"kind": kind, "order": order, "state": self._together.state_dict()}
        made = {name: optims[tensor] for name, tensor in parameters.items() if tensor in optims}
        kinds = [type(one).__name__ for one in self.optimizers(parameters)]
        return {
            "kind": kinds[0] if kinds else None,
            "sites": {name: _get_state_dict(one) for name, one in made.items()},
        }

    def load_state_dict(
        self, state: Mapping[str, Any] | None, parameters: Mapping[str, Tensor]
    ) -> None:
        """Make the optimisers of the tensors and give them their states."""
        self._together, self._joined = None, set()
        if state is None:
            return
        if "order" in state and self._alike():
            ordered = {name: parameters[name] for name in state["order"]}
            self._together = _restored(self._make(ordered), state["state"], state.get("kind"))
            self._joined.update(ordered.values())
            return
        store, optim = pyro.get_param_store(), self.optim
        sites = _by_site(state) if "order" in state else state["sites"]
        made: dict[Tensor, Any] = {}
        with store.scope():
            for name, saved in sites.items():
                tensor = parameters[name]
                store[name] = tensor  # options may depend on the name
                try:
                    made[tensor] = optim._get_optim(tensor)
                    one = getattr(made[tensor], "optimizer", made[tensor])
                    _check_kind(one, state.get("kind"))
                    _load_state_dict(made[tensor], saved)
                except CheckpointError:
                    raise
                except Exception as error:
                    raise _unfit(self.optim.pt_optim_constructor.__name__, error) from error
            clips = {tensor: optim._get_grad_clip(tensor) for tensor in made}
        optim.optim_objs.update(made)
        optim.grad_clip.update(clips)

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Let go of the optimisers of tensors that are used no more."""
        for tensor in tensors:
            self.optim.optim_objs.pop(tensor, None)
            self.optim.grad_clip.pop(tensor, None)

    def _alike(self) -> bool:
        """Whether all sites have the same options, and nothing is done site by site."""
        optim = self.optim
        return (
            isinstance(optim.pt_optim_args, dict)
            and not isinstance(optim, PyroLRScheduler)
            and not optim.pt_clip_args
            and not optim._state_waiting_to_be_consumed
        )

    def _make(self, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """One optimiser of all sites."""
        tensors = list(parameters.values())
        try:
            optimizer = self.optim.pt_optim_constructor(tensors, **self.optim.pt_optim_args)
        except Exception as error:
            raise _not_set_up(parameters, error) from error
        _check_first_order(optimizer)
        self.optim.optim_objs.update(dict.fromkeys(tensors, optimizer))
        return optimizer

    def _first_step(self, parameters: Mapping[str, Tensor], tensors: list[Tensor]) -> None:
        """A step that makes optimisers of new sites."""
        # PyroOptim asks the parameter store for names, to look up options and saved state. Lend it
        # a scoped store, so that nothing of ours stays in the global one.
        before = [tensor.detach().clone() for tensor in tensors]
        known = set(self.optim.optim_objs)
        store = pyro.get_param_store()
        try:
            with store.scope():
                for name, tensor in parameters.items():
                    store[name] = tensor
                self.optim(tensors)
        except Exception as error:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
                    if tensor not in known:
                        self.optim.optim_objs.pop(tensor, None)
            raise _not_set_up(parameters, error) from error

    def check_split(self, split: bool) -> None:
        """Pyro clips the norm of a site's tensor, all particles together."""
        if split and self.optim.pt_clip_args:
            raise ArgumentError(
                f"the clip_args {self.optim.pt_clip_args} of the optimiser bound the norm of all "
                f"particles' gradients together, which are in several processes; use "
                f"ParticleInference(clip_norm=...), which bounds that of each particle"
            )

    def optimizers(self, parameters: Mapping[str, Tensor]) -> list[torch.optim.Optimizer]:
        """Each of them once, without the schedulers around them."""
        optims = self.optim.optim_objs
        made = [optims[tensor] for tensor in parameters.values() if tensor in optims]
        return list(dict.fromkeys(getattr(one, "optimizer", one) for one in made))

    def end_epoch(self, loss: float) -> None:
        """Step the learning-rate scheduler, if the optimiser is one."""
        if not isinstance(self.optim, PyroLRScheduler):
            return
        with warnings.catch_warnings():
            # One that was loaded at the end of an epoch has not seen its optimiser's steps.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            if self.optim.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau:
                self.optim.step(loss)
            else:
                self.optim.step()


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimiser, in its order."""
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def _check_kind(optimizer: torch.optim.Optimizer, kind: str | None) -> None:
    """Refuse the state of an optimiser of another class, which torch would take."""
    if kind not in (None, type(optimizer).__name__):
        raise CheckpointError(
            f"the saved optimiser state does not fit {type(optimizer).__name__}: it is that of "
            f"{kind}; use the optimiser that it was saved with"
        )


def _restored(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], kind: str | None
) -> torch.optim.Optimizer:
    """An optimiser with a state that one of its kind has given."""
    _check_kind(optimizer, kind)
    groups = [len(group["params"]) for group in state["param_groups"]]
    if len(groups) > 1 and len(optimizer.param_groups) == 1:
        # Parameters that came later have groups of their own.
        tensors = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["params"] = tensors[: groups[0]]
        start = groups[0]
        for count in groups[1:]:
            optimizer.add_param_group({"params": tensors[start : start + count]})
            start += count
    try:
        optimizer.load_state_dict(dict(state))
    except (ValueError, KeyError, RuntimeError) as error:
        raise _unfit(type(optimizer).__name__, error) from error
    return optimizer


def _by_site(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The state of one optimiser of all sites as one for each site."""
    order, joint = state["order"], state["state"]
    return {
        order[place]: {
            "state": {0: joint["state"][place]} if place in joint["state"] else {},
            "param_groups": [{**group, "params": [0]}],
        }
        for group in joint["param_groups"]
        for place in group["params"]
    }


def _unfit(name: str, error: Exception) -> CheckpointError:
    """What to say of a state that is another optimiser's."""
    return CheckpointError(
        f"the saved optimiser state does not fit {name} ({type(error).__name__}: {error}); use the "
        f"optimiser that it was saved with"
    )


def _check_first_order(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser that wants to evaluate a loss."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ArgumentError(
            f"{type(optimizer).__name__} wants a closure that evaluates the loss again, but "
            f"particles follow a velocity that is no gradient of one loss; use a first-order "
            f"optimiser such as torch.optim.Adam or SGD"
        )


def _not_set_up(parameters: Mapping[str, Tensor], error: Exception) -> ArgumentError:
    """What to say of options that an optimiser refuses."""
    return ArgumentError(
        f"the optimiser could not be set up for the sites {list(parameters)}: "
        f"{type(error).__name__}: {error}"
    )


class TorchStepper:
    """`Stepper` of a function ``params -> torch.optim.Optimizer``."""

    def __init__(self, factory: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self.factory = factory
        self.optimizer: torch.optim.Optimizer | None = None
        self._known: set[Tensor] = set()  # what the function was asked for; it may leave some out

    def step(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the tensors; the optimiser is made at the first step."""
        if self.optimizer is None:
            self.optimizer = self._make(parameters)
            self._known.update(parameters.values())
        late = [tensor for tensor in parameters.values() if tensor not in self._known]
        if late:  # a shared parameter that earlier steps did not meet
            self.optimizer.add_param_group({"params": late})
            self._known.update(late)
        self.optimizer.step()

    def _make(self, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        try:
            optimizer = self.factory(list(parameters.values()))
        except Exception as error:
            raise ArgumentError(
                f"optim(params) failed for the sites {list(parameters)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentError(
                f"optim(params) must return a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        _check_first_order(optimizer)
        return optimizer

    def check_split(self, split: bool) -> None:
        """Nothing is known of the optimiser yet."""

    def optimizers(self, parameters: Mapping[str, Tensor]) -> list[torch.optim.Optimizer]:
        """The one that the function made, after the first step."""
        return [] if self.optimizer is None else [self.optimizer]

    def end_epoch(self, loss: float) -> None:
        """Nothing: torch's schedulers are stepped by whoever made them."""

    def state_dict(self, parameters: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """The optimiser's state; None before the first step."""
        if self.optimizer is None:
            return None
        names = {tensor: name for name, tensor in parameters.items()}
        order = [names[tensor] for tensor in _tensors(self.optimizer)]
        kind = type(self.optimizer).__name__
        return {"kind": kind, "order": order, "state": self.optimizer.state_dict()}

    def load_state_dict(
        self, state: Mapping[str, Any] | None, parameters: Mapping[str, Tensor]
    ) -> None:
        """Make the optimiser of the tensors and give it a state."""
        self.optimizer = None
        if state is not None and "order" not in state:
            raise CheckpointError(
                "the saved optimiser state is that of one optimiser for each site, as Pyro's are "
                "with options by name or a scheduler, and this one is for all sites; use the "
                "optimiser that it was saved with"
            )
        if state is not None:
            made = self._make({name: parameters[name] for name in state["order"]})
            self.optimizer = _restored(made, state["state"], state.get("kind"))
            self._known = set(parameters.values())

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Nothing: the optimiser of other tensors is this stepper's."""


def stepper(optim: Any) -> Stepper:
    """The `Stepper` for what a user passes as ``optim``.

    Raises:
        ArgumentError: if it is neither a ``PyroOptim`` nor a function.
    """
    if isinstance(optim, PyroOptim):
        return PyroStepper(optim)
    if isinstance(optim, torch.optim.Optimizer):
        raise ArgumentError(
            f"optim is a {type(optim).__name__} that already has parameters, but particles do not "
            f"exist yet; pass lambda params: torch.optim.{type(optim).__name__}(params, ...)"
        )
    if not callable(optim):
        raise ArgumentError(
            f"optim must be a pyro.optim optimiser, such as pyro.optim.Adam({{'lr': 1e-3}}), or a "
            f"function of a list of tensors that returns a torch.optim.Optimizer; got "
            f"{type(optim).__name__}"
        )
    return TorchStepper(optim)
