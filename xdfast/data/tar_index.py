"""One pass over the headers of tars: where each image lies, and the label texts beside it."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from xdfast.data.layout import is_ignored, is_image
from xdfast.data.sources import PackedStrings

__all__ = ["LABEL_KINDS", "NO_LABEL", "UNUSABLE", "TarIndex", "index_tars"]

log = logging.getLogger("xdfast")

LABEL_KINDS = ("cls", "json", "txt")  # the first that gives labels is used
NO_LABEL, UNUSABLE = -1, -2
_JSON_KEYS = ("label", "cls", "class")
_MAX_LABEL_BYTES = 2**20
_MAX_CLASS_NAME = 64
_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\0": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_BLOCK = 512


@dataclass
class TarIndex:
    """Images of some tars, in the order of the shards and their members.

    Attributes:
        names: name of each image in its tar, without "./" and the like.
        shard, offset, size: ``[N]`` position among the tars, first byte, length.
        sample: int64 ``[N]``; images of one shard whose names agree up to the first dot of the base name share a number.
        labels: of each of ``LABEL_KINDS``: int64 ``[N]`` position in ``texts``, ``NO_LABEL`` where the sample has no such
            member, ``UNUSABLE`` where that member says no label.
        texts: distinct label texts of each kind; integers without leading zeros.
    """

    names: PackedStrings
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    sample: np.ndarray
    labels: dict[str, np.ndarray]
    texts: dict[str, list[str]]


@functools.lru_cache(maxsize=2)  # train and val are opened one after the other, from the same shards
def index_tars(files: tuple[tuple[str, int, int], ...]) -> TarIndex:
    """Reads all headers, and the members that hold labels; images are not read.

    Of members with the same name the last counts, as when a tar is unpacked. Left out with one warning per shard: what
    lies behind a damage or the end of a truncated tar; links; names with ``..``.

    Args:
        files: (path, size, mtime_ns) of each tar.

    Raises:
        ValueError: compressed, not a tar, or without a single member.
    """
    start, total = time.perf_counter(), sum(size for _, size, _ in files)
    if total > 2**30:
        log.info("indexing %d tar(s), %.1f GiB", len(files), total / 2**30)
    names: list[str] = []
    rows: list[tuple[int, int, int, int]] = []
    tables: dict[str, dict[str, int]] = {kind: {} for kind in LABEL_KINDS}
    codes: dict[str, list[int]] = {kind: [] for kind in LABEL_KINDS}
    samples = 0
    for shard, (path, size, _) in enumerate(files):
        images, found = _read_shard(path, size, tables)
        numbers: dict[str, int] = {}
        for name, (offset, length) in images.items():
            key = _split_name(name)[0]
            number = numbers.setdefault(key, samples + len(numbers))
            names.append(name)
            rows.append((shard, offset, length, number))
            for kind in LABEL_KINDS:
                codes[kind].append(found[kind].get(key, NO_LABEL))
        samples += len(numbers)
    seconds = time.perf_counter() - start
    if seconds > 5:
        log.info("indexed %d images in %.0f s", len(names), seconds)
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    shards, offsets, sizes, numbered = (np.ascontiguousarray(table[:, column]) for column in range(4))
    return TarIndex(
        PackedStrings(names),
        shards,
        offsets,
        sizes,
        numbered,
        labels={kind: np.array(codes[kind], dtype=np.int64) for kind in LABEL_KINDS},
        texts={kind: list(tables[kind]) for kind in LABEL_KINDS},
    )


def _read_shard(
    path: str, size: int, tables: dict[str, dict[str, int]]
) -> tuple[dict[str, tuple[int, int]], dict[str, dict[str, int]]]:
    """Images, name → (offset, size), and labels, kind → sample → position in its table."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, dict[str, int]] = {kind: {} for kind in LABEL_KINDS}
    left_out: dict[str, list[str]] = {"with '..' in the name": [], "that are links or special files": []}
    members = 0
    with open(path, "rb", buffering=4096) as file:  # more would read image bytes behind each header
        for member in _members(file, path, size):
            members += 1
            name = member.name.replace("\\", "/")
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if member.isdir():
                continue
            if ".." in parts:
                left_out["with '..' in the name"].append(name)
                continue
            if not member.isreg() or member.issparse():
                left_out["that are links or special files"].append(name)
                continue
            if not parts or any(map(is_ignored, parts)):
                continue
            name = "/".join(parts)
            key, extension = _split_name(name)
            if extension in labels:
                text = _label(extension, file.fileno(), member)
                table = tables[extension]
                labels[extension][key] = UNUSABLE if text is None else table.setdefault(text, len(table))
            elif is_image(name):
                images[name] = (member.offset_data, member.size)
    if not members:
        raise ValueError(f"{path} is an empty tar; expected images inside, or remove it")
    for what, these in left_out.items():
        if these:
            log.warning("%s: left out %d member(s) %s, such as %r", path, len(these), what, these[0])
    return images, labels


