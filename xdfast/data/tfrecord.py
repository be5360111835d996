"""Images in TFRecord files of ``tf.train.Example``, read in place by any number of processes; no TensorFlow needed."""

from __future__ import annotations

import functools
import logging
import mmap
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xdfast.data.shard_files import ShardFiles, ShardSource
from xdfast.data.shards import choose_part, find_shards, label_images, some
from xdfast.data.sources import PackedStrings
from xdfast.data.tf_example import bytes_range, first_int, parse_example, record_ranges

__all__ = ["TFRecordSource", "is_tfrecord_name"]

log = logging.getLogger("xdfast")

_NAME = re.compile(r"(\.(tfrecords?|tfrec)|-\d+-of-\d+)$", re.IGNORECASE)
_NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)(.*)", re.DOTALL)


def is_tfrecord_name(name: str) -> bool:
    """True for ``*.tfrecord``, ``*.tfrecords``, ``*.tfrec`` and names that end like ``train-00000-of-01024``."""
    return _NAME.search(name) is not None


class TFRecordSource(ShardSource):
    """ImageNet-style TFRecords: an encoded image, an integer label and perhaps a class name and a file name in each Example.

    The index takes one pass: the length of each record, whose CRC is checked, and the small features of its Example. The
    files are mapped into memory, so of the images only the pages around these are read. The CRC of the data is not
    checked, neither there nor when an image is read: a damaged image is found by its decoder. A truncated file gives the
    records that are whole, with a warning.

    Classes are the labels that are there, in numeric order, called by their texts where every label has one; a text that
    several labels share gets the label in brackets. ImageNet's labels start at 1: class 0 is then label 1. With ``train``
    and ``validation`` files the two parts are told by name, see :func:`choose_part`, and the classes are those of training.

    Keys are the file's base name and the number of the record in it.

    Args:
        data: a file, a folder of such files (by :func:`is_tfrecord_name`), a pattern such as
            ``"train-{00000..01023}-of-01024"`` or ``"*.tfrecord"``, or a list of those.
        split: ``"train"`` or ``"val"``, where there are such parts.
        image_key, label_key, text_key, filename_key: names of the features; the last two may be missing from the data.

    Raises:
        FileNotFoundError: a file is not there; also one in the middle of a range.
        ValueError: not a TFRecord file, an empty one, no images or labels under these names, or other labels in validation
            than in training.
    """

    def __init__(
        self,
        data: str | Path | Sequence[str | Path],
        split: str = "train",
        *,
        image_key: str = "image/encoded",
        label_key: str = "image/class/label",
        text_key: str = "image/class/text",
        filename_key: str = "image/filename",
    ) -> None:
        single = isinstance(data, (str, os.PathLike))
        paths = find_shards(data, is_tfrecord_name)
        self.name = str(Path(data).expanduser()) if single else f"{len(paths)} files from {paths[0]}"  # type: ignore[arg-type]
        _warn_of_missing(paths)
        stats = [os.stat(path) for path in paths]
        files = tuple((path, s.st_size, s.st_mtime_ns) for path, s in zip(paths, stats))
        index = _index(files, (image_key, label_key, text_key, filename_key))
        self.part, train_shards, chosen_shards = choose_part(paths, split, self.name)
        train, chosen = train_shards[index.shard], chosen_shards[index.shard]
        numbers, codes = np.unique(index.label, return_inverse=True)
        self.classes, self.labels = label_images(codes, [str(n) for n in numbers], train, chosen, self.name)
        self.classes = _class_names(index, train, self.classes, self.name)
        rows = np.flatnonzero(chosen)
        self._files = ShardFiles(paths, [s.st_size for s in stats])
        self._shard, self._offset, self._size = index.shard[rows], index.offset[rows], index.size[rows]
        self._record = index.record[rows]
        self._filenames = PackedStrings(index.filenames[int(i)] for i in rows)

    def member(self, i: int) -> str:
        return str(self._record[i])

    def path(self, i: int) -> str:
        filename = self._filenames[i]
        return super().path(i) + (f" ({filename})" if filename else "")


@dataclass
class _Index:
    """int64 ``[N]`` each: file, number of the record in it, first byte and length of the image, label, position in ``texts``
    (-1: none)."""

    shard: np.ndarray
    record: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    label: np.ndarray
    text: np.ndarray
    texts: list[str]
    filenames: PackedStrings


