"""Particles, and shares of the batch, spread over the processes of ``torch.distributed``.

Each process (rank) owns some particles, with their optimiser's state and buffers. What a step sends
are representations, once, and some numbers per particle: never weights. Where the batch is split,
too, several ranks have the same particles and other points, and gradients are averaged over them.
``docs/distributed.md`` says how to start a run and what happens when a rank fails,
``docs/scaling.md`` what it costs.
"""

import atexit
import io
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_fordes._checks import ArgumentError, FordesError, RankError, check_positive_int
from pyro_fordes.agreement import checksum, differences, fingerprint, outline
from pyro_fordes.particles import Gather, OneProcess
from pyro_fordes.watch import Watch


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
def _link(group: Any, ranks: Ranks) -> "Link":
    """The connection of a process group: one, whatever number of inferences there are."""
    return Link(ranks.timeout, ranks.silence, ranks.data)


def _close(link: "weakref.ref[Link]") -> None:
    """Close a connection that is still there when the interpreter ends."""
    found = link()
    if found is not None:
        found.close()


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
class Axis:
    """Ranks that exchange tensors, this one among them.

    Attributes:
        size: how many.
        on_cpu: their group for tensors on CPUs.
        on_gpu: their group for tensors on GPUs.
    """

    size: int
    on_cpu: Any
    on_gpu: Any

    def group_of(self, tensor: Tensor) -> Any:
        """The group over which a tensor travels."""
        return self.on_gpu if tensor.is_cuda else self.on_cpu


# Content that is compared along one axis of the mesh only.
_OF_COLUMNS = ("data", "arguments")
_OF_ROWS = ("particles",)


