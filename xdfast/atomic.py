"""Files that are whole or not there: written aside, flushed to the disk, then renamed into place. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["write_whole"]


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Makes ``path`` hold what ``write(aside)`` puts into ``aside``, a file beside it; all of it, or nothing changes.

    Whatever stops the writing (disk full, a kill, an exception), an older file at ``path`` stays as it was. A kill can
    leave the file aside behind: its name starts with a dot and ends in ``.aside``.

    Raises:
        OSError: the file cannot be written; whatever else ``write`` raises comes through as it is.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
    try:
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut, where folders can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
