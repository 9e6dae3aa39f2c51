"""One way to call Pyro's optimisers and torch's: a step on named tensors that have gradients."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import pyro
import torch
from pyro.optim import PyroOptim
from pyro.optim.lr_scheduler import PyroLRScheduler
from torch import Tensor

from pyro_fordes._checks import ArgumentError

Optim = PyroOptim | Callable[[list[Tensor]], torch.optim.Optimizer]
"""A Pyro optimiser, or a function of a list of tensors that gives a torch optimiser."""


class Stepper(Protocol):
    """Updates named tensors from their gradients."""

    def step(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the tensors against their ``.grad``."""
        ...

    def end_epoch(self, loss: float) -> None:
        """Let a learning-rate scheduler know that an epoch is over."""
        ...


class PyroStepper:
    """`Stepper` of a ``PyroOptim``: one torch optimiser per site, options by site name."""

    def __init__(self, optim: PyroOptim) -> None:
        self.optim = optim

    def step(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the tensors; optimisers of new ones are made with the site's name."""
        tensors = list(parameters.values())
        if all(tensor in self.optim.optim_objs for tensor in tensors):
            self.optim(tensors)
            return
        # PyroOptim asks the parameter store for names, to look up options and saved state. Lend it
        # a scoped store, so that nothing of ours stays in the global one.
        before = [tensor.detach().clone() for tensor in tensors]
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
                    self.optim.optim_objs.pop(tensor, None)
            raise ArgumentError(
                f"the optimiser could not be set up for the sites {list(parameters)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def end_epoch(self, loss: float) -> None:
        """Step the learning-rate scheduler, if the optimiser is one."""
        if isinstance(self.optim, PyroLRScheduler):
            if self.optim.pt_scheduler_constructor is torch.optim.lr_scheduler.ReduceLROnPlateau:
                self.optim.step(loss)
            else:
                self.optim.step()


class TorchStepper:
    """`Stepper` of a function ``params -> torch.optim.Optimizer``."""

    def __init__(self, factory: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self.factory = factory
        self.optimizer: torch.optim.Optimizer | None = None

    def step(self, parameters: Mapping[str, Tensor]) -> None:
        """Move the tensors; the optimiser is made at the first step."""
        if self.optimizer is None:
            self.optimizer = self._make(parameters)
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
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ArgumentError(
                f"{type(optimizer).__name__} wants a closure that evaluates the loss again, but "
                f"particles follow a velocity that is no gradient of one loss; use a first-order "
                f"optimiser such as torch.optim.Adam or SGD"
            )
        return optimizer

    def end_epoch(self, loss: float) -> None:
        """Nothing: torch's schedulers are stepped by whoever made them."""


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
