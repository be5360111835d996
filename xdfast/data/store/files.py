"""Files of a store: allocate, write, map, lock.

Rows are written with ``pwrite`` and read through a mapping. A store into mapped memory of a full disk would kill the process
(SIGBUS); ``pwrite`` raises. Both see the same page cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

__all__ = ["StoreFull", "disk_bytes", "is_full", "locked", "make_file", "map_file", "pwrite_all", "replace_text"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_ALLOCATE = (errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_ZEROS = bytes(1 << 20)


class StoreFull(OSError):
    """The disk, a quota or a file size limit leaves no room for more rows. Rows written before stay readable."""


def is_full(error: OSError) -> bool:
    return error.errno in _FULL


def full(error: OSError, folder: Path, need: int, kept: str) -> StoreFull:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    return StoreFull(
        error.errno,
        f"{folder}: no room for the teacher's outputs ({error.strerror}): {need:,} bytes needed, {free:,} bytes free. "
        f"{kept}; free some space (or raise the quota or limit) and run again: it continues from there",
    )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time makes files in ``folder``; a crash lets go of the lock.

    Raises:
        OSError: the file system has no locks.
    """
    with open(folder / "lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            raise OSError(
                error.errno,
                f"{folder}: this file system has no file locks ({error.strerror}), which processes need to make the store "
                "together; put it on a local disk, or mount with locks (Lustre: -o flock)",
            ) from error
        yield


def make_file(path: Path, size: int) -> None:
    """Makes or extends a file to ``size`` bytes that the disk has set aside; new bytes are zero, old ones stay.

    A new file appears under its name only when it is whole. Hold the lock.

    Raises:
        OSError: no room; nothing is left behind.
    """
    present = path.exists()
    made = path if present else path.with_name(path.name + ".new")
    fd = os.open(made, os.O_RDWR | os.O_CREAT | (0 if present else os.O_TRUNC), 0o666)
    try:
        _allocate(fd, size)
    except OSError:
        if not present:
            made.unlink()
        raise
    finally:
        os.close(fd)
    if not present:
        os.replace(made, path)


def _allocate(fd: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in _CANNOT_ALLOCATE:
                raise
    at = os.fstat(fd).st_size
    while at < size:
        pwrite_all(fd, _ZEROS[: size - at], at)
        at += min(len(_ZEROS), size - at)


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """``pwrite`` may write a part, on a disk that is nearly full."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def map_file(path: Path, size: int) -> tuple[mmap.mmap, np.ndarray] | None:
    """A read-only mapping of the first ``size`` bytes, and as uint8; None if the file is not there or shorter."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if os.fstat(fd).st_size < size:  # touching pages past the end would kill the process
            return None
        mapping = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
    finally:
        os.close(fd)
    return mapping, np.frombuffer(mapping, dtype=np.uint8)


def replace_text(path: Path, text: str) -> None:
    """Readers find the old file or the whole new one, also after a power cut."""
    made = path.with_name(path.name + ".new")
    try:
        with open(made, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        made.unlink(missing_ok=True)
        raise
    os.replace(made, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Brings a file, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def disk_bytes(folder: Path) -> int:
    """What the files of ``folder`` take up, unwritten holes not counted."""
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir() if file.is_file())
