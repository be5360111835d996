"""Which folders are classes, and which are train and val: one rule for folders on disk and inside archives."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath

__all__ = ["EXTENSIONS", "TRAIN_NAMES", "VAL_NAMES", "ClassFolders", "Tree", "find_class_folders", "is_ignored"]

log = logging.getLogger("xdfast")

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
    + (".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2")
)
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")
_SYSTEM = frozenset(("__MACOSX", "@eaDir", "lost+found"))  # left by macOS's zip, by Synology, by ext4
_MAX_WRAPPING = 8
_EXPECTED = "expected CLASS/image.jpg, or train/CLASS/image.jpg and val/CLASS/image.jpg"


class Tree(ABC):
    """Names of folders and files under a root; a folder is written "a/b", the root ""."""

    root: str

    @abstractmethod
    def folders(self, folder: str) -> list[str]:
        """Sorted names of the sub-folders."""

    @abstractmethod
    def files(self, folder: str) -> list[str]:
        """Sorted names of the files directly inside."""

    @abstractmethod
    def walk(self, folder: str) -> list[str]:
        """Sorted names of all files below, relative to the root."""


@dataclass
class ClassFolders:
    """Images of one part of a tree.

    Attributes:
        classes: sorted class names.
        names: files relative to the root, sorted within a class.
        labels: class index of each.
        base: what ``names`` have before CLASS/, such as "train/" or "".
        part: ``"train"``/``"val"`` if the tree has such parts; None if it must still be split.
    """

    classes: list[str]
    names: list[str]
    labels: list[int]
    base: str
    part: str | None


def is_ignored(name: str) -> bool:
    """True for hidden files and folders and those a system leaves behind; ``name`` has no slashes."""
    return name.startswith(".") or name in _SYSTEM


def is_image(name: str) -> bool:
    """True for the extensions this package reads, in any case; hidden files are not images."""
    path = PurePosixPath(name)
    return not path.name.startswith(".") and path.suffix.lower() in EXTENSIONS


def find_class_folders(tree: Tree, split: str) -> ClassFolders:
    """Finds the class folders of a split.

    ``train/`` (or ``training/``) beside ``val/`` (or ``valid/``, ``validation/``, ``test/``, ``testing/``, in this order) are
    the two parts. Without them every sub-folder is a class and ``part`` is None; so is ``train/`` if it holds images, no
    folders, and stands beside other classes (trains beside buses). A single wrapping folder is stepped into.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no class folders, no images, an empty class, or train and val with different classes.
    """
    base = _unwrap(tree)
    shown = _shown(tree, base)
    by_lower = {name.lower(): name for name in tree.folders(base)}
    train = _train_folder(tree, base, by_lower)
    if train is None:
        if len(by_lower) > 1 and set(by_lower) <= {*TRAIN_NAMES, *VAL_NAMES}:
            raise ValueError(
                f"{shown} has {_some(sorted(by_lower.values()))} but no train/; name the part that holds the training "
                "images train, or pass the folder of one part"
            )
        return _read(tree, base, part=None)
    val = _val_folder(tree, base, by_lower)
    if val is None:
        told = "%s has %s/ but no val/: a part is split off, unless val_data names validation images"
        log.info(told, shown, PurePosixPath(train).name)
        return _read(tree, train, part=None)
    classes, other = tree.folders(train), tree.folders(val)
    if classes and other and classes != other:
        raise ValueError(
            f"{shown}: {PurePosixPath(train).name}/ and {PurePosixPath(val).name}/ must have the same class folders; "
            + "; ".join(
                f"only in {PurePosixPath(folder).name}/: {_some(sorted(set(mine) - set(theirs)))}"
                for folder, mine, theirs in ((train, classes, other), (val, other, classes))
                if set(mine) - set(theirs)
            )
        )
    # A class may have no validation images; a class without training images is a mistake.
    return _read(tree, train if split == "train" else val, part=split, empty_class_ok=split == "val")


def _train_folder(tree: Tree, base: str, by_lower: dict[str, str]) -> str | None:
    for name in TRAIN_NAMES:
        if name in by_lower:
            folder = _join(base, by_lower[name])
            beside = set(by_lower) - {*TRAIN_NAMES, *VAL_NAMES}
            a_class = beside and not tree.folders(folder) and any(map(is_image, tree.files(folder)))
            return None if a_class else folder
    return None


def _val_folder(tree: Tree, base: str, by_lower: dict[str, str]) -> str | None:
    for name in VAL_NAMES:
        if name not in by_lower:
            continue
        folder = _join(base, by_lower[name])
        if tree.folders(folder):
            if name in ("test", "testing"):
                log.info("%s: %s/ serves for validation", _shown(tree, base), by_lower[name])
            return folder
        if name not in ("test", "testing"):
            raise ValueError(
                f"{_shown(tree, folder)} has no class sub-folders; sort its images into one folder per class, or remove it "
                "to have a part of train/ split off"
            )
        log.info("%s has no class sub-folders (a test set without labels?): not used", _shown(tree, folder))
    return None


def _unwrap(tree: Tree) -> str:
    base = ""
    for _ in range(_MAX_WRAPPING):  # a link to its own parent would wrap for ever
        folders = tree.folders(base)
        if len(folders) != 1 or any(map(is_image, tree.files(base))) or folders[0].lower() in TRAIN_NAMES:
            return base
        inner = _join(base, folders[0])
        if not tree.folders(inner) or any(map(is_image, tree.files(inner))):
            return base
        base = inner
    return base


def _read(tree: Tree, base: str, part: str | None, empty_class_ok: bool = False) -> ClassFolders:
    shown = _shown(tree, base)
    classes = tree.folders(base)
    if not classes:
        loose = tree.files(base)
        if not loose:
            raise ValueError(f"{shown} is empty; {_EXPECTED}")
        images = sum(map(is_image, loose))
        raise ValueError(f"{shown} holds {images} image{'s' * (images != 1)} but no class sub-folders; {_EXPECTED}")
    names: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    seen: Counter[str] = Counter()
    for label, name in enumerate(classes):
        files = tree.walk(_join(base, name))
        images_here = [f for f in files if is_image(f)]
        seen.update(PurePosixPath(f).suffix.lower() or "(no extension)" for f in files)
        if not images_here:
            empty.append(name)
        names += images_here
        labels += [label] * len(images_here)
    if not names:
        found = ", ".join(f"{count} {suffix}" for suffix, count in seen.most_common(5)) or "no files"
        raise ValueError(
            f"{shown}: no images in its {len(classes)} sub-folders (found {found}); "
            f"known extensions: {' '.join(sorted(EXTENSIONS))}"
        )
    if empty and not empty_class_ok:
        raise ValueError(
            f"{shown}: no images in class folder{'s' * (len(empty) != 1)} {_some(empty)}; "
            "add images, or move what is not a class elsewhere"
        )
    if empty:
        log.warning("%s: no images of class %s", shown, _some(empty))
    return ClassFolders(classes, names, labels, f"{base}/" if base else "", part)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _shown(tree: Tree, folder: str) -> str:
    return f"{tree.root}/{folder}" if folder else tree.root


def _some(names: list[str], count: int = 5) -> str:
    shown = ", ".join(map(repr, names[:count]))
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
