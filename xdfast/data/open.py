"""``open_source``: from what the user wrote to images; and the split into train and val."""

from __future__ import annotations

import logging
import numbers
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from xdfast.data._rng import hash_name
from xdfast.data.archive import ZipSource
from xdfast.data.datasets import DatasetSource, DigitsSource, open_torchvision
from xdfast.data.folder import FolderSource, UnlabelledSource, missing_path
from xdfast.data.layout import is_image
from xdfast.data.shards import find_shards, is_pattern, some
from xdfast.data.sources import ImageSource, SubsetSource
from xdfast.data.tar import TarSource, is_tar_name
from xdfast.data.tfrecord import TFRecordSource, is_tfrecord_name
from xdfast.errors import nearest

__all__ = ["keep_per_class", "open_source", "split_indices"]

log = logging.getLogger("xdfast")

_FORMS = (
    "a folder of class folders, a zip archive or tar of one, WebDataset tars or TFRecords (a file, a folder of them or a "
    "pattern such as 'train-{0000..0012}.tar'), 'unlabelled:FOLDER', 'torchvision:NAME[:ROOT][?download]' or 'sklearn:digits'"
)


def open_source(
    data: Any,
    split: str = "train",
    *,
    seed: int = 0,
    val_fraction: float | None = 0.2,
    labels_per_class: int | None = None,
) -> ImageSource:
    """Images to train on or to validate with.

    Args:
        data: a folder of class folders; a zip archive or a tar of one; WebDataset tars (:class:`TarSource`) or TFRecords
            (:class:`TFRecordSource`) as a file, a folder of them, a pattern such as ``"train-{0000..0012}.tar"`` or
            ``"train-*.tfrecord"``, or a list of those; ``"unlabelled:/folder"``, all images below it, without labels;
            ``"torchvision:CIFAR10"``, ``"torchvision:CIFAR10:/root"`` (``?download`` at the end fetches it);
            ``"sklearn:digits"``; an :class:`ImageSource`; or a torch dataset of (image, label), see :class:`DatasetSource`.
        split: ``"train"`` or ``"val"``. ``train/`` and ``val/`` (or ``valid/``, ``validation/``, ``test/``) are used where
            the data has them. Otherwise ``val_fraction`` of each class is split off, a function of (seed, file names) only:
            where it lies and in which order it is read do not matter, and a new image moves at most one other across.
        seed: of the split and of ``labels_per_class``.
        val_fraction: in (0, 1); None splits nothing off: data without parts of its own is used whole, for either split.
        labels_per_class: keeps this many images of each class, a function of (seed, file name) only.

    Raises:
        FileNotFoundError, PermissionError: the path is not there (names near it are offered) or may not be read.
        ValueError: no class folders, no images, an unknown name, an empty validation part, different classes in train and val.
        TypeError: ``data`` is of another type.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split must be 'train' or 'val', got {split!r}")
    if val_fraction is not None and not (isinstance(val_fraction, numbers.Real) and 0 < val_fraction < 1):
        raise ValueError(f"val_fraction must be between 0 and 1, or None, got {val_fraction!r}")
    if labels_per_class is not None and (
        isinstance(labels_per_class, bool) or not isinstance(labels_per_class, numbers.Integral) or labels_per_class < 1
    ):
        raise ValueError(f"labels_per_class must be an integer ≥ 1, or None, got {labels_per_class!r}")
    source = _open(data, split)
    if source.part not in (None, split):
        raise ValueError(
            f"{source.name} was opened as the {source.part!r} part and cannot serve as {split!r}; pass other data for it"
        )
    if source.part is None and val_fraction is not None:
        source = SubsetSource(source, split_indices(source, split, seed, val_fraction), part=split)
    if labels_per_class is not None:
        source = SubsetSource(source, keep_per_class(source, int(labels_per_class), seed))
    return source


def split_indices(source: ImageSource, split: str, seed: int, val_fraction: float) -> np.ndarray:
    """Sorted int64 positions of one part of a stratified split.

    In each class the images are ordered by a hash of (seed, name); the first ``val_fraction`` of them (rounded, at least
    one where there are two, never all) are for validation.

    Raises:
        ValueError: the validation part is empty.
    """
    ranks = _ranks(source, seed, "split")
    counts = np.bincount(source.labels, minlength=len(source.classes))
    held = np.clip(np.rint(counts * val_fraction).astype(np.int64), 1, np.maximum(counts - 1, 0))
    single = [source.classes[i] for i in np.flatnonzero(counts == 1)]
    if held.sum() == 0:
        raise ValueError(
            f"{source.name}: the validation part is empty (no class has two images); add images or pass val_data"
        )
    if single and split == "val":
        log.warning(
            "%s: no validation image of %d class(es) with a single image: %s",
            source.name,
            len(single),
            ", ".join(single[:5]),
        )
    is_val = ranks < held[source.labels]
    return np.flatnonzero(is_val if split == "val" else ~is_val)


def keep_per_class(source: ImageSource, count: int, seed: int) -> np.ndarray:
    """Sorted int64 positions of ``count`` images of each class, the first by a hash of (seed, name)."""
    counts = np.bincount(source.labels, minlength=len(source.classes))
    short = [f"{source.classes[i]!r} has {counts[i]}" for i in np.flatnonzero(counts < count)]
    if short:
        log.warning(
            "%s: labels_per_class=%d, but %s%s; all of those are kept",
            source.name,
            count,
            ", ".join(short[:5]),
            " …" if len(short) > 5 else "",
        )
    return np.flatnonzero(_ranks(source, seed, "labels") < count)


def _ranks(source: ImageSource, seed: int, purpose: str) -> np.ndarray:
    """int64 ``[N]``: place of each image within its class in the order of hash(seed, name)."""
    hashes = np.array([hash_name(seed, source.key(i), purpose) for i in range(len(source))], dtype=np.uint64)
    order = np.lexsort((hashes, source.labels))
    starts = np.concatenate(([0], np.cumsum(np.bincount(source.labels))))
    ranks = np.empty(len(source), dtype=np.int64)
    ranks[order] = np.arange(len(source)) - starts[source.labels[order]]
    return ranks


def _open(data: Any, split: str) -> ImageSource:
    if isinstance(data, ImageSource):
        return data
    if isinstance(data, (str, os.PathLike)):
        return _open_text(os.fspath(data), split)
    if isinstance(data, (list, tuple)) and data and all(isinstance(item, (str, os.PathLike)) for item in data):
        kinds = {_shard_kind(str(Path(item).expanduser())) for item in data}
        if len(kinds) == 1 and (kind := kinds.pop()) is not None:
            return kind(data, split)
    if data is None or isinstance(data, (bytes, int, float, list, tuple, dict, set)):
        raise TypeError(f"data must be {_FORMS}, an ImageSource or a torch dataset, got {data!r:.80}")
    return DatasetSource(data)


def _open_text(data: str, split: str) -> ImageSource:
    if not data.strip():
        raise ValueError(f"data is empty; expected {_FORMS}")
    scheme, _, rest = data.partition(":")
    if scheme == "torchvision":
        return open_torchvision(rest, split)
    if scheme == "sklearn":
        if rest != "digits":
            raise ValueError(
                f"scikit-learn ships no images called {rest!r}.{nearest(rest, ['digits'])} Use 'sklearn:digits'"
            )
        return DigitsSource()
    if scheme == "unlabelled":
        if not rest:
            raise ValueError(
                "'unlabelled:' needs the folder of the images after the colon: 'unlabelled:/path/to/images'"
            )
        return UnlabelledSource(rest)
    path = Path(data).expanduser()
    if not path.exists():
        hint = nearest(scheme.lower(), ["torchvision", "sklearn", "unlabelled"])
        if rest and (hint or not path.parent.is_dir()):
            raise ValueError(f"data {data!r} is neither a path nor a known source.{hint} Expected {_FORMS}")
        if not is_pattern(str(path)):
            raise missing_path(str(path))
    kind = _shard_kind(str(path))
    if kind is not None:
        return kind(path, split)
    if path.is_dir():
        return FolderSource(path, split)
    if not path.is_file():  # opening a named pipe would wait for ever
        raise ValueError(f"{path} is neither a folder nor a file; expected {_FORMS}")
    if path.suffix.lower() == ".zip" or zipfile.is_zipfile(path):
        return ZipSource(path, split)
    raise ValueError(
        f"{path} is a file but not a zip archive, tar or TFRecord file (told by its name); expected {_FORMS}"
    )


def _shard_kind(path: str) -> type[TarSource] | type[TFRecordSource] | None:
    """What reads a file, folder or pattern of shards, by names alone; None if it is something else.

    A folder is one of shards if it holds some, and neither sub-folders nor images; a README or a JSON file may lie beside.

    Raises:
        FileNotFoundError: a pattern names a file that is not there, or matches none.
        ValueError: tars and TFRecords together, or a pattern that matches neither.
    """
    pattern = is_pattern(path)
    if os.path.isdir(path):
        try:
            with os.scandir(path) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError:  # FolderSource says why
            return None
        if any(entry.is_dir() or is_image(entry.name) for entry in shown):
            return None
        names = [entry.name for entry in shown]
    elif pattern:
        names = [os.path.basename(file) for file in find_shards(path, lambda name: True)]
    elif os.path.exists(path) and not os.path.isfile(path):  # a named pipe
        return None
    else:
        names = [os.path.basename(path)]
    tars, records = (list(filter(is_kind, names)) for is_kind in (is_tar_name, is_tfrecord_name))
    if tars and records:
        raise ValueError(f"{path} has tars ({some(tars, 2)}) and TFRecords ({some(records, 2)}); keep the two apart")
    if pattern and len(tars) + len(records) < len(names):
        other = [name for name in names if name not in tars and name not in records]
        raise ValueError(
            f"{path!r} matches {some(other)}: a pattern may name tars or TFRecord files, told by their names"
        )
    return TarSource if tars else TFRecordSource if records else None
