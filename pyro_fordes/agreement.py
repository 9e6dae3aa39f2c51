"""What processes compare to find out whether they do the same thing with the same data."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def fingerprint(tree: Any) -> int:
    """A number that is the same for equal trees of tensors, arrays and plain values.

    Of tensors on other devices than the CPU, shape and dtype count.

    Example:
        >>> fingerprint((torch.ones(2), 3)) == fingerprint((torch.ones(2), 3))
        True
        >>> fingerprint(torch.ones(2)) == fingerprint(torch.zeros(2))
        False
    """
    digest = hashlib.blake2b(digest_size=8)
    leaves, spec = pytree.tree_flatten(tree)
    digest.update(str(spec).encode())
    for leaf in leaves:
        if isinstance(leaf, np.ndarray) and leaf.dtype != object:
            leaf = torch.as_tensor(np.ascontiguousarray(leaf))
        if isinstance(leaf, Tensor):
            digest.update(f"{tuple(leaf.shape)}{leaf.dtype}".encode())
            if leaf.device.type == "cpu" and leaf.numel():
                data = leaf.detach().contiguous().reshape(-1)
                digest.update(data.view(torch.uint8).numpy().data)
        else:
            plain = isinstance(leaf, bool | int | float | str | bytes | None)
            digest.update(f"{leaf!r};".encode() if plain else f"{type(leaf).__name__};".encode())
    return int.from_bytes(digest.digest(), "little", signed=True)


def outline(tree: Any) -> Any:
    """A tree with shapes and types in place of its tensors, arrays and floating-point numbers.

    Example:
        >>> outline((torch.ones(2), 0.5, 3))
        ('(2,) torch.float32', 'float', 3)
    """

    def described(leaf: Any) -> Any:
        if isinstance(leaf, Tensor | np.ndarray):
            return f"{tuple(leaf.shape)} {leaf.dtype}"
        return "float" if isinstance(leaf, float) else leaf

    return pytree.tree_map(described, tree)


def checksum(tensor: Tensor) -> Tensor:
    """A number that follows from a tensor's bytes and their order, computed where it lies."""
    words = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(torch.int64)
    places = torch.arange(1, len(words) + 1, device=words.device)
    return (words * places * 0x9E3779B97F4A7C1).sum()


def differences(
    found: Sequence[Mapping[str, Any]], peers: Callable[[str], Sequence[Sequence[int]]]
) -> list[str]:
    """Which process does something else, or sees something else, than most of its peers.

    Args:
        found: what each process does (``"what"``), and the fingerprints of what it sees, by name.
        peers: the groups of processes in which what has a name must be the same.

    Example:
        >>> found = [{"what": "step 1", "data": 3}, {"what": "step 1", "data": 4}]
        >>> differences(found, lambda name: [[0, 1]])
        ['rank 1 has other data than the others']
    """
    doing = [one["what"] for one in found]
    usual = Counter(doing).most_common(1)[0][0]
    said = [
        f"rank {rank} is at: {what}, the others at: {usual}"
        for rank, what in enumerate(doing)
        if what != usual
    ]
    odd: dict[int, list[str]] = {}
    for name in dict.fromkeys(name for one in found for name in one if name != "what"):
        for group in peers(name):
            seen = {rank: found[rank].get(name) for rank in group if doing[rank] == usual}
            most = Counter(seen.values()).most_common(1)
            for rank, value in seen.items():
                if value != most[0][0]:
                    odd.setdefault(rank, []).append(name)
    return said + [
        f"rank {rank} has other {' and '.join(names)} than the others"
        for rank, names in sorted(odd.items())
    ]