def _members(file: IO[bytes], path: str, size: int) -> Iterator[tarfile.TarInfo]:
    """Members that are whole; a warning says where a tar that is not whole ends.

    Raises:
        ValueError: compressed, or not a tar.
    """
    magic = os.pread(file.fileno(), 6, 0)
    for start, tool in _COMPRESSED.items():
        if magic.startswith(start):
            raise ValueError(
                f"{path} is compressed, and images cannot be read from the middle of it; unpack it with "
                f"`{tool} {os.path.basename(path)}` (JPEG and PNG gain nothing from compression)"
            )
    problem, last = "", -1
    try:
        tar = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        if size == 0:
            raise ValueError(f"{path} is an empty file; copy or download it again") from error
        raise ValueError(
            f"{path} is not a readable tar archive ({error}); it is damaged or cut short: copy or download it again"
        ) from error
    while not problem:
        try:
            member = tar.next()
        except (tarfile.TarError, ValueError, OverflowError) as error:
            problem = f"it is cut short or damaged at byte {tar.offset} ({error})"
            break
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
        if member is None:
            block = os.pread(file.fileno(), _BLOCK, tar.offset)
            if not block:
                problem = "it has no end mark, so members may be missing: it was cut short, or its writer was stopped"
            elif block.strip(b"\0"):
                problem = f"the header at byte {tar.offset} is damaged or cut short"
            break
        if member.offset <= last or member.size < 0:  # a damaged size would lead back, for ever
            problem = f"the header at byte {member.offset} is damaged"
        elif member.isreg() and not member.issparse() and member.offset_data + member.size > size:
            problem = f"it ends inside {member.name!r} ({size - member.offset_data} of {member.size} bytes are there)"
        else:
            last = member.offset
            yield member
    if problem:
        log.warning(
            "%s: %s; the members before it are used, the rest is missing: copy or download it again", path, problem
        )


def _split_name(name: str) -> tuple[str, str]:
    """(sample, extension) as WebDataset has it: the base name is cut at its first dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _label(kind: str, fd: int, member: tarfile.TarInfo) -> str | None:
    """The label a member holds, or None if it holds none."""
    if member.size > _MAX_LABEL_BYTES:
        return None
    try:
        text = os.pread(fd, member.size, member.offset_data).decode("utf-8-sig").strip()
        if kind == "json":
            return _json_label(json.loads(text))
    except (ValueError, RecursionError):  # not UTF-8, not JSON
        return None
    number = _integer(text)
    if kind == "cls" or number is not None:
        return number
    return text if 0 < len(text) <= _MAX_CLASS_NAME and len(text.splitlines()) == 1 else None


def _json_label(content: object) -> str | None:
    if isinstance(content, dict):
        for key in _JSON_KEYS:
            value = content.get(key)
            if isinstance(value, str) and value:
                value.encode()  # JSON can spell half a surrogate pair, which no file or digest can hold: a ValueError
                return value
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)
    return None


def _integer(text: str) -> str | None:
    return str(int(text)) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None
