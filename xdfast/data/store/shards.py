"""The rows and the index of an open store, as bytes: no shapes, no meaning.

An index entry is 8 bytes, little-endian: bit 0 present, bits 1-31 a CRC of the row, bits 32-63 the digest of the image. 0 is
an absent row. The CRC starts from the row's number and the digest, so a row in the wrong place does not pass for another.
An entry is written after its row and, where a row is replaced, zeroed before it: a killed writer leaves absent rows, never
half rows. After a power cut the disk may hold the entry without the row; then the CRC tells.
"""

from __future__ import annotations

import mmap
import os
import zlib
from pathlib import Path

import numpy as np

from xdfast.data.store.files import locked, make_file, map_file, pwrite_all, sync
from xdfast.data.store.layout import ENTRY_BYTES, Layout

__all__ = ["INDEX", "SHARDS", "Shards"]

INDEX = "index.bin"
SHARDS = "rows-*.bin"
_PAGE = mmap.PAGESIZE


class Shards:
    """Opens the index, which must be there and whole."""

    def __init__(self, folder: Path, layout: Layout, read_only: bool) -> None:
        self.folder = folder
        self.layout = layout
        mapped = map_file(folder / INDEX, layout.total * ENTRY_BYTES)
        if mapped is None:
            raise ValueError(
                f"{folder / INDEX} is missing or cut short: nothing was changed; restore the file, or delete {folder} and "
                "fill a new one"
            )
        self.index = mapped[1].view("<u8")
        # A file object: it closes itself with the store, also where nobody calls close().
        self._file = None if read_only else open(folder / INDEX, "r+b", buffering=0)  # noqa: SIM115
        self._index_fd = self._file.fileno() if self._file else -1
        self._mapped: dict[int, tuple[mmap.mmap, np.ndarray]] = {}
        self._made: set[int] = set()  # seen whole by this process
        self._dirty: set[int] = set()

    def close(self) -> None:
        self._mapped.clear()  # the mapping goes with its last array
        self.index = np.zeros(0, dtype="<u8")
        if self._file is not None:
            self._file.close()

    def path(self, shard: int) -> Path:
        return self.folder / f"rows-{shard:05d}.bin"

    def missing_bytes(self) -> int:
        """Of shards that have no file yet."""
        return sum(self.layout.shard_bytes(s) for s in range(self.layout.shards) if not self.path(s).exists())

    def count(self) -> int:
        step = 1 << 20  # bounds the temporary
        return sum(int(np.count_nonzero(self.index[i : i + step] & 1)) for i in range(0, len(self.index), step))

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of rows, uint8 ``[B, row_bytes]``; zeros where the shard is missing or cut short."""
        shard, local = np.divmod(rows, self.layout.block)
        gathered = np.zeros((len(rows), self.layout.row_bytes), dtype=np.uint8)
        for s in np.unique(shard):
            mapped = self._map(int(s))
            if mapped is not None:
                here = np.flatnonzero(shard == s)
                gathered[here] = mapped[1][local[here]]
        return gathered

    def crcs(self, packed: np.ndarray, rows: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """31 bits of each row's CRC, uint64 ``[B]``."""
        starts = ((rows.astype(np.uint64) + digests) & 0xFFFFFFFF).tolist()
        size = self.layout.row_bytes
        view = packed.reshape(-1).data
        crc32 = zlib.crc32
        crcs = [crc32(view[i * size : i * size + size], start) for i, start in enumerate(starts)]
        return np.array(crcs, dtype=np.uint64) & 0x7FFFFFFF

    def sound(self, packed: np.ndarray, rows: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """Which rows are the bytes their entries were made from, bool ``[B]``."""
        return self.crcs(packed, rows, entries >> 32) == (entries >> 1) & 0x7FFFFFFF

    def make(self, rows: np.ndarray) -> None:
        """Allocates the shards of ``rows``.

        Raises:
            OSError: no room.
        """
        for s in np.unique(rows // self.layout.block).tolist():
            if s in self._made:
                continue
            path, size = self.path(s), self.layout.shard_bytes(s)
            with locked(self.folder):  # another process may be making it
                if not path.exists() or path.stat().st_size < size:
                    make_file(path, size)
            self._made.add(s)

    def put(self, rows: np.ndarray, packed: np.ndarray, digests: np.ndarray) -> None:
        """Writes rows, sorted and each once, whose shards are made."""
        if not len(rows):
            return
        entries = (digests << np.uint64(32)) | (self.crcs(packed, rows, digests) << np.uint64(1)) | np.uint64(1)
        entries = entries.astype("<u8")
        for row in rows[self.index[rows] != 0].tolist():
            pwrite_all(self._index_fd, bytes(ENTRY_BYTES), row * ENTRY_BYTES)
        shard, local = np.divmod(rows, self.layout.block)
        # Consecutive rows of a shard are one write.
        cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(shard) != 0)) + 1
        fd, opened = -1, -1
        try:
            for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)]):
                s = int(shard[start])
                if s != opened:
                    if fd >= 0:
                        os.close(fd)
                        fd = -1
                    fd, opened = os.open(self.path(s), os.O_WRONLY), s
                    self._dirty.add(s)
                pwrite_all(fd, packed[start:stop].tobytes(), int(local[start]) * self.layout.row_bytes)
                # Aligned, so no entry is ever half old and half new on a page.
                pwrite_all(self._index_fd, entries[start:stop].tobytes(), int(rows[start]) * ENTRY_BYTES)
        finally:
            if fd >= 0:
                os.close(fd)

    def forget(self, rows: np.ndarray, entries: np.ndarray) -> None:
        """Zeroes entries that are still the given ones."""
        for row in rows[self.index[rows] == entries].tolist():
            pwrite_all(self._index_fd, bytes(ENTRY_BYTES), row * ENTRY_BYTES)

    def flush(self) -> None:
        """Rows first: an entry on the disk then has its row there too."""
        for s in sorted(self._dirty):
            sync(self.path(s))
        if self._dirty:
            sync(self.folder)  # the names of new shards
        self._dirty.clear()
        if self._file is not None:
            os.fsync(self._index_fd)

    def prefetch(self, rows: np.ndarray) -> None:
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        rows = np.sort(rows)
        shard, local = np.divmod(rows, self.layout.block)
        size = self.layout.row_bytes
        for s in np.unique(shard).tolist():
            mapped = self._map(s)
            if mapped is None:
                continue
            start = local[shard == s] * size
            first, last = start // _PAGE * _PAGE, start + size
            for a, b in zip(first.tolist(), last.tolist()):
                mapped[0].madvise(mmap.MADV_WILLNEED, a, b - a)

    def _map(self, shard: int) -> tuple[mmap.mmap, np.ndarray] | None:
        found = self._mapped.get(shard)
        if found is None:
            mapped = map_file(self.path(shard), self.layout.shard_bytes(shard))
            if mapped is None:
                return None  # not remembered: another process may make it
            found = mapped[0], mapped[1].reshape(-1, self.layout.row_bytes)
            self._mapped[shard] = found
        return found
