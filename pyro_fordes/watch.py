"""Which process of a distributed run has failed: signs of life, and waiting that gives up.

Every process notes in the run's store, once a second and from a thread of its own, that it lives
and how far it has come. Whoever waits for the others reads these notes, so that a process that
died, hangs or went elsewhere is named.
"""

import itertools
import threading
import time
import weakref
from datetime import timedelta
from typing import Any, NoReturn

from pyro_fordes._checks import RankError

INTERVAL = 1.0
"""Seconds between signs of life, and between looks at those of others."""

_numbers = itertools.count()


class Watch:
    """Signs of life of this process, and a look at those of the others.

    Args:
        store: a ``torch.distributed.Store`` that all processes see.
        rank: number of this process.
        size: number of processes.
        timeout: how long a process that lives may keep the others waiting.
        silence: after how long without a sign of life a process counts as dead.
    """

    def __init__(
        self, store: Any, rank: int, size: int, timeout: timedelta, silence: timedelta
    ) -> None:
        from torch.distributed import PrefixStore

        # A connection of its own: the store of the process group may be waiting for something.
        own = store.clone() if hasattr(store, "clone") else store
        self.store = PrefixStore(f"pyro_fordes/{next(_numbers)}", own)
        self.store.set_timeout(silence)
        self.rank, self.size = rank, size
        self.timeout, self.silence = timeout.total_seconds(), silence.total_seconds()
        self._note = ["0", "start"]  # how many waits were begun, and what for
        stop = threading.Event()
        self.store.set(f"life/{rank}", "0 0 start")
        arguments = (self.store, f"life/{rank}", self._note, stop)
        thread = threading.Thread(target=_live, args=arguments, name="signs of life", daemon=True)
        thread.start()
        weakref.finalize(self, _end, thread, stop)

    def at(self, place: str) -> None:
        """Note what this process does, for the others to read."""
        self._note[1] = place

    def wait(self, work: Any) -> None:
        """Wait for a collective operation.

        Args:
            work: what torch.distributed gave for it.

        Raises:
            RankError: if it fails or takes too long, naming who is to blame.
        """
        self._note[0] = str(int(self._note[0]) + 1)
        began = time.monotonic()
        lives: dict[int, tuple[str, float]] = {}
        failure: RuntimeError | None = None
        failed = 0.0
        while True:
            try:
                if failure is None:
                    work.wait(timedelta(seconds=INTERVAL))
                    return
                time.sleep(INTERVAL)
            except RuntimeError as error:
                if work.is_completed():
                    failure, failed = error, time.monotonic()
            self._look(lives, began)
            if failure is not None and time.monotonic() - failed > 2 * self.silence:
                self.stop(
                    f"a connection between processes broke at: {self._note[1]}, though all of "
                    f"them give signs of life: {failure}"
                )

    def _look(self, lives: dict[int, tuple[str, float]], began: float) -> None:
        """Raise if some process is to blame for the waiting."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            if self.store.check(["trouble"]):
                self.stop(self.store.get("trouble").decode())
            notes = self.store.multi_get([f"life/{rank}" for rank in others])
        except RankError:
            raise
        except Exception as error:
            raise RankError(
                f"rank {self.rank} lost the store of the run ({type(error).__name__}); where "
                f"torchrun does not hold it, rank 0 does, and has died then"
            ) from error
        now, late = time.monotonic(), []
        for rank, note in zip(others, notes, strict=True):
            text = note.decode()
            if rank not in lives or lives[rank][0] != text:
                lives[rank] = text, now
            _, arrived, doing = text.split(" ", 2)
            if now - lives[rank][1] > self.silence:
                self.stop(
                    f"rank {rank} has given no sign of life for {self.silence:.0f} seconds; the "
                    f"last was at: {doing}. It has died or was stopped"
                )
            if int(arrived) < int(self._note[0]):
                late.append(f"rank {rank} (at: {doing})")
        if now - began > self.timeout:
            who = " and ".join(late) or "no rank in particular"
            self.stop(
                f"{who} kept the others waiting for more than {self.timeout:.0f} seconds at: "
                f"{self._note[1]}. It hangs, or does something else than the others; if a step may "
                f"take that long, raise Ranks(timeout=...)"
            )

    def report(self, message: str) -> str:
        """Tell the others why this process stops; returns the first such message of the run."""
        try:
            return self.store.compare_set("trouble", "", message).decode()
        except Exception:  # nobody is there to be told
            return message

    def stop(self, message: str) -> NoReturn:
        """Report a failure and raise it."""
        message = self.report(message)
        try:
            self.store.set(f"knows/{self.rank}", "")
            if self.rank == 0:  # the store may end with this process, and others want to read it
                keys = [f"knows/{rank}" for rank in range(1, self.size)]
                until = time.monotonic() + 2 * INTERVAL
                while time.monotonic() < until and not self.store.check(keys):
                    time.sleep(INTERVAL / 10)
        except Exception:
            pass
        raise RankError(message)

    def exchange(self, key: str, text: str) -> list[str]:
        """Texts of all processes, those that come in time: for messages after a failure."""
        self.store.set(f"{key}/{self.rank}", text)
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        until = time.monotonic() + self.silence
        while time.monotonic() < until and not self.store.check(keys):
            time.sleep(INTERVAL / 10)
        return [self.store.get(one).decode() if self.store.check([one]) else "" for one in keys]


def _end(thread: threading.Thread, stop: threading.Event) -> None:
    """End a thread before the interpreter does, which would end the process with it."""
    stop.set()
    thread.join(2 * INTERVAL)


def _live(store: Any, key: str, note: list[str], stop: threading.Event) -> None:
    """Give signs of life until told to stop or there is nobody to give them to."""
    for count in itertools.count(1):
        if stop.wait(INTERVAL):
            return
        try:
            store.set(key, f"{count} {note[0]} {note[1]}")
        except Exception:
            return
