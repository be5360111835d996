"""Writes a source as a folder of class folders."""

from __future__ import annotations

from pathlib import Path

from xdfast.data.sources import ImageSource

__all__ = ["write_image_folder"]

_OPTIONS = {"png": {}, "jpg": {"quality": 95, "subsampling": 0}}


def write_image_folder(source: ImageSource, folder: str | Path, *, format: str = "png") -> Path:
    """Writes ``FOLDER/CLASS/000017.png`` for every image.

    Args:
        source: the images; the number in the file name is the position in it.
        folder: made if it is not there.
        format: ``"png"`` (lossless) or ``"jpg"`` (quality 95).

    Returns:
        ``folder``.

    Raises:
        ValueError: unknown format, or a class name that cannot be a folder name.
        BadImage: an image cannot be read.
    """
    if format not in _OPTIONS:
        raise ValueError(f"format must be 'png' or 'jpg', got {format!r}")
    for name in source.classes:
        if not name or name.startswith(".") or "/" in name or "\0" in name:
            raise ValueError(f"class name {name!r} cannot be a folder name; rename the class")
    folder = Path(folder)
    for name in source.classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, label in enumerate(source.labels):
        source.load(i).save(folder / source.classes[label] / f"{i:06d}.{format}", **_OPTIONS[format])
    return folder
