"""The connection of a process with the others: collective operations, and agreement on them.

Whatever is waited for is waited for by a `Watch`, which names the process that is to blame.
"""

import atexit
import io
import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_fordes._checks import FordesError, RankError
from pyro_fordes.agreement import checksum, differences, fingerprint, outline
from pyro_fordes.watch import Watch


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
        self._waiting = 0  # operations that were begun and have not ended well
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
        for one in list(groups):  # torch joins a group's threads when nothing refers to it any more
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


def _close(link: "weakref.ref[Link]") -> None:
    """Close a connection that is still there when the interpreter ends."""
    found = link()
    if found is not None:
        found.close()


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
