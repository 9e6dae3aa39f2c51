"""What a step changes beside its forces: copies to go back to, and particles drawn again."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

# A redrawn particle lies this many standard deviations of the others away from one of them.
JITTER = 0.1


def like(per_particle: Tensor, tensor: Tensor) -> Tensor:
    """One number per particle in the shape that goes with a stacked tensor.

    Example:
        >>> like(torch.ones(3), torch.zeros(3, 4, 5)).shape
        torch.Size([3, 1, 1])
    """
    return per_particle.reshape(-1, *[1] * (tensor.dim() - 1))


class Before:
    """Copies of all that a step of the optimiser changes, in memory that is kept.

    Getting it anew costs more than the copy.
    """

    def __init__(self) -> None:
        self._memory: dict[Any, Tensor] = {}
        self._values: dict[str, Tensor] = {}
        self._optimizers: list[tuple[torch.optim.Optimizer, list[dict], dict[Tensor, dict]]] = []

    @torch.no_grad()
    def take(
        self, parameters: Mapping[str, Tensor], optimizers: Iterable[torch.optim.Optimizer]
    ) -> None:
        """Copy the tensors and the optimisers' states."""
        memory: dict[Any, Tensor] = {}
        own = set(parameters.values())

        def kept(key: Any, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return list(value) if isinstance(value, list) else value
            own = self._memory.get(key)
            if own is None or own.shape != value.shape or own.device != value.device:
                own = value.detach().clone()
            else:
                own.copy_(value)
            memory[key] = own
            return own

        self._values = {name: kept(name, tensor) for name, tensor in parameters.items()}
        self._optimizers = []
        for place, one in enumerate(optimizers):
            groups = [
                {key: kept((place, at, key), value) for key, value in group.items()}
                for at, group in enumerate(_options(one))
            ]
            states = {
                tensor: {key: kept((place, tensor, key), value) for key, value in state.items()}
                for tensor, state in one.state.items()
                if tensor in own
            }
            self._optimizers.append((one, groups, states))
        self._memory = memory

    @torch.no_grad()
    def restore(
        self, parameters: Mapping[str, Tensor], optimizers: Iterable[torch.optim.Optimizer]
    ) -> None:
        """Put everything back."""
        for name, tensor in parameters.items():
            tensor.copy_(self._values[name])
        known = [one for one, _, _ in self._optimizers]
        for one in optimizers:
            if one not in known:  # made by the step that failed
                one.state.clear()
        for one, groups, states in self._optimizers:
            for group, options in zip(one.param_groups, groups, strict=False):
                for key, value in options.items():
                    group[key] = _put_back(group.get(key), value)
            for tensor in parameters.values():
                if tensor in one.state and tensor not in states:
                    del one.state[tensor]
            for tensor, state in states.items():
                live = one.state[tensor]
                for key in list(live):
                    if key not in state:
                        del live[key]
                for key, value in state.items():
                    live[key] = _put_back(live.get(key), value)

    @torch.no_grad()
    def restore_broken(
        self,
        parameters: Mapping[str, Tensor],
        broken: Bool[Tensor, " particle"],
        shared: Mapping[str, Tensor],
    ) -> None:
        """Put the rows of some particles back, and some shared parameters.

        State that is no particle's own (a count of steps, say) is put back if all are.

        Args:
            parameters: the tensors, of particles and shared.
            broken: which particles.
            shared: whether each shared parameter is to be put back.
        """
        everything = broken.all()
        masks = {}
        for name, tensor in parameters.items():
            masks[tensor] = shared.get(name, broken)
            _restore_rows(tensor, self._values[name], masks[tensor], everything)
        for one, _, states in self._optimizers:
            for tensor, state in states.items():
                live = one.state[tensor]
                for key, value in state.items():
                    if isinstance(value, Tensor) and isinstance(live.get(key), Tensor):
                        _restore_rows(live[key], value, masks[tensor], everything)


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups' options without their tensors."""
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def _put_back(live: Any, value: Any) -> Any:
    """A value as it was, in the tensor that is there if it fits."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(live, Tensor) and live.shape == value.shape:
        return live.copy_(value)
    return value.clone()


def own_rows(tensor: Tensor, count: int) -> bool:
    """Whether a tensor of an optimiser's state has a row for each of so many particles."""
    return tensor.dim() > 0 and len(tensor) == count


def _restore_rows(live: Tensor, value: Tensor, mask: Tensor, everything: Tensor) -> None:
    if mask.dim() == 0 or not own_rows(live, len(mask)):
        mask = mask if mask.dim() == 0 else everything
    else:
        mask = like(mask, live)
    if live.shape == value.shape:
        # A step count may lie on the CPU while particles do not: where then would have to wait.
        if live.device != mask.device and mask.dim() == 0:
            return
        torch.where(mask, value, live, out=live)


@torch.no_grad()
def redraw(
    particles: Mapping[str, Tensor],
    optimizers: Iterable[torch.optim.Optimizer],
    buffers: Mapping[str, Tensor],
    broken: Sequence[int],
    seed: int,
) -> bool:
    """Draw particles again near others, which also give them buffers and optimiser states.

    A particle starts at another's place, moved by `JITTER` standard deviations of the unbroken
    particles in each coordinate (a hundredth of the value where they agree).

    Args:
        particles: unconstrained values, changed in place.
        optimizers: theirs.
        buffers: per-particle buffers, changed in place.
        broken: which particles.
        seed: seed of the draws.

    Returns:
        Whether there was another particle.

    Example:
        >>> particles = {"a": torch.tensor([[1.0], [2.0], [float("nan")]])}
        >>> redraw(particles, [], {}, [2], seed=0)
        True
        >>> bool(particles["a"].isfinite().all())
        True
    """
    count = len(next(iter(particles.values())))
    good = [index for index in range(count) if index not in broken]
    if not good:
        return False
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(good), (len(broken),), generator=generator).tolist()
    donors = [good[index] for index in chosen]
    rows = list(broken)
    for value in particles.values():
        near, others = value[donors], value[good]
        spread = others.std(0) if len(good) > 1 else torch.zeros_like(others[0])
        scale = torch.where(spread > 0, JITTER * spread, 0.01 * near.abs() + 0.001)
        noise = torch.randn(near.shape, generator=generator).to(value)
        value[rows] = near + scale * noise
    for buffer in buffers.values():
        buffer[rows] = buffer[donors]
    own = set(particles.values())
    for one in optimizers:
        for tensor, state in one.state.items():
            for entry in state.values():
                if tensor in own and isinstance(entry, Tensor) and own_rows(entry, count):
                    entry[rows] = entry[donors]
    return True
