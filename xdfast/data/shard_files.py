"""Images that are byte ranges of a few large files, read by any number of processes."""

from __future__ import annotations

import os
import threading
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from xdfast.data.decode import BadImage, decode, image_size
from xdfast.data.sources import ImageSource

__all__ = ["ShardFiles", "ShardSource"]

_MAX_OPEN = 128  # descriptors a process keeps: many systems allow 1024, and a loader has pipes of its own
_MAX_BYTES = 2**30  # of one image file


class ShardFiles:
    """Reads byte ranges of some files from any process and thread.

    ``pread`` carries its own offset. Each process opens a shard when it first reads from it and keeps the last 128 open.

    Args:
        paths: the files.
        sizes: their sizes when they were indexed; a file of another size is not read, its offsets are wrong.
    """

    def __init__(self, paths: Sequence[str], sizes: Sequence[int]) -> None:
        self.paths = list(paths)
        self._sizes = list(sizes)
        self._forget()

    def read(self, shard: int, offset: int, size: int, path: str) -> bytes:
        """``size`` bytes at ``offset``.

        Args:
            path: what is read, for the error.

        Raises:
            BadImage: they cannot be read.
        """
        if size > _MAX_BYTES:
            raise BadImage(path, f"the image is larger than {_MAX_BYTES >> 20} MiB")
        try:
            opened = self._descriptor(shard, path)  # held while it is read: another thread may drop it from the dict
            data = os.pread(opened.fd, size, offset)
        except OSError as error:
            raise BadImage(path, f"the shard cannot be read ({error.strerror or error})") from error
        if len(data) != size:
            raise BadImage(path, f"the shard ends inside this image ({len(data)} of {size} bytes)")
        return data

    def _descriptor(self, shard: int, path: str) -> _Descriptor:
        if self._pid != os.getpid():
            self._forget()
        with self._lock:
            opened = self._open.pop(shard, None) or _Descriptor(self.paths[shard])
            if opened.size != self._sizes[shard]:
                raise BadImage(
                    path,
                    f"the shard has changed since it was indexed (from {self._sizes[shard]} to {opened.size} bytes); "
                    "start again to index it anew",
                )
            self._open[shard] = opened  # at the end: the first in the dict is the one not used for longest
            if len(self._open) > _MAX_OPEN:
                del self._open[next(iter(self._open))]
        return opened

    def _forget(self) -> None:
        # A fork may come while another thread holds the lock: a child makes its own.
        self._open: dict[int, _Descriptor] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_sizes": self._sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class _Descriptor:
    """Closed when the last reader lets go of it, so that no thread reads from a number that was given to another file."""

    def __init__(self, path: str) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.fd).st_size

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class ShardSource(ImageSource):
    """Images that are byte ranges of shards; a subclass sets the arrays and says what a member is called.

    Attributes:
        _files: the shards.
        _shard, _offset, _size: ``[N]`` shard of each image, its first byte there, and its length.
    """

    _files: ShardFiles
    _shard: np.ndarray
    _offset: np.ndarray
    _size: np.ndarray

    @abstractmethod
    def member(self, i: int) -> str:
        """What image ``i`` is called inside its shard."""

    def load(self, i: int) -> Image.Image:
        return decode(self.read(i), self.path(i))

    def read(self, i: int) -> bytes:
        return self._files.read(int(self._shard[i]), int(self._offset[i]), int(self._size[i]), self.path(i))

    def size(self, i: int) -> tuple[int, int]:
        return image_size(self.read(i), self.path(i))

    def path(self, i: int) -> str:
        return f"{self._files.paths[self._shard[i]]}:{self.member(i)}"

    def key(self, i: int) -> str:
        """The shard's base name and the member: does not depend on where the shards lie."""
        return f"{os.path.basename(self._files.paths[self._shard[i]])}/{self.member(i)}"

    def content_digest(self) -> bytes:
        return np.ascontiguousarray(self._size, dtype=np.int64).tobytes()  # shards keep no checksum of an image
