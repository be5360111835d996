"""Images in a zip archive of class folders, read in place by any number of processes."""

from __future__ import annotations

import logging
import lzma
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xdfast.data.decode import BadImage, decode, image_size
from xdfast.data.layout import Tree, find_class_folders, is_ignored
from xdfast.data.sources import ImageSource, PackedStrings

__all__ = ["NameTree", "ZipSource"]

log = logging.getLogger("xdfast")

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # signature, 5 shorts, crc and two sizes, lengths of name and extra field
_ENCRYPTED = 0x1
_MAX_BYTES = 2**30  # of one image file; a member that unpacks to more is damage or malice, not a picture


class ZipSource(ImageSource):
    """``CLASS/image.jpg`` or ``{train,val}/CLASS/image.jpg`` inside a zip archive, with or without a wrapping folder.

    The central directory is read once, by :mod:`zipfile`, into arrays that workers share. A member is then read with
    ``pread``, which carries its own offset: no file position is shared after a fork. Each process opens the file itself.
    Nothing is unpacked to disk; members with ``..`` in their name are left out with a warning.

    Args:
        path: the archive.
        split: ``"train"`` or ``"val"``, where the archive has such parts.

    Raises:
        ValueError: not a readable zip archive, an encrypted one, or no class folders with images inside.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.name = str(Path(path).expanduser())
        try:
            with zipfile.ZipFile(self.name) as archive:
                listed = [(_clean(info.filename), info) for info in archive.infolist()]
        except (zipfile.BadZipFile, EOFError, struct.error, UnicodeDecodeError, RuntimeError) as error:
            raise ValueError(
                f"{self.name} is not a readable zip archive ({error}); it is damaged or cut short: copy or download it again"
            ) from error
        members = {name: info for name, info in listed if name and not name.endswith("/")}
        if not members:
            raise ValueError(f"{self.name} is empty; expected CLASS/image.jpg inside")
        found = find_class_folders(NameTree(self.name, [name for name, _ in listed]), split)
        infos = [members[name] for name in found.names]
        if all(i.flag_bits & _ENCRYPTED for i in infos):
            raise ValueError(
                f"the images in {self.name} are encrypted; unpack it with its password and pass the folder"
            )
        self.classes = found.classes
        self.labels = np.array(found.labels, dtype=np.int64)
        self.part = found.part
        self._base = found.base
        self._names = PackedStrings(found.names)
        self._offset = np.array([i.header_offset for i in infos], dtype=np.int64)
        self._stored = np.array([i.compress_size for i in infos], dtype=np.int64)
        self._unpacked = np.array([i.file_size for i in infos], dtype=np.int64)
        self._crc = np.array([i.CRC for i in infos], dtype=np.uint32)
        self._method = np.array([i.compress_type for i in infos], dtype=np.int16)
        self._flags = np.array([i.flag_bits for i in infos], dtype=np.int32)
        self._fd = -1
        self._pid = -1

    def load(self, i: int) -> Image.Image:
        return decode(self.read(i), self.path(i))

    def size(self, i: int) -> tuple[int, int]:
        return image_size(self.read(i), self.path(i))

    def path(self, i: int) -> str:
        return f"{self.name}:{self._names[i]}"

    def key(self, i: int) -> str:
        return self._names[i].removeprefix(self._base)

    def content_digest(self) -> bytes:
        return self._crc.tobytes()

    def read(self, i: int) -> bytes:
        """The member's bytes, checked against its CRC.

        Raises:
            BadImage: encrypted, damaged, or larger than 1 GiB.
        """
        path = self.path(i)
        if self._flags[i] & _ENCRYPTED:
            raise BadImage(path, "the archive member is encrypted")
        if max(self._stored[i], self._unpacked[i]) > _MAX_BYTES:
            raise BadImage(path, f"the archive member is larger than {_MAX_BYTES >> 20} MiB")
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
                # Bounded by what the directory promises: a few stored bytes can unpack to gigabytes.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, int(self._unpacked[i]) + 1)
            else:  # bzip2, LZMA…: rare for images, left to the standard library
                with zipfile.ZipFile(self.name) as archive:
                    data = archive.read([m for m in archive.infolist() if m.header_offset == self._offset[i]][-1])
        except BadImage:
            raise
        except (
            OSError, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError, EOFError, IndexError
        ) as error:  # fmt: skip
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
    """``./a//b``, ``/a/b`` and ``a\\b`` (some Windows tools) as ``a/b``; a folder keeps its ``/``, a name of nothing is ""."""
    name = name.replace("\\", "/")
    path = "/".join(part for part in name.split("/") if part not in ("", "."))
    return f"{path}/" if path and name.endswith("/") else path


class NameTree(Tree):
    """Folders and files of an archive, from the names of its members."""

    def __init__(self, root: str, names: list[str]) -> None:
        self.root = root
        self._folders: dict[str, set[str]] = {}
        self._files: dict[str, list[str]] = {"": []}
        outside = [name for name in names if ".." in name.split("/")]
        if outside:
            log.warning("%s: left out %d member(s) with '..' in the name, such as %r", root, len(outside), outside[0])
        for name in names:
            parts = name.split("/")  # of a folder the last one is ""
            if any(map(is_ignored, parts)):
                continue
            folder = ""
            for part in parts[:-1]:
                self._folders.setdefault(folder, set()).add(part)
                folder = f"{folder}/{part}" if folder else part
            if parts[-1]:
                self._files.setdefault(folder, []).append(parts[-1])

    def folders(self, folder: str) -> list[str]:
        return sorted(self._folders.get(folder, ()))

    def files(self, folder: str) -> list[str]:
        return sorted(self._files.get(folder, ()))

    def walk(self, folder: str) -> list[str]:
        names: list[str] = []
        stack = [folder]  # no recursion: the depth is the archive's choice
        while stack:
            here = stack.pop()
            names += [f"{here}/{name}" for name in self._files.get(here, ())]
            stack += [f"{here}/{inner}" for inner in self._folders.get(here, ())]
        return sorted(set(names))
