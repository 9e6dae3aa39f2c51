"""Particles, and shares of the batch, spread over the processes of ``torch.distributed``.

Each process (rank) owns some particles, with their optimiser's state and buffers. What a step sends
are representations, once, and some numbers per particle: never weights. Where the batch is split,
too, several ranks have the same particles and other points, and gradients are averaged over them.
``docs/distributed.md`` says how to start a run and what happens when a rank fails,
``docs/scaling.md`` what it costs.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_fordes._checks import ArgumentError, check_positive_int
from pyro_fordes.link import Link
from pyro_fordes.particles import Gather, OneProcess


@dataclass(frozen=True)
class Ranks:
    """Spread the particles over the ranks of ``torch.distributed``.

    Under ``torchrun`` every process makes the same `ParticleInference` with ``gather=Ranks()`` and
    calls the same methods with the same arguments. A process that was started alone owns all
    particles, so one script serves both.

    The process group that is there is used; if there is none but ``torchrun``'s variables are set,
    one is made (NCCL for tensors on GPUs, gloo for others).

    Args:
        timeout: how long a rank that gives signs of life may keep the others waiting before they
            stop.
        silence: after how long without a sign of life a rank counts as dead.
        data: into how many equal shares the batch is split. The ranks are then a mesh of
            ``size / data`` rows, which divide the particles among them, and ``data`` columns: rank
            r is in row ``r // data`` and column ``r % data``. The ranks of a row have the same
            particles, those of a column see the same share, and a step is that of one process on
            the shares side by side. Every share must have as many points as the others.

    Raises:
        ArgumentError: if a time is not above zero, or below two seconds for ``silence``; when the
            ranks are asked for, if ``data`` does not divide their number.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_fordes import RBF, ParticleInference, Weights
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> inference = ParticleInference(
        ...     model, pyro.optim.Adam({"lr": 0.1}), 4, kernel=RBF(Weights()), gather=Ranks()
        ... )
        >>> inference.setup()
        >>> inference.get_samples(gather=True)["z"].shape
        torch.Size([4])
    """

    timeout: timedelta = timedelta(minutes=10)
    silence: timedelta = timedelta(seconds=10)
    data: int = 1

    def __post_init__(self) -> None:
        """Check the arguments."""
        for name, least in (("timeout", timedelta(0)), ("silence", timedelta(seconds=2))):
            value = getattr(self, name)
            if not isinstance(value, timedelta) or value <= least:
                raise ArgumentError(
                    f"Ranks({name}=...) must be a datetime.timedelta above "
                    f"{least.total_seconds():.0f} seconds, got {value!r}"
                )
        check_positive_int("Ranks(data=...)", self.data)

    @property
    def rank(self) -> int:
        """Number of this process, 0 if it is alone."""
        return dist.get_rank() if _joined() else 0

    @property
    def size(self) -> int:
        """Number of processes."""
        return dist.get_world_size() if _joined() else 1

    @property
    def data_rank(self) -> int:
        """Which share of the batch this process sees: from 0 to ``data - 1``."""
        self._rows()
        return self.rank % self.data

    def _rows(self) -> int:
        """Number of rows of the mesh, or an error if the ranks do not make one."""
        if self.size % self.data:
            raise ArgumentError(
                f"Ranks(data={self.data}) needs a number of processes that {self.data} divides, "
                f"got {self.size}; start another number with torchrun, or take another data="
            )
        return self.size // self.data

    def first(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, or the error that it meets; for use before `split`."""
        return make() if self.size == 1 else _link(dist.group.WORLD, self).first(make)

    def split(self, num_particles: int) -> Gather:
        """Share out so many particles, in contiguous blocks of sizes that differ by at most one.

        Raises:
            ArgumentError: if there are more ranks than particles, or no mesh of them.
        """
        rows = self._rows()
        if self.size == 1:
            return OneProcess()
        if num_particles < rows:
            raise ArgumentError(
                f"{num_particles} particles cannot be spread over {rows} ranks: each needs at "
                f"least one; start fewer ranks or take more particles"
            )
        return Shard(_link(dist.group.WORLD, self), blocks(num_particles, rows))


def _joined() -> bool:
    """Whether there is a process group; makes one if torchrun has started this process."""
    if not dist.is_available():
        return False
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            return False
        gpu = torch.cuda.is_available() and dist.is_nccl_available()
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # The store of a torchrun with a fixed port outlives restarts, with what was in it.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt {attempt}", store)
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return True


@lru_cache(maxsize=1)
def _link(group: Any, ranks: Ranks) -> Link:
    """The connection of a process group: one, whatever number of inferences there are."""
    return Link(ranks.timeout, ranks.silence, ranks.data)


def blocks(num_particles: int, size: int) -> list[range]:
    """Which particles each of ``size`` ranks owns.

    Example:
        >>> blocks(5, 2)
        [range(0, 3), range(3, 5)]
    """
    share, rest = divmod(num_particles, size)
    starts = [rank * share + min(rank, rest) for rank in range(size + 1)]
    return [range(*pair) for pair in pairwise(starts)]


