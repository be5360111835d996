"""Images in tars: WebDataset shards, or a tar of class folders; read in place by any number of processes."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xdfast.data.archive import NameTree
from xdfast.data.layout import ClassFolders, find_class_folders
from xdfast.data.shard_files import ShardFiles, ShardSource
from xdfast.data.shards import choose_part, find_shards, label_images, some
from xdfast.data.sources import PackedStrings
from xdfast.data.tar_index import LABEL_KINDS, NO_LABEL, UNUSABLE, TarIndex, index_tars

__all__ = ["TarSource", "is_tar_name"]

log = logging.getLogger("xdfast")

_TAR_NAME = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2|txz)$", re.IGNORECASE)


def is_tar_name(name: str) -> bool:
    """True for ``.tar``, and for the endings of compressed tars (which are then refused with the remedy)."""
    return _TAR_NAME.search(name) is not None


class TarSource(ShardSource):
    """WebDataset tars, or tars of class folders.

    **WebDataset.** Members of one tar whose names agree up to the first dot of the base name are one sample:
    ``000017.jpg`` and ``000017.cls``. Its label is, by the first kind that gives labels in these tars:

    * ``.cls``: an integer in ASCII;
    * ``.json``: an integer or a text under "label", else "cls", else "class";
    * ``.txt``: class names and not captions, that is: either all are integers, or each is one line of at most 64
      characters and there are at most half as many different texts as images.

    Integers become the class names "0", "1", …, in numeric order; texts are class names as they are, sorted. A sample
    without a label is left out, and of a sample with several images all but the first; one warning counts them.

    **Class folders.** Where no sample has such a label and every image lies in a folder, the rule of
    :func:`find_class_folders` holds, as for the unpacked tar. Keys are then the names inside the tar, so the split is that of
    the unpacked folder; in WebDataset tars they are the shard's base name and the member's name.

    **Parts.** Shards with ``train`` in their names beside shards with ``val`` are the two parts, see :func:`choose_part`; the
    classes are those of the training part.

    The headers of all shards are read once, into arrays that workers share. A truncated tar gives the members that are
    whole, with a warning. Of members with the same name the last counts. Links and names with ``..`` are left out.

    Args:
        data: a tar, a folder of tars, a pattern such as ``"train-{0000..0012}.tar"`` or ``"*.tar"``, or a list of those.
        split: ``"train"`` or ``"val"``, where there are such parts.

    Raises:
        FileNotFoundError: a tar is not there; also one in the middle of a range.
        ValueError: compressed, empty or not a tar; no images; no labels; other classes in val than in train.
    """

    def __init__(self, data: str | Path | Sequence[str | Path], split: str = "train") -> None:
        single = isinstance(data, (str, os.PathLike))
        paths = find_shards(data, is_tar_name)
        self.name = str(Path(data).expanduser()) if single else f"{len(paths)} tars from {paths[0]}"  # type: ignore[arg-type]
        stats = [os.stat(path) for path in paths]
        index = index_tars(tuple((path, s.st_size, s.st_mtime_ns) for path, s in zip(paths, stats)))
        if not len(index.names):
            raise ValueError(f"{self.name}: no images inside; expected samples such as 000017.jpg with 000017.cls")
        part, train_shards, chosen_shards = choose_part(paths, split, self.name)
        train, chosen = train_shards[index.shard], chosen_shards[index.shard]
        kind = _label_kind(index)
        self._base: str | None = None
        if kind is not None:
            good = _usable(index, kind, chosen, self.name)
            self.classes, self.labels = label_images(
                index.labels[kind], index.texts[kind], train & good, chosen & good, self.name
            )
            rows = np.flatnonzero(chosen & good)
        else:
            found, rows = self._class_folders(index, part, train, chosen, split)
            self.classes, self.labels, self._base = found.classes, np.array(found.labels, dtype=np.int64), found.base
            part = found.part
        self.part = part
        self._names = PackedStrings(index.names[int(i)] for i in rows)
        self._shard, self._offset, self._size = index.shard[rows], index.offset[rows], index.size[rows]
        self._files = ShardFiles(paths, [s.st_size for s in stats])

    def member(self, i: int) -> str:
        return self._names[i]

    def key(self, i: int) -> str:
        return super().key(i) if self._base is None else self._names[i].removeprefix(self._base)

    def _class_folders(
        self, index: TarIndex, part: str | None, train: np.ndarray, chosen: np.ndarray, split: str
    ) -> tuple[ClassFolders, np.ndarray]:
        """The class folders of the chosen images, labelled by the classes of the training images; and the index's rows."""
        names = [index.names[i] for i in range(len(index.names))]
        if not all("/" in name for name in names):
            raise ValueError(
                f"{self.name}: no labels for its {len(names)} images: "
                f"{_why_no_labels(index) or 'no image has a .cls, .json or .txt member beside it'}; add them, or put the images "
                "in class folders. To use images without labels, unpack them and pass 'unlabelled:FOLDER'"
            )
        if why := _why_no_labels(index):
            log.warning("%s: %s; the folders inside are taken for the classes", self.name, why)
        row = {names[i]: int(i) for i in np.flatnonzero(chosen)}
        found = find_class_folders(NameTree(self.name, list(row)), split)
        if part is not None:
            if found.part is not None:
                raise ValueError(
                    f"{self.name}: both the names of the tars and the folders inside say train and val; use one"
                )
            classes = find_class_folders(
                NameTree(self.name, [names[i] for i in np.flatnonzero(train)]), "train"
            ).classes
            unknown = [name for name in found.classes if name not in classes]
            if unknown:
                raise ValueError(f"{self.name}: the training tars have no class {some(unknown)}, but the others have")
            place = {name: label for label, name in enumerate(classes)}
            labels = [place[found.classes[label]] for label in found.labels]
            found = ClassFolders(classes, found.names, labels, found.base, part)
        return found, np.array([row[name] for name in found.names], dtype=np.int64)