class Link:
    """Connection of a rank with the others, and what they have agreed upon.

    Args:
        timeout: see `Ranks`.
        silence: see `Ranks`.
        data: see `Ranks`.
    """

    def __init__(self, timeout: timedelta, silence: timedelta, data: int = 1) -> None:
        self.rank, self.size, self.data = dist.get_rank(), dist.get_world_size(), data
        self.row, self.share = divmod(self.rank, data)
        # Its operations never give up by themselves before the watch does.
        self._patience = 2 * timeout + 10 * silence
        self._group = cast("Any", dist.new_group(backend="gloo", timeout=self._patience))
        self._nccl = "nccl" in str(dist.get_backend_config())
        self._all = Axis(self.size, self._group, dist.group.WORLD if self._nccl else self._group)
        everyone = range(self.size)
        self._columns = [list(everyone[share::data]) for share in range(data)]
        self._rows = [list(everyone[first : first + data]) for first in everyone[::data]]
        self._column, self._row = self._axis(self._columns), self._axis(self._rows)
        store = dist.distributed_c10d._get_default_store()
        self._watch = Watch(store, self.rank, self.size, timeout, silence)
        self._what = "start"
        self._unread: Tensor | None = None  # whether data on the device differ
        self._pending: tuple[Any, Tensor, str] | None = None  # a comparison under way
        self._waiting = 0
        atexit.register(_close, weakref.ref(self))
        self._wait(dist.barrier(group=self._group, async_op=True))

    def close(self) -> None:
        """End the groups of this connection, and torch's threads for them.

        A thread that is about to let go of a tensor when the interpreter ends would abort the
        process. Not where something is under way, as after a failure: its end would be waited for.
        """
        if self._waiting or self._pending is not None or not dist.is_initialized():
            return
        axes = (self._all, self._column, self._row)
        groups = {id(one): one for axis in axes for one in (axis.on_cpu, axis.on_gpu) if one}
        groups.pop(id(dist.group.WORLD), None)
        del self._group, self._all, self._column, self._row, axes
        for one in list(groups):
            dist.destroy_process_group(groups.pop(one))

    def _axis(self, members: list[list[int]]) -> Axis:
        """This rank's part of the mesh, from all parts along an axis.

        The layout is that of ``init_device_mesh(..., (rows, data), mesh_dim_names=("particle",
        "data"))``, whose groups have a time-out of torch's, though, shorter than a rank's patience:
        old versions of torch cannot set another, and without one a slow step would end the run.
        """
        if len(members) == 1:
            return self._all
        if len(members[0]) == 1:
            return Axis(1, None, None)
        make = dist.new_subgroups_by_enumeration
        on_cpu, _ = make(members, timeout=self._patience, backend="gloo")
        on_gpu = make(members, timeout=self._patience)[0] if self._nccl else on_cpu
        return Axis(len(members[0]), on_cpu, on_gpu)

    # ---------------------------------------------------------------- tensors

    def gather(self, block: Tensor) -> Tensor:
        """Blocks of all ranks of the column, equal in size, one after the other."""
        return self._gathered(block, self._column)

    def shares(self, block: Tensor) -> Tensor:
        """Blocks of all ranks of the row, equal in size, one after the other."""
        return self._gathered(block, self._row)

    def _gathered(self, block: Tensor, axis: Axis) -> Tensor:
        self._settle()
        if axis.size == 1:
            return block.unsqueeze(0)
        received = block.new_empty(axis.size, *block.shape)
        if block.numel():
            self._wait(_all_gather(received, block, axis.group_of(block)), block)
        return received

    def collect(self, block: Tensor) -> Tensor | None:
        """Blocks of all ranks of the first column at rank 0 only."""
        self._settle()
        if self.share:
            return None
        if self._column.size == 1:
            return block.unsqueeze(0)
        received = block.new_empty(self._column.size, *block.shape) if self.rank == 0 else None
        if block.numel():
            parts = None if received is None else list(received.unbind(0))
            group = self._column.group_of(block)
            self._wait(dist.gather(block, parts, dst=0, group=group, async_op=True), block)
        return received

    def total(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over ranks."""
        self._settle()
        sums = {name: part.detach().clone() for name, part in parts.items()}
        for part in sums.values():
            self._wait(_all_reduce(part, self._all.group_of(part)), part)
        return sums

    def mean(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Means over the ranks of the row, in one message for each type of number."""
        self._settle()
        means = [part.detach() for part in parts]
        if self.data == 1:
            return means
        for kind in dict.fromkeys((part.dtype, part.device) for part in means):
            places = [i for i, part in enumerate(means) if (part.dtype, part.device) == kind]
            joined = torch.cat([means[i].reshape(-1) for i in places])
            self._wait(_all_reduce(joined, self._row.group_of(joined)), joined)
            joined /= self.data
            pieces = joined.split([means[i].numel() for i in places])
            for i, piece in zip(places, pieces, strict=True):
                means[i] = piece.view(means[i].shape)
        return means

    def _wait(self, work: Any, sent: Tensor | None = None) -> None:
        """Wait for an operation: the host on CPUs, the stream of the device on GPUs."""
        self._waiting += 1
        if sent is not None and sent.is_cuda:
            work.wait()
        else:
            self._watch.wait(work)
        self._waiting -= 1  # not after a failure: see `close`

    # ---------------------------------------------------------------- plain values

    def first(self, make: Callable[[], Any]) -> Any:
        """Broadcast from rank 0 what it makes, or the error that it meets."""
        self._compare({"what": f"{self._what}, broadcast"})
        self._settle()
        content = None
        if self.rank == 0:
            try:
                content = _encoded({"value": make()})
            except FordesError as error:
                content = _encoded({"error": [type(error).__name__, str(error)]})
        length = torch.tensor([0 if content is None else len(content)])
        self._wait(dist.broadcast(length, 0, group=self._group, async_op=True))
        if content is None:
            content = torch.empty(int(length), dtype=torch.uint8)
        self._wait(dist.broadcast(content, 0, group=self._group, async_op=True))
        buffer = io.BytesIO(content.numpy().tobytes())
        found = torch.load(buffer, map_location="cpu", weights_only=True)
        if "error" in found:
            name, message = found["error"]
            kinds = {kind.__name__: kind for kind in FordesError.__subclasses__()}
            failed = kinds.get(name, RankError)(message)
            failed.everywhere = True
            raise failed
        return found["value"]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which flags are set at some rank."""
        self._compare({"what": f"{self._what}, agreement"}, flags)
        received = self._settle()
        return tuple(any(int(row) >> place & 1 for row in received) for place in range(len(flags)))

    # ---------------------------------------------------------------- agreement

    @contextmanager
    def together(
        self, what: str, content: Callable[[], Mapping[str, Any]] = dict
    ) -> Iterator[None]:
        """Compare what the ranks are about to do, and tell the others if this one fails at it.

        The comparison travels while the work begins; it is looked at before anything else is sent.
        """
        before, self._what = self._what, what
        self._watch.at(what)
        try:
            named = dict(content())
            self._compare({"what": what, **self._marks(named)})
            self._compare_on_gpu(named)
            yield
            self._settle()
        except BaseException as error:
            if not isinstance(error, RankError) and not getattr(error, "everywhere", False):
                text = str(error).splitlines()[0] if str(error) else ""
                self._watch.report(
                    f"rank {self.rank} stopped at: {what}, with {type(error).__name__}: {text}"
                )
            raise
        finally:
            self._what = before

    def _marks(self, named: Mapping[str, Any]) -> dict[str, int]:
        """Fingerprints of what is to be compared."""
        marks = {}
        for name, tree in named.items():
            if name in _OF_ROWS:
                if self.data == 1:
                    continue  # nobody else has these particles
                tree = pytree.tree_map(lambda leaf: leaf.cpu(), tree)
            marks[name] = fingerprint(tree)
            if name in _OF_COLUMNS and self.data > 1:
                marks[f"shapes of {name}"] = fingerprint(outline(tree))
        return marks

    def _peers(self, name: str) -> list[list[int]]:
        """The ranks among which what has a name must be the same."""
        if name in _OF_COLUMNS:
            return self._columns
        return self._rows if name in _OF_ROWS else [list(range(self.size))]

    def _compare(self, described: Mapping[str, Any], flags: tuple[bool, ...] = ()) -> None:
        """Begin to compare with the other ranks, in a message that always has the same size."""
        self._settle()
        parts: list[dict[str, Any]] = [{}, {}, {}]  # for all ranks, for columns, for rows
        for name, mark in described.items():
            place = 1 if name in _OF_COLUMNS else 2 if name in _OF_ROWS else 0
            parts[place if self.data > 1 else 0][name] = mark
        marks = [fingerprint(json.dumps(part)) for part in parts]
        bits = sum(int(flag) << place for place, flag in enumerate(flags))
        sent = torch.tensor([bits, *(marks if self.data > 1 else marks[:1])])
        received = sent.new_empty(self.size * len(sent))
        work = _all_gather(received, sent, self._group)
        self._pending = work, received.reshape(self.size, -1), json.dumps(described)

    def _settle(self) -> Tensor:
        """Look at the comparison that is under way; returns the flags of all ranks."""
        if self._pending is None:
            return torch.zeros(0)
        work, received, text = self._pending
        self._pending = None
        self._wait(work)
        mesh = received.reshape(-1, self.data, received.shape[1])
        same = [mesh[..., 1] == mesh[0, 0, 1]]
        if self.data > 1:
            same += [mesh[..., 2] == mesh[:1, :, 2], mesh[..., 3] == mesh[:, :1, 3]]
        if not all(bool(one.all()) for one in same):
            self._differ(text)
        return received[:, 0]

    def _compare_on_gpu(self, named: Mapping[str, Any]) -> None:
        """Compare the content of data on devices, and look at what the last comparison found.

        Not at this one, for which the host would wait for the device.
        """
        if self._unread is not None and bool(self._unread):
            self._watch.stop(f"ranks have seen different data before: {self._what}. {self._advice}")
        self._unread = None
        compared = [tree for name, tree in named.items() if name not in _OF_ROWS]
        sums = [checksum(leaf) for leaf in pytree.tree_leaves(compared) if _is_on_gpu(leaf)]
        if sums:
            sent = torch.stack(sums)
            received = sent.new_empty(self.size * len(sums))
            _all_gather(received, sent, self._all.on_gpu).wait()
            mesh = received.reshape(-1, self.data, len(sums))
            self._unread = (mesh != mesh[:1]).any()

    def _differ(self, described: str) -> None:
        """Say which rank does something else, or sees something else, than most."""
        found = [
            json.loads(text) if text else {"what": "(no answer)"}
            for text in self._watch.exchange("differs", described)
        ]
        said = differences(found, self._peers)
        self._watch.stop(
            f"{'; '.join(said) or 'ranks differ'}, at: {found[self.rank]['what']}. {self._advice}"
        )

    @property
    def _advice(self) -> str:
        """What to do where ranks differ."""
        if self.data == 1:
            return _ADVICE
        return _ADVICE_ON_SHARES.format(data=self.data)


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


_ADVICE = (
    "All ranks must make the same calls with the same batches: shuffle from the same seed on all "
    "of them, and give every rank the whole data set"
)
_ADVICE_ON_SHARES = (
    "All ranks must make the same calls: those that differ by a multiple of {data} with the same "
    "batches, and all with as many batches of the same sizes as the others. "
    "DistributedSampler(dataset, num_replicas={data}, rank=ranks.data_rank) cuts a data set so, "
    "with DataLoader(..., drop_last=True) where the last batch is smaller"
)


def _is_on_gpu(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_cuda


def _all_gather(received: Tensor, sent: Tensor, group: Any) -> Any:
    """``all_gather_single``, under the name that older versions of torch have for it."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(received.reshape(-1), sent.reshape(-1), group=group, async_op=True)


def _all_reduce(tensor: Tensor, group: Any) -> Any:
    """Sum over the ranks of a group, in place."""
    return dist.all_reduce(tensor, group=group, async_op=True)


def _encoded(value: Any) -> Tensor:
    """Bytes of what ``torch.load(weights_only=True)`` can read."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


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
