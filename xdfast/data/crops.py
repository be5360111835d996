"""Where a view is cut from its image: integers, so that any decoder on any machine cuts the same pixels."""

from __future__ import annotations

import math
from typing import NamedTuple

from xdfast.data._rng import hash_int

__all__ = ["Crop", "centre_crop", "random_resized_crop"]

_CROP = 0x43524F50  # keeps these draws apart from those of the order, of flips and of replacements
_TRIES = 10
_LONGEST = 32


class Crop(NamedTuple):
    """A box of the image is resized, a window of S × S pixels is kept, then flipped. All in pixels, x before y.

    Attributes:
        box: (left, top, width, height) in the decoded image.
        size: (width, height) the box is resized to.
        window: (left, top) of the S × S window in that.
        flip: left and right change places.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    window: tuple[int, int]
    flip: bool = False


def random_resized_crop(
    keys: tuple[int, ...],
    width: int,
    height: int,
    image_size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Crop:
    """The random resized crop of an image, as a function of ``keys`` and the image's size alone.

    Area uniform in ``scale``, logarithm of the aspect ratio uniform in ``ratio``, place uniform; after ten boxes that do
    not fit, the largest centred one of an allowed ratio: the algorithm of torchvision's ``RandomResizedCrop``. The box
    does not depend on ``image_size``: teacher and student see the same part of the image at sizes of their own.

    Args:
        keys: such as (seed, view index, sample id).
        width, height: of the image in pixels.
        image_size: S.
        scale: smallest and largest area relative to the image.
        ratio: smallest and largest width / height.

    Reference:
        Szegedy et al., "Going deeper with convolutions", arXiv 1409.4842, section 6.
    """
    width, height = int(width), int(height)  # numpy's integers overflow in the draws below
    area = width * height
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(_TRIES):
        u = [hash_int(*keys, _CROP, 4 * attempt + k) * 2.0**-64 for k in range(2)]
        target = area * (scale[0] + (scale[1] - scale[0]) * u[0])
        aspect = math.exp(low + (high - low) * u[1])
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = hash_int(*keys, _CROP, 4 * attempt + 2) * (height - h + 1) >> 64
            left = hash_int(*keys, _CROP, 4 * attempt + 3) * (width - w + 1) >> 64
            return Crop((left, top, w, h), (image_size, image_size), (0, 0))
    if width < ratio[0] * height:
        w, h = width, round(width / ratio[0])
    elif width > ratio[1] * height:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    w, h = max(1, min(w, width)), max(1, min(h, height))
    return Crop(((width - w) // 2, (height - h) // 2, w, h), (image_size, image_size), (0, 0))


def centre_crop(width: int, height: int, image_size: int, crop_pct: float) -> Crop:
    """The evaluation view: the short side resized to ⌊S / crop_pct⌋, the centre kept; torchvision's and timm's rounding.

    Of a strip longer than 32 times its width only the middle is resized: whole, 2 × 20000 pixels would take gigabytes.
    """
    short = math.floor(image_size / crop_pct)
    longest = _LONGEST * min(width, height)
    w, h = min(width, longest), min(height, longest)
    size = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    window = (round((size[0] - image_size) / 2), round((size[1] - image_size) / 2))
    return Crop(((width - w) // 2, (height - h) // 2, w, h), size, window)
