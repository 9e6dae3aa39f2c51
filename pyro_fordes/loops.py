"""Loops over steps: batches and epochs, progress bars, checkpoints and interruptions."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from pyro_fordes._checks import (
    ArgumentError,
    CheckpointError,
    StateError,
    check_positive_int,
)
from pyro_fordes._random import global_state, set_global_state
from pyro_fordes.checkpoint import check_writable, newest, write_numbered
from pyro_fordes.particles import OneProcess

Callback = Callable[[Any, int, float], Any]
"""Called as ``callback(inference, step, loss)``; True stops the loop."""

CHECKPOINT_EVERY = timedelta(minutes=5)


class Losses:
    """The loss of every step, all but the last ones in one tensor on the CPU.

    A tensor for each of many steps takes far more memory than its number.

    Args:
        done: losses of earlier steps.

    Example:
        >>> losses = Losses()
        >>> losses.append(torch.tensor(1.5))
        >>> losses.all()
        tensor([1.5000])
    """

    def __init__(self, done: Tensor | None = None) -> None:
        self._done = done
        self._new: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._new) + (0 if self._done is None else len(self._done))

    def append(self, loss: Tensor) -> None:
        """Add that of a step, which is not read yet."""
        self._new.append(loss)
        if len(self._new) >= 1000:
            self.all()

    def all(self) -> Float[Tensor, " step"]:
        """All of them; one copy brings the new ones to the CPU."""
        if self._new:
            new = torch.stack(self._new).cpu()
            self._done = new if self._done is None else torch.cat([self._done, new])
            self._new = []
        return torch.zeros(0) if self._done is None else self._done


@dataclass
class Position:
    """How far `fit` has come.

    Attributes:
        epoch: finished epochs.
        batch: finished batches of the present epoch.
        losses: the loss of every step.
        epoch_random: global random state at the start of the present epoch, from which a data
            loader draws its order.
        loader: the loader, for its own generators.
        random: global random state when the position was saved.
        folder: where the checkpoints of the run are, if that is known.
    """

    epoch: int = 0
    batch: int = 0
    losses: Losses = field(default_factory=Losses)
    epoch_random: dict[str, Any] | None = None
    loader: Any = None
    random: dict[str, Any] | None = None
    folder: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "losses": self.losses.all() if len(self.losses) else None,
            "epoch_random": self.epoch_random,
            "random": global_state(self.loader),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Position":
        """The position that `state_dict` has noted."""
        return cls(
            state["epoch"],
            state["batch"],
            Losses(state["losses"]),
            state["epoch_random"],
            random=state["random"],
        )


@dataclass
class Saver:
    """Writes a checkpoint every so many steps or so much time."""

    folder: Path
    every: int | timedelta
    keep: int
    inference: Any
    last: float = field(default_factory=time.monotonic)
    written: tuple[int, ...] = ()
    failed: bool = False

    def due(self, step: int) -> bool:
        """Whether it is time for the next one."""
        if isinstance(self.every, int):
            return step % self.every == 0
        return time.monotonic() - self.last >= self.every.total_seconds()

    def save(self) -> None:
        """Write one, unless the last is of this place."""
        self.inference._read_faults()  # a step that failed is not kept
        position = self.inference._position
        place = (self.inference._step, position.epoch, position.batch)
        if place != self.written:
            state = self.inference._state()
            self.inference._gather.first(
                lambda: str(write_numbered(self.folder, place[0], state, self.keep))
            )
        self.written, self.last = place, time.monotonic()

    def try_to_save(self) -> None:
        """Write one on the way: a disk that is full for a while does not end the run."""
        try:
            self.save()
        except CheckpointError as error:
            self.last = time.monotonic()
            if not self.failed:
                warnings.warn(
                    f"{error}. The run goes on and tries again when the next one is due; free "
                    f"some space",
                    stacklevel=6,
                )
            self.failed = True


class Interruptions:
    """Lets a step finish before SIGTERM or Ctrl-C ends the loop; a second Ctrl-C ends it at once.

    Signals can only be caught in the main thread; elsewhere nothing is changed.
    """

    def __init__(self, active: bool) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.received: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interruptions":
        if self.active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def end(self) -> None:
        """Do what the signal asked for, now that all is saved; it may have reached others only."""
        if self.received == signal.SIGINT:
            raise _Interrupted
        raise _Ended(128 + (self.received or signal.SIGTERM))


class _Interrupted(KeyboardInterrupt):
    """Ctrl-C, raised by all processes of a distributed run at the same step."""

    everywhere = True


class _Ended(SystemExit):
    """The end that a signal asked for, in all processes of a distributed run at the same step."""

    everywhere = True


def run_steps(
    inference: Any,
    num_steps: int,
    args: tuple,
    kwargs: Mapping[str, Any],
    progress_bar: bool,
    callback: Callback | None,
) -> Float[Tensor, " step"]:
    """See ``ParticleInference.run``."""
    check_positive_int("num_steps", num_steps)
    _check_callback(callback)
    losses = Losses()
    progress_bar = progress_bar and inference._gather.leads
    with tqdm(total=num_steps, disable=not progress_bar, unit="step") as bar:
        for _ in range(num_steps):
            loss = inference._update(args, kwargs)
            losses.append(loss)
            if _after(inference, loss, bar, callback):
                break
    inference._read_faults()
    return losses.all()


def fit_epochs(
    inference: Any,
    loader: Iterable[Any],
    num_epochs: int,
    progress_bar: bool,
    callback: Callback | None,
    checkpoint: str | Path | None,
    checkpoint_every: int | timedelta | None,
    keep: int,
) -> Float[Tensor, " step"]:
    """See ``ParticleInference.fit``."""
    _check_fit(loader, num_epochs, callback)
    if inference._position is not None:
        raise StateError(
            "fit was called by a callback of fit; return True to end the outer one, and call fit "
            "again after it (run and step may be called in between)"
        )
    saver, position = None, Position()
    if checkpoint is not None:
        if not isinstance(checkpoint, str | Path):
            raise ArgumentError(f"fit(checkpoint=...) must be a folder's name, got {checkpoint!r}")
        every = CHECKPOINT_EVERY if checkpoint_every is None else checkpoint_every
        saver = Saver(Path(checkpoint), _checked_every(every), keep, inference)
        check_positive_int("keep", keep)
        position = _resume(inference, checkpoint, loader)
        check_writable(checkpoint)
    elif checkpoint_every is not None:
        raise ArgumentError("fit(checkpoint_every=...) needs a folder: fit(checkpoint=...)")
    position.loader = loader
    inference._position = position
    length = len(loader) if isinstance(loader, Sized) else None
    total = None if length is None else num_epochs * length
    shown = progress_bar and inference._gather.leads
    bar = tqdm(total=total, initial=len(position.losses), disable=not shown, unit="step")
    try:
        with bar, Interruptions(saver is not None) as interruptions:
            for epoch in range(position.epoch, num_epochs):
                bar.set_description(f"epoch {epoch + 1}/{num_epochs}")
                if _epoch(inference, loader, position, bar, callback, saver, interruptions):
                    break
            inference._read_faults()
            if saver is not None:
                saver.save()
    finally:
        # A fit without checkpoints is not gone on with: the next one begins anew.
        inference._position = None
        inference._resumable = position if saver is not None else None
    return position.losses.all()


def _epoch(
    inference: Any,
    loader: Iterable[Any],
    position: Position,
    bar: Any,
    callback: Callback | None,
    saver: Saver | None,
    interruptions: Interruptions,
) -> bool:
    """The rest of an epoch; returns whether the callback asked to stop."""
    _begin_epoch(loader, position.epoch)
    for batch in _batches(inference, loader, position):
        args, kwargs = arguments(batch)
        loss = inference._update(args, kwargs)
        position.losses.append(loss)
        position.batch += 1
        stop = _after(inference, loss, bar, callback)
        if saver is not None or callback is not None:
            signalled = interruptions.received is not None
            due = saver is not None and saver.due(inference._step)
            stop, signalled, due = inference._gather.any(stop, signalled, due)
            if saver is not None and (stop or signalled):
                saver.save()
            elif saver is not None and due:
                saver.try_to_save()
            if signalled:
                interruptions.end()
        if stop:
            return True
    with inference._gather.together(f"the end of an epoch after {position.batch} batches"):
        pass  # a process with more batches is at its next step, and is told so
    if position.batch == 0:
        raise ArgumentError(
            "the loader gave no batch; is the data set empty, or drop_last=True with "
            "fewer points than a batch?"
        )
    inference._batches_per_epoch = max(inference._batches_per_epoch, position.batch)
    inference._stepper.end_epoch(float(position.losses.all()[-position.batch :].nanmean()))
    position.epoch, position.batch, position.epoch_random = position.epoch + 1, 0, None
    return False


def _begin_epoch(loader: Any, epoch: int) -> None:
    """Let samplers that shuffle by the number of the epoch (``DistributedSampler``) know it."""
    for sampler in (getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        set_epoch = getattr(sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def _batches(inference: Any, loader: Iterable[Any], position: Position) -> Iterable[Any]:
    """The batches of an epoch that are not done yet, in the order they had at first.

    Several processes all take the order of the first.
    """
    gather = inference._gather
    done = position.batch
    if done == 0:
        position.epoch_random = gather.first(lambda: global_state(loader))
        if not isinstance(gather, OneProcess):
            set_global_state(position.epoch_random, loader)
        return loader
    if position.epoch_random is not None:
        set_global_state(position.epoch_random, loader)
    iterator = iter(loader)
    batch: Any = None
    for index in range(done):
        batch = next(iterator, _END)
        if batch is _END:
            raise CheckpointError(
                f"the checkpoint was written after {done} batches of an epoch, but the loader gave "
                f"only {index}; use the loader that it was written with"
            )
    # There may be no further batch, and the end of the epoch must meet the optimiser's state.
    args, kwargs = arguments(batch)
    inference.setup(*args, **kwargs)
    if position.random is not None:
        set_global_state(position.random, loader)
        position.random = None
    return iterator


_END = object()


def _resume(inference: Any, folder: str | Path, loader: Any) -> Position:
    """Where to go on: at the newest checkpoint, or where the inference is if that is further."""
    if Path(folder).is_file():
        raise CheckpointError(f"fit(checkpoint=...) must be a folder, but {folder} is a file")
    state, skipped = inference._gather.first(lambda: newest(folder))
    if state is None and skipped:
        raise CheckpointError(
            f"none of the {len(skipped)} checkpoints in {folder} can be used: {skipped[0]}; "
            f"delete or rename the folder to start anew"
        )
    # What has no step is no state of an inference, and is refused as that.
    if state is not None and state.get("step", math.inf) > inference._step:
        for message in skipped:
            warnings.warn(f"{message}; an older checkpoint is used", stacklevel=4)
        inference.load_state_dict(state)
    position, place = inference._resumable or Position(), Path(folder).resolve()
    if position.folder not in (None, place):  # that of another run, which is over
        position = Position()
    position.folder = place
    if len(position.losses) and getattr(loader, "persistent_workers", False):
        warnings.warn(
            "the loader keeps its workers from epoch to epoch (persistent_workers=True), and the "
            "random states they had are lost; if the data set draws random numbers, this run will "
            "differ from one that was not cut off. DataLoader(persistent_workers=False) resumes "
            "exactly",
            stacklevel=4,
        )
    if position.batch == 0 and position.random is not None:
        set_global_state(position.random, loader)
        position.random = None
    return position


def _after(inference: Any, loss: Tensor, bar: Any, callback: Callback | None) -> bool:
    """Show and report a step; returns whether the callback asked to stop."""
    step = inference._step - 1
    bar.update()
    # Reading a number waits for the device, so not at every step.
    shown = not bar.disable and step % 10 == 0
    if shown or callback is not None:
        inference._read_faults()
    if shown:
        numbers = {"loss": f"{loss.item():.4g}"}
        if inference._diagnostics is not None:  # an old state had none
            numbers["force_ratio"] = f"{inference.diagnostics()['force_ratio']:.2g}"
        bar.set_postfix(numbers)
    return callback is not None and _stops(callback(inference, step, loss.item()))


def _stops(answer: Any) -> bool:
    """Whether a callback returned True, which numpy and torch have kinds of their own of."""
    if isinstance(answer, Tensor) and answer.dtype == torch.bool and answer.numel() == 1:
        answer = answer.item()
    return answer is True or (isinstance(answer, np.bool_) and bool(answer))


def size_of(loader: Any) -> dict[str, Any]:
    """How many batches an epoch has, by a name for messages; nothing where that is not known.

    Example:
        >>> size_of([1, 2])
        {'number of batches per epoch': 2}
    """
    try:
        return {"number of batches per epoch": len(loader)}
    except TypeError:  # no length, or no loader at all, which `fit` refuses itself
        return {}


def arguments(batch: Any) -> tuple[tuple, dict[str, Any]]:
    """A batch as positional and keyword arguments of the model."""
    if isinstance(batch, Mapping):
        if not all(isinstance(name, str) for name in batch):
            raise ArgumentError(
                f"the keys of a batch that is a mapping must be names of arguments of the model, "
                f"got {list(batch)}"
            )
        return (), dict(batch)
    if isinstance(batch, tuple | list):
        return tuple(batch), {}
    return (batch,), {}


def _check_fit(loader: Any, num_epochs: int, callback: object) -> None:
    """Refuse loaders that cannot give the epochs, before any step is taken."""
    check_positive_int("num_epochs", num_epochs)
    _check_callback(callback)
    if not isinstance(loader, Iterable):
        raise ArgumentError(
            f"loader must be an iterable of batches, such as a torch DataLoader, got "
            f"{type(loader).__name__}"
        )
    if num_epochs > 1 and isinstance(loader, Iterator):
        raise ArgumentError(
            f"loader is an iterator ({type(loader).__name__}), which is empty after one epoch, "
            f"but num_epochs is {num_epochs}; pass a list or a DataLoader"
        )


def _checked_every(every: object) -> int | timedelta:
    """A number of steps or a time, checked."""
    if isinstance(every, timedelta) and every > timedelta(0):
        return every
    if isinstance(every, timedelta):
        raise ArgumentError(f"fit(checkpoint_every=...) must be above zero, got {every}")
    return check_positive_int("fit(checkpoint_every=...)", every)


def _check_callback(callback: object) -> None:
    """Refuse a callback that cannot be called, before any step is taken."""
    if callback is not None and not callable(callback):
        raise ArgumentError(
            f"callback must be a function of (inference, step, loss), got {callback!r}"
        )
