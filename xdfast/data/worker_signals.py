"""SIGTERM and Ctrl-C reach every process of a job; the processes of a DataLoader leave them to the one that trains.

Slurm, systemd and terminals send them to all. A worker that ended would take its batches with it, and the main process would
fail where it should save and end in order.
"""

from __future__ import annotations

import atexit
import os
import signal
import weakref
from collections.abc import Iterable
from typing import Any

__all__ = ["end", "leave_signals_to_parent", "look_after"]

_STARTED: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # process → who started it


def leave_signals_to_parent(worker: int) -> None:
    """For ``worker_init_fn``: SIGTERM and SIGINT do nothing here. Whoever starts such processes has to :func:`look_after` them.

    Args:
        worker: its number; not used.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _nothing)  # a function: SIG_IGN would be inherited by programs that a data set starts


def look_after(processes: Iterable[Any]) -> None:
    """Ends them with this process, at the latest: multiprocessing would send SIGTERM and wait for ever."""
    _STARTED.update((process, os.getpid()) for process in processes)


def end(processes: Iterable[Any]) -> None:
    """Kills those that still run."""
    for process in processes:
        if process.is_alive():
            process.kill()


@atexit.register  # after multiprocessing's, so before it
def _end_all() -> None:
    end([process for process, parent in _STARTED.items() if parent == os.getpid()])  # not those of a fork's parent


def _nothing(number: int, frame: Any) -> None:
    """A handler."""
