"""One process trains in a run's folder: a second one would write over its checkpoints."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xdfast import distributed

__all__ = ["alone_in"]

log = logging.getLogger("xdfast")

LOCK_FILE = "lock"


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Holds the folder for this process (of several ranks: the first) and its end, however it ends.

    A POSIX record lock: unlike ``flock`` it is not inherited by loader workers, which outlive a killed parent by seconds.
    Where there are none (Windows, some network file systems) nothing is locked, and a log line says so.

    Raises:
        RuntimeError: another process trains there; names it.
    """
    if not distributed.is_main():
        yield
        return
    with open(out / LOCK_FILE, "a+", encoding="utf-8") as file:
        try:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise RuntimeError(
                f"another process ({holder}) is training in {out}; wait for it or stop it, or choose another out folder"
            ) from error
        except (ImportError, OSError) as error:
            log.info("%s is not locked against a second process: %s", out, error)
        file.truncate(0)
        file.write(f"number {os.getpid()}")
        file.flush()
        yield
