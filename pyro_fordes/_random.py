"""Random numbers of an inference, kept apart from everyone else's."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def _get() -> tuple[Tensor, Tensor | None]:
    """Current states of the CPU's and, if it is in use, the current CUDA device's generator."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda


def _set(state: tuple[Tensor, Tensor | None]) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave torch's global random state as it was, whatever is drawn inside."""
    state = _get()
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
                self._state = _get()
