"""From bytes to an RGB image, by one rule for every kind of file.

========================  ==========================================================================================
file                      what the models see
========================  ==========================================================================================
grayscale, 1 bit          the value in all three channels
16-bit grayscale          scaled to 8 bits, ``round(v / 257)`` (Pillow alone would saturate at 255)
CMYK                      Pillow's conversion, no colour profile
palette, RGBA, LA         the stored colours; transparency is dropped, not blended
EXIF orientation          ignored, as torchvision's ImageFolder, timm and published ImageNet training do
animated GIF, WebP        the first frame
wrong extension           the content decides, among the formats of :data:`FORMATS`
truncated, garbage, empty :class:`BadImage`; Pillow's LOAD_TRUNCATED_IMAGES is never switched on
32-bit integer, float     :class:`BadImage`: the range of such pixels is not known
========================  ==========================================================================================
"""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image

__all__ = ["FORMATS", "BadImage", "decode", "image_size", "open_image", "to_rgb"]

# Pillow opens more, but EPS would start Ghostscript and WMF, FITS and the like are no photographs.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000")


class BadImage(RuntimeError):
    """An image that cannot be read.

    Attributes:
        path: file, archive member or dataset item.
        reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        # A file name need not be UTF-8; one that is not must not break the log or the report that names it.
        path = path.encode("utf-8", "backslashreplace").decode()
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return BadImage, (self.path, self.reason)


def decode(data: bytes, path: str) -> Image.Image:
    """Decodes a whole image file.

    Args:
        data: the file's bytes.
        path: its name in messages.

    Returns:
        An RGB image, pixels in memory.

    Raises:
        BadImage: the bytes are not one complete image.
    """
    image = open_image(data, path)
    try:
        image.load()
        return to_rgb(image, path)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # a damaged file makes Pillow's plugins raise almost any type
        raise BadImage(path, _reason(error)) from error


def image_size(data: bytes, path: str) -> tuple[int, int]:
    """(width, height) from the header; the pixels are not decoded.

    Raises:
        BadImage: the bytes do not start like an image.
    """
    return open_image(data, path).size


def to_rgb(image: Image.Image, path: str) -> Image.Image:
    """An image of any mode as RGB, by the table of this module.

    Raises:
        BadImage: float or 32-bit pixels.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if image.mode == "F" or values.size == 0 or values.min() < 0 or values.max() > 65535:
            raise BadImage(path, f"{image.mode!r} pixels of unknown range; save the image with 8 or 16 bits a channel")
        gray = (values.astype(np.uint32) + 128) // 257
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # the direct way warns; the colours are the same
    return image.convert("RGB")


def open_image(data: bytes, path: str) -> Image.Image:
    """The image with its header read (size, mode, format), pixels not decoded.

    Raises:
        BadImage: the bytes do not start like an image.
    """
    if not data:
        raise BadImage(path, "the file is empty (0 bytes)")
    try:
        return Image.open(io.BytesIO(data), formats=_formats())
    except MemoryError:
        raise
    except Exception as error:  # as above
        raise BadImage(path, _reason(error)) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those this Pillow was built with; ``Image.open`` fails on the name of another."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or of a format this Pillow cannot read"
    text = str(error).strip()
    return text if text and not text.isdigit() else f"{type(error).__name__} {text}".strip()