def _label_kind(index: TarIndex) -> str | None:
    for kind in LABEL_KINDS:
        codes = index.labels[kind]
        if (codes >= 0).any() and (kind != "txt" or _are_class_names(codes, index.texts[kind])):
            return kind
    return None


def _are_class_names(codes: np.ndarray, texts: list[str]) -> bool:
    if (codes == UNUSABLE).any():  # too long, or several lines: captions
        return False
    used = np.unique(codes[codes >= 0])
    return all(re.fullmatch(r"-?\d+", texts[code]) for code in used) or 2 * len(used) <= (codes >= 0).sum()


def _usable(index: TarIndex, kind: str, chosen: np.ndarray, name: str) -> np.ndarray:
    """bool ``[N]``: images with a label, the first of their sample."""
    good = index.labels[kind] >= 0
    bad = np.flatnonzero(chosen & ~good)
    if len(bad):
        log.warning(
            "%s: left out %d image(s) without a readable .%s label, such as %r",
            name,
            len(bad),
            kind,
            index.names[int(bad[0])],
        )
    first = np.zeros(len(good), dtype=bool)
    first[np.unique(index.sample, return_index=True)[1]] = True
    more = np.flatnonzero(chosen & good & ~first)
    if len(more):
        log.warning(
            "%s: left out %d image(s) that are not the first of their sample, such as %r",
            name,
            len(more),
            index.names[int(more[0])],
        )
    return good & first


def _why_no_labels(index: TarIndex) -> str:
    """What is wrong with the label members, or "" if there are none."""
    said = {
        "cls": "the .cls members are not integers",
        "json": "the .json members have no integer or text under 'label', 'cls' or 'class'",
        "txt": "the .txt members are captions (longer than 64 characters, several lines, or mostly different), not class names",
    }
    return "; ".join(said[kind] for kind in LABEL_KINDS if (index.labels[kind] != NO_LABEL).any())
