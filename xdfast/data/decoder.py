"""Which decoder makes the views: Pillow in worker processes or NVIDIA DALI, and why."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import torch

from xdfast.data.dali import INTERPOLATIONS, dali_available
from xdfast.data.decode import BadImage, open_image
from xdfast.data.sources import ImageSource
from xdfast.data.views import Views
from xdfast.errors import nearest

__all__ = ["DECODERS", "Decoder", "choose_decoder"]

log = logging.getLogger("xdfast")

Decoder = Literal["auto", "pillow", "dali", "dali-gpu"]
DECODERS = ("auto", "pillow", "dali", "dali-gpu")

_PROBES = 8
_SMALL_VIEW = 64  # below it, what surrounds an image costs more than its pixels


def choose_decoder(wanted: str, source: ImageSource, views: Views) -> tuple[str, str]:
    """(``"pillow"``, ``"dali"`` or ``"dali-gpu"``, the reason in a few words).

    ``"auto"`` takes DALI on the CPU where it is installed, can make these views and has JPEGs to decode. Decoding on a
    GPU has to be asked for.

    Raises:
        ValueError: unknown name, or DALI is asked for and cannot make these views of this source; the message says why.
        ImportError: DALI is asked for and not installed.
        RuntimeError: ``"dali-gpu"`` without a GPU.
    """
    if wanted not in DECODERS:
        raise ValueError(
            f"decoder must be one of {', '.join(DECODERS)}, got {wanted!r}.{nearest(str(wanted), DECODERS)}"
        )
    if wanted == "pillow":
        return "pillow", "asked for"
    installed, version = dali_available()
    why_not = _cannot(source, views)
    if wanted == "auto":
        if not installed:
            return "pillow", f"DALI is {version}"
        why_not = why_not or _no_gain(source, views)
        return ("pillow", why_not) if why_not else ("dali", version)
    if why_not:
        raise ValueError(f"decoder={wanted!r} cannot be used: {why_not}; use decoder='pillow' or 'auto'")
    if not installed:
        raise ImportError(f"decoder={wanted!r} needs NVIDIA DALI, which is {version}", name="nvidia.dali")
    if wanted == "dali-gpu" and not torch.cuda.is_available():
        raise RuntimeError("decoder='dali-gpu' needs a CUDA device and there is none; use decoder='dali'")
    return wanted, f"asked for; {version}"


def _cannot(source: ImageSource, views: Views) -> str:
    """Why DALI cannot make these views, or nothing."""
    if not source.encoded:
        return f"{source.name} has no image files (pixels in memory, or a dataset of yours)"
    if views.augment.interpolation not in INTERPOLATIONS:
        return f"interpolation {views.augment.interpolation!r} is Pillow's alone ({', '.join(INTERPOLATIONS)} are not)"
    if views.train and views.augment.auto_augment:
        return f"auto_augment {views.augment.auto_augment!r} is done by Pillow, image by image"
    return ""


def _no_gain(source: ImageSource, views: Views) -> str:
    """Why Pillow is as fast, or nothing."""
    if views.image_size <= _SMALL_VIEW:
        return f"views of {views.image_size} pixels are made as fast by Pillow"
    for i in np.unique(np.linspace(0, len(source) - 1, _PROBES).astype(int)):
        try:
            data = source.read(int(i))
            if data is not None and open_image(data, source.path(int(i))).format == "JPEG":
                return ""
        except BadImage:
            continue
    return f"no JPEG among the files of {source.name} that were looked at"
