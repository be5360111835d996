"""One process trains in a run's folder: a second one would write over its checkpoints."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

from xdfast import distributed

__all__ = ["alone_in", "turn_in"]

log = logging.getLogger("xdfast")

LOCK_FILE = "lock"
POLL_SECONDS = 1.0


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Holds the folder for this process (of several ranks: the first) and its end, however it ends.

    A POSIX record lock: unlike ``flock`` it is not inherited by loader workers, which outlive a killed parent by seconds.
    Where there are none (Windows, some network file systems) nothing is locked, and a log line says so. A process that holds
    a folder must not take it again: closing the second file would free the first one's lock.

    Raises:
        RuntimeError: another process trains there; names it.
    """
    if not distributed.is_main():
        yield
        return
    with open(out / LOCK_FILE, "a+", encoding="utf-8") as file:
        if not _taken(file):
            raise RuntimeError(
                f"another process ({_holder(file)}) is training in {out}; wait for it or stop it, or choose another out folder"
            )
        yield


@contextmanager
def turn_in(out: Path, what: str) -> Iterator[None]:
    """Like :func:`alone_in`, but waits until the other process is done, for work that is then found done.

    All ranks wait together: each asks rank 0 every second, so that no collective call of theirs times out.

    Args:
        out: the folder.
        what: what is waited for, for the log.
    """
    with open(out / LOCK_FILE, "a+", encoding="utf-8") if distributed.is_main() else nullcontext() as file:
        told = False
        while distributed.any_rank(file is not None and not _taken(file)):
            if file is not None and not told:
                log.info("another process (%s) works on %s in %s; waiting for it", _holder(file), what, out)
                told = True
            time.sleep(POLL_SECONDS)
        yield


def _taken(file: TextIO) -> bool:
    """Tries to take the lock of an open file, without waiting, and writes who holds it."""
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError) as error:
        log.info("%s is not locked against a second process: %s", Path(file.name).parent, error)
    file.truncate(0)
    file.write(f"number {os.getpid()}")
    file.flush()
    return True


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read().strip() or "unknown"
