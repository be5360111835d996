"""Images in class folders on disk."""

from __future__ import annotations

import difflib
import itertools
import os
from pathlib import Path

import numpy as np
from PIL import Image

from xdfast.data.decode import BadImage, decode, image_size
from xdfast.data.layout import Tree, find_class_folders, is_ignored, is_image
from xdfast.data.sources import ImageSource, PackedStrings

__all__ = ["FolderSource", "UnlabelledSource", "missing_path"]


class FolderSource(ImageSource):
    """``ROOT/CLASS/…/image.jpg`` or ``ROOT/{train,val}/CLASS/…/image.jpg``; see :func:`find_class_folders`.

    Args:
        root: the folder.
        split: ``"train"`` or ``"val"``, where the folder has such parts.

    Raises:
        FileNotFoundError, NotADirectoryError, PermissionError: the folder cannot be listed.
        ValueError: it does not hold class folders with images.
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        root = Path(root).expanduser()
        found = find_class_folders(_DiskTree(str(root)), split)
        self.name = str(root)
        self.classes = found.classes
        self.labels = np.array(found.labels, dtype=np.int64)
        self.part = found.part
        self._base = found.base
        self._names = PackedStrings(found.names)

    def load(self, i: int) -> Image.Image:
        return decode(self.read(i), self.path(i))

    def read(self, i: int) -> bytes:
        return _read(self.path(i))

    def size(self, i: int) -> tuple[int, int]:
        return image_size(self.read(i), self.path(i))

    def path(self, i: int) -> str:
        return os.path.join(self.name, self._names[i])

    def key(self, i: int) -> str:
        return self._names[i].removeprefix(self._base)


class UnlabelledSource(FolderSource):
    """Every image below a folder, sorted by name, all of the one class "unlabelled"; for distillation without labels.

    Folders mean nothing here, ``train/`` and ``val/`` neither. Hidden files and folders are left out.

    Args:
        root: the folder.

    Raises:
        FileNotFoundError, PermissionError: the folder cannot be listed.
        ValueError: not a folder, or no images below it.
    """

    def __init__(self, root: str | Path) -> None:
        self.name = str(Path(root).expanduser())
        if os.path.exists(self.name) and not os.path.isdir(self.name):
            raise ValueError(
                f"{self.name} is not a folder; 'unlabelled:' takes a folder of images, so unpack an archive"
            )
        tree = _DiskTree(self.name)
        names = [*tree.files(""), *(name for folder in tree.folders("") for name in tree.walk(folder))]
        images = sorted(filter(is_image, names))
        if not images:
            raise ValueError(f"{self.name}: no images in the folder or below it ({len(names)} other files)")
        self.classes = ["unlabelled"]
        self.labels = np.zeros(len(images), dtype=np.int64)
        self._base = ""
        self._names = PackedStrings(images)


class _DiskTree(Tree):
    def __init__(self, root: str) -> None:
        self.root = root
        self._listed: dict[str, tuple[list[str], list[str]]] = {}

    def folders(self, folder: str) -> list[str]:
        return self._list(folder)[0]

    def files(self, folder: str) -> list[str]:
        return self._list(folder)[1]

    def walk(self, folder: str) -> list[str]:
        names: list[str] = []
        # Links to folders are followed, but not to a folder above: its images would come twice, or under another class.
        parents = ["", *itertools.accumulate(folder.split("/")[:-1], "{}/{}".format)]
        stack = [(folder, frozenset(self._real(parent) for parent in parents))]
        while stack:
            here, above = stack.pop()
            real = self._real(here)
            if real in above:
                continue
            folders, files = self._list(here, keep=False)
            names += [f"{here}/{name}" for name in files]
            stack += [(f"{here}/{name}", above | {real}) for name in folders]
        return sorted(names)

    def _real(self, folder: str) -> str:
        return os.path.realpath(os.path.join(self.root, folder))

    def _list(self, folder: str, keep: bool = True) -> tuple[list[str], list[str]]:
        """(folders, files), hidden ones left out; what the layout asks for again is kept."""
        if folder in self._listed:
            return self._listed[folder]
        path = os.path.join(self.root, folder) if folder else self.root
        try:
            with os.scandir(path) as entries:
                folders: list[str] = []
                files: list[str] = []
                for entry in entries:
                    if is_ignored(entry.name):
                        continue
                    if _is_dir(entry):
                        folders.append(entry.name)
                    # A broken link is reported when it is read; a pipe would block for ever.
                    elif entry.is_symlink() or entry.is_file():
                        files.append(entry.name)
        except PermissionError as error:
            raise PermissionError(
                f"the folder {path} may not be read ({error.strerror}); give this user read and execute rights on it"
            ) from error
        except FileNotFoundError as error:
            raise missing_path(path) from error
        listed = sorted(folders), sorted(files)
        if keep:
            self._listed[folder] = listed
        return listed


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def missing_path(path: str) -> FileNotFoundError:
    """The error for a path that is not there: names the part that exists and what lies near the missing one."""
    missing = Path(path)
    parent = missing.parent
    while not parent.is_dir() and parent != parent.parent:
        missing, parent = parent, parent.parent
    try:
        beside = sorted(os.listdir(parent))
    except OSError:
        beside = []
    by_lower = {name.lower(): name for name in beside}
    near = [by_lower[n] for n in difflib.get_close_matches(missing.name.lower(), by_lower, n=3, cutoff=0.5)]
    if near:
        hint = f" Did you mean {', '.join(repr(n) for n in near)}?"
    elif not beside:
        hint = " That folder is empty."
    else:
        hint = f" It holds {', '.join(repr(n) for n in beside[:5])}{' …' if len(beside) > 5 else ''}."
    return FileNotFoundError(f"{path} does not exist: there is no {missing.name!r} in {parent}.{hint}")


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImage(path, error.strerror or str(error)) from error
