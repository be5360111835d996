"""Looks at every image of a source: which can be read, and what they are."""

from __future__ import annotations

import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from xdfast.data._rng import preserved_rng
from xdfast.data.decode import BadImage, decode, open_image
from xdfast.data.sources import ImageSource

__all__ = ["ImageCheck", "check_images"]

_CHUNK = 64
_ORIENTATION = 0x0112
# A file without its end mark is cut short more often than not: it is decoded also where headers are enough.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


@dataclass
class ImageCheck:
    """What was found.

    Attributes:
        total: images of the source.
        checked: of these looked at; fewer if ``interrupted``.
        full: every image was decoded, not only its header.
        kinds: (format, mode) → readable images; of images without a file the format is ``"no file"``.
        rotated: readable images with an EXIF orientation other than upright (it is ignored in training).
        sixteen_bit: readable images of 16 bits a channel (made 8 in training).
        widths, heights: int64 ``[G]`` of the readable images, in pixels.
        bad: (path, reason) of the unreadable images, in the source's order.
        interrupted: Ctrl-C ended the check early.
    """

    total: int
    full: bool
    checked: int = 0
    kinds: Counter[tuple[str, str]] = field(default_factory=Counter)
    rotated: int = 0
    sixteen_bit: int = 0
    widths: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    heights: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    bad: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def good(self) -> int:
        """Readable images."""
        return self.checked - len(self.bad)


def check_images(
    source: ImageSource,
    *,
    full: bool = False,
    workers: int | Literal["auto"] = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> ImageCheck:
    """Looks at every image of a source, in several processes.

    Without ``full`` headers are read (thousands of images a second and core), and files without an end mark are decoded:
    that finds what is empty, no image, or cut short. ``full`` finds JPEGs damaged in the middle, too, as far as Pillow
    notices: a JPEG has no checksum, and a block of zeros decodes to wrong pixels without an error.

    Args:
        source: images.
        full: decodes every image with Pillow.
        workers: processes; 0: none but this one; ``"auto"``: one per core, none for few images or images in memory.
        progress: called with (images done, of how many) now and then.

    Returns:
        What was found. After Ctrl-C what was found so far, with ``interrupted``.

    Raises:
        ValueError: ``workers`` out of range.
        RuntimeError: a process died; the message names the images it may have died of.
    """
    if workers != "auto" and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
        raise ValueError(f"workers must be 'auto' or an integer ≥ 0, got {workers!r}")
    chunks = [range(i, min(i + _CHUNK, len(source))) for i in range(0, len(source), _CHUNK)]
    if workers == "auto":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if source.in_memory or len(chunks) < 4 else cores
    found = ImageCheck(total=len(source), full=full)
    parts: dict[int, ImageCheck] = {}
    done = _in_processes(source, full, chunks, workers) if workers else (_look_at(source, c, full) for c in chunks)
    try:
        with closing(done):
            for start, part in done:
                parts[start] = part
                found.checked += part.checked
                if progress is not None:
                    progress(found.checked, found.total)
    except KeyboardInterrupt:
        found.interrupted = True
    for _, part in sorted(parts.items()):
        found.kinds.update(part.kinds)
        found.rotated += part.rotated
        found.sixteen_bit += part.sixteen_bit
        found.bad += part.bad
    found.widths = np.concatenate([found.widths, *(part.widths for part in parts.values())])
    found.heights = np.concatenate([found.heights, *(part.heights for part in parts.values())])
    found.checked = sum(part.checked for part in parts.values())
    return found


_Part = tuple[int, ImageCheck]  # of the images from this number on

_held: tuple[ImageSource, bool] | None = None  # of a worker process: sent once, not with each chunk


def _hold(source: ImageSource, full: bool) -> None:
    global _held
    _held = source, full
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the terminal; the parent answers it


def _look_at_held(chunk: range) -> _Part:
    assert _held is not None
    return _look_at(_held[0], chunk, _held[1])


def _in_processes(source: ImageSource, full: bool, chunks: list[range], workers: int) -> Generator[_Part, None, None]:
    pool = ProcessPoolExecutor(workers, initializer=_hold, initargs=(source, full))
    waiting = iter(chunks)
    under_way: dict[Future[_Part], range] = {}
    try:
        while True:
            # Two for each process: what is lost by an interruption, or suspected after a crash, stays small.
            while len(under_way) < 2 * workers and (chunk := next(waiting, None)) is not None:
                under_way[pool.submit(_look_at_held, chunk)] = chunk
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                part = future.result()
                del under_way[future]
                yield part
    except BrokenProcessPool as error:
        spans = ", ".join(f"{c[0]} to {c[-1]} ({source.path(c[0])} …)" for c in under_way.values())
        raise RuntimeError(
            "a process that looked at images died: of memory (lower workers), or of an image on which the library that "
            f"reads it crashes. It was one of these images of {source.name}: {spans}; workers=1 narrows it down"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _look_at(source: ImageSource, chunk: range, full: bool) -> _Part:
    part = ImageCheck(total=len(chunk), full=full, checked=len(chunk))
    sizes: list[tuple[int, int]] = []
    with warnings.catch_warnings(), preserved_rng():  # a user's dataset may draw at random
        warnings.simplefilter("ignore")  # Pillow's, about EXIF data and large images
        for i in chunk:
            try:
                image, format = _open(source, i, full)
            except BadImage as error:
                part.bad.append((error.path, error.reason))
                continue
            part.kinds[format, image.mode] += 1
            part.rotated += _rotated(image)
            part.sixteen_bit += _sixteen_bit(image)
            sizes.append(image.size)
    part.widths, part.heights = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    return chunk[0], part


def _open(source: ImageSource, i: int, full: bool) -> tuple[Image.Image, str]:
    """An image with its header read, and the name of its format.

    Raises:
        BadImage: it cannot be read.
    """
    data = source.read(i)
    if data is None:
        return source.load(i), "no file"
    path = source.path(i)
    image = open_image(data, path)
    cut = not data.endswith(_ENDS.get(image.format or "", b""))
    if full or cut or image.mode in ("I", "F"):  # of these two the pixels decide
        decode(data, path)
    return image, image.format or ""


def _rotated(image: Image.Image) -> bool:
    if image.format == "PNG" and "exif" not in image.info:
        return False  # asking for it would decode the image
    try:
        return image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    except Exception:  # damaged EXIF data makes Pillow raise almost any type; the image is as good without
        return False


def _sixteen_bit(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or ";16" in str(getattr(image, "tile", ""))  # RGB of 16 bits is of mode RGB