@functools.lru_cache(maxsize=2)  # train and val are opened one after the other, from the same files
def _index(files: tuple[tuple[str, int, int], ...], keys: tuple[str, str, str, str]) -> _Index:
    start, total = time.perf_counter(), sum(size for _, size, _ in files)
    if total > 2**30:
        log.info("indexing %d TFRecord file(s), %.1f GiB", len(files), total / 2**30)
    rows: list[tuple[int, ...]] = []
    filenames: list[str] = []
    texts: dict[str, int] = {}
    seen: Counter[str] = Counter()  # features of the records that are left out
    bad: list[str] = []
    for shard, (path, size, _) in enumerate(files):
        if size == 0:
            raise ValueError(f"{path} is an empty file; copy or download it again")
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as buffer:
            if hasattr(buffer, "madvise"):
                buffer.madvise(mmap.MADV_RANDOM)  # no read-ahead into the images
            ranges, problem = record_ranges(buffer, size)
            if not ranges:
                raise ValueError(f"{path} is not a TFRecord file ({_why(buffer[:2], problem)})")
            if problem:
                log.warning(
                    "%s: %s; the %d records before it are used, the rest is missing: copy or download it again",
                    path,
                    problem,
                    len(ranges),
                )
            for number, (a, b) in enumerate(ranges):
                try:
                    example = parse_example(buffer, a, b)
                    image, text, filename = (bytes_range(buffer, example.get(keys[k])) for k in (0, 2, 3))
                    label = first_int(buffer, example.get(keys[1]))
                except ValueError as error:
                    bad.append(f"{path}:{number} ({error})")
                    continue
                if image is None or label is None:
                    seen.update(list(example))  # not the mapping: its values would count
                    bad.append(f"{path}:{number} (no {keys[0] if image is None else keys[1]!r})")
                    continue
                code = -1 if text is None else texts.setdefault(_text(buffer[slice(*text)]), len(texts))
                rows.append((shard, number, image[0], image[1] - image[0], label, code))
                filenames.append("" if filename is None else _text(buffer[slice(*filename)]))
    if not rows:
        found = some([name for name, _ in seen.most_common()], 20) or f"none that can be parsed: {bad[0]}"
        raise ValueError(
            f"{files[0][0]}: no record has an image {keys[0]!r} and an integer label {keys[1]!r}; features found: {found}. "
            "Name them: TFRecordSource(data, image_key=…, label_key=…)"
        )
    if bad:
        log.warning("left out %d record(s) without an image or a label, such as %s", len(bad), bad[0])
    if time.perf_counter() - start > 5:
        log.info("indexed %d images in %.0f s", len(rows), time.perf_counter() - start)
    columns = np.ascontiguousarray(np.array(rows, dtype=np.int64).T)
    return _Index(*columns, texts=list(texts), filenames=PackedStrings(filenames))  # type: ignore[misc]


def _why(magic: bytes, problem: str) -> str:
    if magic == b"\x1f\x8b":
        return "it is compressed: unpack it with gunzip, images cannot be read from the middle of it"
    return f"{problem}; it is another format, damaged or cut short"


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _class_names(index: _Index, train: np.ndarray, labels: list[str], name: str) -> list[str]:
    """The texts of the labels if each label has one, else ``labels``."""
    pairs = np.unique(np.stack([index.label[train], index.text[train]], axis=1), axis=0)
    pairs = pairs[pairs[:, 1] >= 0]
    texts = {str(label): index.texts[code] for label, code in pairs}
    if len(pairs) != len(labels) or len(texts) != len(labels) or not all(texts.values()):
        if len(pairs):
            log.info("%s: the class texts do not name each label once; classes are called by their numbers", name)
        return labels
    shared = Counter(texts.values())
    return [texts[label] if shared[texts[label]] == 1 else f"{texts[label]} ({label})" for label in labels]


def _warn_of_missing(paths: list[str]) -> None:
    """Warns of ``NAME-00003-of-01024`` that are not there."""
    sets: dict[tuple[str, str, str], set[int]] = {}
    for path in paths:
        match = _NUMBERED.fullmatch(os.path.basename(path))
        if match:
            before, number, count, after = match.groups()
            sets.setdefault((before, count, after), set()).add(int(number))
    for (before, count, after), there in sets.items():
        missing = [n for n in range(min(int(count), 10**6)) if n not in there]
        if missing:
            log.warning(
                "%d of the %d files %s-…-of-%s%s are missing, such as number %d",
                len(missing), int(count), before, count, after, missing[0],
            )  # fmt: skip
