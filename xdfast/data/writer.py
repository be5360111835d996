"""Writes a source as a folder of class folders."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from xdfast.data.sources import ImageSource

__all__ = ["write_image_folder"]

_OPTIONS: dict[str, dict[str, Any]] = {"png": {}, "jpg": {"quality": 95, "subsampling": 0}}


def write_image_folder(source: ImageSource, folder: str | Path, *, format: str = "png") -> Path:
    """Writes ``FOLDER/CLASS/000017.png`` for every image.

    Read back, classes are in the order of their names (``"10"`` before ``"9"``), whatever it was in ``source``.

    Args:
        source: the images; the number in the file name is the position in it.
        folder: made if it is not there; must be empty if it is, so that no old image is taken for one of these.
        format: ``"png"`` (lossless) or ``"jpg"`` (quality 95).

    Returns:
        ``folder``.

    Raises:
        ValueError: unknown format, a class name that cannot be a folder name or comes twice, or a folder with something in it.
        BadImage: an image cannot be read.
    """
    if format not in _OPTIONS:
        raise ValueError(f"format must be 'png' or 'jpg', got {format!r}")
    for name in source.classes:
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise ValueError(f"class name {name!r} cannot be a folder name; rename the class")
    twice = [name for name, count in Counter(source.classes).items() if count > 1]
    if twice:
        raise ValueError(f"two classes are called {twice[0]!r} and would share a folder; rename one")
    folder = Path(folder).expanduser()
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder, or remove what is in it")
    for name in source.classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, label in enumerate(source.labels):
        source.load(i).save(folder / source.classes[label] / f"{i:06d}.{format}", **_OPTIONS[format])
    return folder
