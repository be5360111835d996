"""What is said when a process of the DataLoader dies, and where."""

from __future__ import annotations

import signal
import time
from typing import Any

import numpy as np
import torch

from xdfast.data.batches import PADDING
from xdfast.data.sources import ImageSource
from xdfast.data.worker_signals import end

__all__ = ["is_death", "obituary", "report_when_waiting", "survive_held_lock"]

_NAMED = 3
_DYING_SECONDS = 1.0
_LIBRARY = "A library that reads images crashed: `xdfast data check DATA --full` finds the image."
_CAUSES = {
    signal.SIGKILL: "The usual cause is memory (the kernel kills the largest process): lower workers or batch_size.",
    signal.SIGBUS: "The usual cause is that /dev/shm is full (docker run --shm-size=8g): or lower workers or batch_size.",
    **dict.fromkeys((signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE), _LIBRARY),
}
_OTHER = "Something ended it from outside, or a library that reads images did."


def report_when_waiting(iterator: Any) -> None:
    """Lets the death of a worker be found where its batch is waited for, at most five seconds later.

    torch's handler of SIGCHLD would raise anywhere in the main thread: in the midst of a training step or a checkpoint.
    """
    if getattr(iterator, "_worker_pids_set", False):
        torch.utils.data._utils.signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False


def survive_held_lock(iterator: Any) -> None:
    """Lets the process that waits for batches go on where a worker died with the lock of torch's event for the end.

    Every worker looks at that event for each batch, under a lock that all processes share; one that is killed just then keeps it
    for good, and torch, having noticed the death, waited for the lock instead of telling.
    """
    event = getattr(iterator, "_workers_done_event", None)
    if event is not None and not isinstance(event, _DoneEvent):
        iterator._workers_done_event = _DoneEvent(event, iterator._workers)


class _DoneEvent:
    """``multiprocessing.Event`` for the one process that sets it: needs no lock to know whether it did."""

    def __init__(self, event: Any, processes: list[Any]) -> None:
        self._event, self._processes, self._done = event, processes, False

    def is_set(self) -> bool:
        return self._done

    def set(self) -> None:
        self._done = True
        lock = self._event._cond
        if lock.acquire(timeout=_DYING_SECONDS):
            lock.release()
            self._event.set()
        else:  # it is lost, and the workers wait for it
            end(self._processes)


def is_death(error: Exception, processes: list[Any]) -> bool:
    """True for what a DataLoader raises when a worker is gone, not for errors within workers.

    Args:
        error: a RuntimeError of torch's; or one of a connection, where what a worker had sent is gone with it before torch sees
            that it is dead.
        processes: of the DataLoader.
    """
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    given_up = time.monotonic() + _DYING_SECONDS
    while time.monotonic() < given_up:
        if any(process.exitcode is not None for process in processes):
            return True
        time.sleep(0.02)
    return False


def obituary(processes: list[Any], source: ImageSource, batch: str, ids: np.ndarray) -> str:
    """Who died and how, the usual cause, and what was waited for; nothing if all processes live.

    Args:
        processes: of the DataLoader.
        source: images.
        batch: the one waited for, in words.
        ids: int64 ``[B]`` its samples.
    """
    dead = {i: process for i, process in enumerate(processes) if process.exitcode is not None}
    if not dead:
        return ""
    who = ", ".join(f"worker {i} (pid {p.pid}) by {_ending(p.exitcode)}" for i, p in dead.items())
    cause = _CAUSES.get(-next(iter(dead.values())).exitcode, _OTHER)
    present = [int(i) for i in ids if i != PADDING]
    some = "; ".join(f"{i}: {source.path(i)}" for i in present[:_NAMED]) + ("; …" if len(present) > _NAMED else "")
    return (
        f"a loader process died: {who}. {cause} It was {batch} that was waited for, samples {some or 'unknown'}. "
        "The run continues from its last checkpoint with the same command"
    )


def _ending(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit status {code}"
