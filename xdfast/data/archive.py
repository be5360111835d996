"""Images in a zip archive of class folders, read in place by any number of processes."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from xdfast.data.decode import BadImage, decode, image_size
from xdfast.data.layout import Tree, find_class_folders
from xdfast.data.sources import ImageSource, PackedStrings

__all__ = ["ZipSource"]

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # signature, 5 shorts, crc and two sizes, lengths of name and extra field
_ENCRYPTED = 0x1


class ZipSource(ImageSource):
    """``CLASS/image.jpg`` or ``{train,val}/CLASS/image.jpg`` inside a zip archive, with or without a wrapping folder.

    The central directory is read once, by :mod:`zipfile`, into arrays that workers share. A member is then read with
    ``pread``, which carries its own offset: no file position is shared after a fork. Each process opens the file itself.

    Args:
        path: the archive.
        split: ``"train"`` or ``"val"``, where the archive has such parts.

    Raises:
        ValueError: not a readable zip archive, or no class folders with images inside.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.name = str(Path(path).expanduser())
        try:
            with zipfile.ZipFile(self.name) as archive:
                members = {_clean(info.filename): info for info in archive.infolist() if not info.is_dir()}
        except (zipfile.BadZipFile, EOFError, struct.error) as error:
            raise ValueError(
                f"{self.name} is not a readable zip archive ({error}); it is damaged or cut short: copy or download it again"
            ) from error
        if not members:
            raise ValueError(f"{self.name} is empty; expected CLASS/image.jpg inside")
        found = find_class_folders(_ZipTree(self.name, list(members)), split)
        infos = [members[name] for name in found.names]
        self.classes = found.classes
        self.labels = np.array(found.labels, dtype=np.int64)
        self.part = found.part
        self._base = found.base
        self._names = PackedStrings(found.names)
        self._offset = np.array([i.header_offset for i in infos], dtype=np.int64)
        self._stored = np.array([i.compress_size for i in infos], dtype=np.int64)
        self._crc = np.array([i.CRC for i in infos], dtype=np.uint32)
        self._method = np.array([i.compress_type for i in infos], dtype=np.int16)
        self._flags = np.array([i.flag_bits for i in infos], dtype=np.int32)
        self._fd = -1
        self._pid = -1

    def load(self, i: int) -> Image.Image:
        return decode(self._read(i), self.path(i))

    def size(self, i: int) -> tuple[int, int]:
        return image_size(self._read(i), self.path(i))

    def path(self, i: int) -> str:
        return f"{self.name}:{self._names[i]}"

    def key(self, i: int) -> str:
        return self._names[i].removeprefix(self._base)

    def content_digest(self) -> bytes:
        return self._crc.tobytes()

    def _read(self, i: int) -> bytes:
        """The member's bytes, checked against its CRC."""
        path = self.path(i)
        if self._flags[i] & _ENCRYPTED:
            raise BadImage(path, "the archive member is encrypted")
        try:
            fd = self._descriptor()
            header = os.pread(fd, _LOCAL_HEADER.size, int(self._offset[i]))
            signature, *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            if signature != b"PK\x03\x04":
                raise BadImage(path, "the archive is damaged here (no member where its directory says)")
            start = int(self._offset[i]) + _LOCAL_HEADER.size + name_length + extra_length
            stored = os.pread(fd, int(self._stored[i]), start)
            method = int(self._method[i])
            if method == zipfile.ZIP_STORED:
                data = stored
            elif method == zipfile.ZIP_DEFLATED:
                data = zlib.decompress(stored, wbits=-zlib.MAX_WBITS)
            else:  # bzip2, LZMA…: rare for images, left to the standard library
                with zipfile.ZipFile(self.name) as archive:
                    return archive.read(next(m for m in archive.infolist() if m.header_offset == self._offset[i]))
        except (OSError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError, EOFError) as error:
            raise BadImage(path, f"the archive member cannot be read ({error})") from error
        if zlib.crc32(data) != int(self._crc[i]):
            raise BadImage(path, "the archive member is damaged (its CRC differs)")
        return data

    def _descriptor(self) -> int:
        if self._pid != os.getpid():
            self._fd, self._pid = os.open(self.name, os.O_RDONLY), os.getpid()
        return self._fd

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fd": -1, "_pid": -1}

    def __del__(self) -> None:
        if getattr(self, "_pid", -1) == os.getpid():
            os.close(self._fd)


def _clean(name: str) -> str:
    """``./a//b`` and ``a\\b`` (some Windows tools) as ``a/b``."""
    return str(PurePosixPath(name.replace("\\", "/")))


class _ZipTree(Tree):
    def __init__(self, root: str, names: list[str]) -> None:
        self.root = root
        self._folders: dict[str, set[str]] = {}
        self._files: dict[str, list[str]] = {"": []}
        for name in names:
            parts = PurePosixPath(name).parts
            if parts[0] == "__MACOSX" or any(p.startswith(".") for p in parts):
                continue  # what macOS adds, and hidden files
            folder = ""
            for part in parts[:-1]:
                self._folders.setdefault(folder, set()).add(part)
                folder = f"{folder}/{part}" if folder else part
            self._files.setdefault(folder, []).append(parts[-1])

    def folders(self, folder: str) -> list[str]:
        return sorted(self._folders.get(folder, ()))

    def files(self, folder: str) -> list[str]:
        return sorted(self._files.get(folder, ()))

    def walk(self, folder: str) -> list[str]:
        names = [f"{folder}/{name}" for name in self._files.get(folder, ())]
        for inner in self._folders.get(folder, ()):
            names += self.walk(f"{folder}/{inner}")
        return sorted(names)