@dataclass(frozen=True)
class Shard:
    """`Gather` of a rank that owns a block of the particles, and sees a share of the batch.

    Attributes:
        link: connection with the other ranks.
        blocks: which particles each rank owns.
    """

    link: Link
    blocks: list[range]

    def split(self, num_particles: int) -> "Shard":
        """Itself."""
        return self

    @property
    def rows(self) -> slice:
        """The block of this rank."""
        own = self.blocks[self.link.row]
        return slice(own.start, own.stop)

    @property
    def shares(self) -> int:
        """Into how many shares the batch is split."""
        return self.link.data

    @property
    def share(self) -> int:
        """The share of this rank."""
        return self.link.share

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.link.rank == 0

    def __call__(self, local: Tensor) -> Tensor:
        """All-gather along the particle axis; blocks are padded to the size of the largest."""
        return self._unpacked(self.link.gather(self._packed(local)), local)

    def collect(self, local: Tensor) -> Tensor | None:
        """Gather along the particle axis at rank 0."""
        received = self.link.collect(self._packed(local))
        return None if received is None else self._unpacked(received, local)

    def total(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over ranks."""
        return self.link.total(parts)

    def mean(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Means over the ranks with the same particles."""
        return self.link.mean(parts)

    def beside(self, local: Tensor, axis: int) -> Tensor:
        """Tensors of the ranks with the same particles, side by side along an axis."""
        shape = local.shape
        received = self.link.shares(local.detach().contiguous().reshape(-1).view(torch.uint8))
        return torch.cat([one.view(local.dtype).reshape(shape) for one in received], dim=axis)

    def first(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, or the error that it meets."""
        return self.link.first(make)

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which flags are set at some rank."""
        return self.link.any(*flags)

    def together(
        self, what: str, content: Callable[[], Mapping[str, Any]] = dict
    ) -> AbstractContextManager[None]:
        """See `Link.together`."""
        return self.link.together(what, content)

    def _packed(self, local: Tensor) -> Tensor:
        """Bytes of this rank's rows, padded to the size of the largest block."""
        flat, rows = local.detach().reshape(len(local), -1), len(self.blocks[0])
        if len(flat) < rows:
            flat = torch.cat([flat, flat.new_zeros(rows - len(flat), flat.shape[1])])
        return flat.contiguous().view(torch.uint8)

    def _unpacked(self, received: Tensor, like: Tensor) -> Tensor:
        """Rows of all ranks without the padding."""
        if len(self.blocks[-1]) < received.shape[1]:
            parts = [part[: len(own)] for part, own in zip(received, self.blocks, strict=True)]
            received = torch.cat(parts)
        else:
            received = received.flatten(end_dim=1)
        return received.view(like.dtype).reshape(self.blocks[-1].stop, *like.shape[1:])


def step_bytes(
    num_particles: int,
    num_ranks: int,
    num_points: int,
    num_features: int,
    *,
    num_sites: int,
    itemsize: int = 4,
    scores: bool = False,
    data: int = 1,
    num_values: int = 0,
    of_batch: bool = True,
) -> int:
    r"""Bytes that every rank sends in a step that is not measured.

    .. math:: (R - 1) \left( \lceil M / R \rceil (P F b + 8 (3 + 2 S)) + 16 \right)

    for M particles, R ranks, P points of F features in numbers of b bytes and S sites: the
    representation; the log joint and whether all is finite, in double precision; and what is
    compared. With the batch in K shares, so that Q = R / K ranks divide the particles, it is

    .. math:: (Q - 1) \lceil M / Q \rceil (P F b + 8 (3 + 2 S)) + (K - 1) M P F b
        + 2 \frac{K - 1}{K} \lceil M / Q \rceil (V + 1) b + 32 (R - 1)

    with V numbers per particle: the representations of a share go to its column and then, with
    those of all particles, to the other shares; gradients, log density and buffers are averaged.

    Headers of the network come on top. Parameters that particles share add :math:`2 (R - 1) / R`
    times their size, a measured step five numbers per particle (and V more, to average the two
    forces apart), and an epoch and a checkpoint what `docs/scaling.md` says.

    Args:
        num_particles: number of particles.
        num_ranks: number of ranks.
        num_points: points of the representation (the share of the batch that a rank sees, for input
            gradients), 0 for none.
        num_features: features of a point (the input's size, for input gradients).
        num_sites: number of latent sites.
        itemsize: bytes of a number.
        scores: whether the transport sends scores, too (`SVGD`), as large as the representation.
        data: number of shares of the batch.
        num_values: values of a particle and floating-point numbers in its buffers; counts where
            ``data`` is above 1.
        of_batch: whether the representation is of the batch, as it is in all spaces but `Weights`
            and those with other points.

    Example:
        >>> step_bytes(10, 2, 128, 3 * 32 * 32, num_sites=20)
        7866056
        >>> step_bytes(10, 4, 64, 3 * 32 * 32, num_sites=20, data=2, num_values=80_000)
        13398316
    """
    rows = num_ranks // data
    block = -(-num_particles // rows)
    represented = num_points * num_features * itemsize * (2 if scores else 1)
    along_particles = (rows - 1) * block * (represented + 8 * (3 + 2 * num_sites))
    if data == 1:
        return along_particles + 16 * (num_ranks - 1)
    joined = (data - 1) * num_particles * represented if of_batch else 0
    averaged = 2 * (data - 1) * block * (num_values + 1) * itemsize // data
    return along_particles + joined + averaged + 32 * (num_ranks - 1)
