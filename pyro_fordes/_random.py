"""Random numbers of an inference, kept apart from everyone else's."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")


def random_state() -> tuple[Tensor, Tensor | None]:
    """Current states of the CPU's and, if it is in use, the current CUDA device's generator."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda


def _set(state: tuple[Tensor, Tensor | None]) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


def global_state(loader: Any = None) -> dict[str, Any]:
    """States of the global generators (torch, numpy, Python) and of a data loader's own.

    Tensors, numbers and tuples only, so that a checkpoint can hold them.
    """
    cpu, cuda = random_state()
    name, keys, place, has_gauss, gauss = np.random.get_state()
    return {
        "cpu": cpu,
        "cuda": cuda,
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), place, has_gauss, gauss),
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in _generators(loader)],
    }


def set_global_state(state: Mapping[str, Any], loader: Any = None) -> None:
    """Put the generators into the states that `global_state` has noted."""
    _set((state["cpu"], state["cuda"] if torch.cuda.is_available() else None))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    for generator, saved in zip(_generators(loader), state["loader"], strict=False):
        generator.set_state(saved)


def _generators(loader: Any) -> list[torch.Generator]:
    """The generators that a data loader and its samplers own, each once."""
    owners = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
    owners.append(getattr(owners[-1], "sampler", None))
    found: list[torch.Generator] = []
    for owner in owners:
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator) and generator not in found:
            found.append(generator)
    return found


@contextmanager
def preserved_rng(first: Callable[[Callable[[], Any]], Any] | None = None) -> Iterator[None]:
    """Leave torch's global random state as it was, whatever is drawn inside.

    Args:
        first: ``Gather.first``, to begin with the state of the first process; None for one's own.
    """
    state = random_state()
    if first is not None:
        torch.set_rng_state(first(torch.get_rng_state))
    try:
        yield
    finally:
        _set(state)


class RandomStream:
    """A stream of random numbers of its own: inside `active`, torch's functions draw from it.

    Args:
        seed: seed of the stream.

    Example:
        >>> stream = RandomStream(0)
        >>> with stream.active():
        ...     first = torch.rand(())
        >>> with RandomStream(0).active():
        ...     bool(torch.rand(()) == first)
        True
    """

    def __init__(self, seed: int) -> None:
        self._state: tuple[Tensor, Tensor | None] | None = None
        self._seed = seed

    @property
    def place(self) -> tuple[Tensor, Tensor | None] | None:
        """The place in the stream, which can be set; None at its start."""
        return self._state

    @place.setter
    def place(self, place: tuple[Tensor, Tensor | None] | None) -> None:
        self._state = place

    def state_dict(self) -> dict[str, Any]:
        """The seed and the generators' states."""
        cpu, cuda = self._state or (None, None)
        return {"seed": self._seed, "cpu": cpu, "cuda": cuda}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the place in the stream that `state_dict` has noted.

        A state of a CUDA generator is used where CUDA is in use.
        """
        self._seed = state["seed"]
        cpu, cuda = state["cpu"], state["cuda"]
        if cuda is not None and torch.cuda.is_available():
            torch.cuda.init()
        self._state = None if cpu is None else (cpu, cuda if torch.cuda.is_available() else None)

    @contextmanager
    def looked_at(self) -> Iterator[None]:
        """Draw what this stream would give next, and leave it where it is."""
        before = self._state
        try:
            with self.active():
                yield
        finally:
            self._state = before

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream inside; torch's global state is restored after."""
        with preserved_rng():
            if self._state is None:
                torch.manual_seed(self._seed)
            else:
                _set(self._state)
            try:
                yield
            finally:
                self._state = random_state()


def seeded(seed: int, call: Callable[[], T]) -> T:
    """What a function gives with the global generators seeded, whose states are put back.

    Example:
        >>> bool(seeded(0, lambda: torch.rand(())) == seeded(0, lambda: torch.rand(())))
        True
    """
    with preserved_rng():
        torch.manual_seed(seed)
        return call()
