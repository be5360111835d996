"""Common corruptions of images (ImageNet-C's, by the package ``imagecorruptions``) as a source that any loader reads."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

import numpy as np
from PIL import Image

from xdfast._optional import require
from xdfast.data._rng import hash_int, hash_name, preserved_rng, reseed
from xdfast.data.sources import ImageSource
from xdfast.errors import nearest

__all__ = ["FAMILIES", "LEAST_SIZE", "SEVERITIES", "CorruptedSource", "corruptions_version"]

#: Family → corruptions: the fifteen of ImageNet-C.
FAMILIES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
SEVERITIES = (1, 2, 3, 4, 5)
#: The package refuses smaller pictures, pixels a side.
LEAST_SIZE = 32
#: They draw from a generator of their own.
_OWN_SEED = ("impulse_noise", "glass_blur")


class CorruptedSource(ImageSource):
    """Each of n pictures as it is, then under every corruption at every severity: image ``cell * n + k``, cell 0 the clean one.

    What is drawn is a function of (seed, corruption, severity, k): any process makes the same pixels, in any order. The strengths
    are ImageNet-C's whatever the size of the pictures; CIFAR-10-C took weaker ones for its 32 pixels, so figures at that size are
    not those of CIFAR-10-C.

    Args:
        pixels: uint8 ``[n, S, S, 3]``, S ≥ 32.
        labels: int64 ``[n]``.
        classes: names.
        corruptions: of those in :data:`FAMILIES`; default: all fifteen.
        severities: 1 (weak) to 5.
        seed: of noise, weather and directions.

    Attributes:
        cells: (corruption, severity) of cells 1, 2, …

    Raises:
        ImportError: the package is missing.
        ValueError: an unknown corruption or severity, or other pictures.

    Reference:
        Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019.
        Michaelis et al., "Benchmarking Robustness in Object Detection", arXiv 1907.07484 (the package).
    """

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str],
        corruptions: Sequence[str] = (),
        severities: Sequence[int] = SEVERITIES,
        seed: int = 0,
    ) -> None:
        require("imagecorruptions", extra="analysis", purpose="corruptions of images")
        known = [name for family in FAMILIES.values() for name in family]
        for name in corruptions:
            if name not in known:
                raise ValueError(f"unknown corruption {name!r}.{nearest(name, known)} There are: {', '.join(known)}")
        for severity in severities:
            if severity not in SEVERITIES:
                raise ValueError(f"a severity is 1 (weak) to 5, got {severity!r}")
        shape = pixels.shape
        if (
            pixels.dtype != np.uint8
            or pixels.ndim != 4
            or shape[3] != 3
            or len(pixels) == 0
            or min(shape[1:3]) < LEAST_SIZE
        ):
            raise ValueError(
                f"expected pixels uint8 [n, S, S, 3] with S ≥ {LEAST_SIZE}, got {pixels.dtype} {list(pixels.shape)}"
            )
        if len(labels) != len(pixels):
            raise ValueError(f"expected one label for each of {len(pixels)} pictures, got {len(labels)}")
        self.name = "corruptions"
        self.classes = list(classes)
        self.cells = [(name, severity) for name in corruptions or known for severity in severities]
        self.labels = np.tile(np.asarray(labels, dtype=np.int64), 1 + len(self.cells))
        self._pixels = pixels
        self._seed = seed

    def load(self, i: int) -> Image.Image:
        cell, k = divmod(int(i), len(self._pixels))
        if cell == 0:
            return Image.fromarray(self._pixels[k])
        corruption, severity = self.cells[cell - 1]
        drawn = hash_int(hash_name(self._seed, f"{corruption}/{severity}", "corruption"), k)
        with preserved_rng():
            reseed(drawn)
            return Image.fromarray(_corrupt(self._pixels[k], corruption, severity, drawn & 0x7FFFFFFF))

    def path(self, i: int) -> str:
        cell, k = divmod(int(i), len(self._pixels))
        return f"picture {k}, " + ("clean" if cell == 0 else "{} {}".format(*self.cells[cell - 1]))

    def size(self, i: int) -> tuple[int, int]:
        return self._pixels.shape[2], self._pixels.shape[1]


def corruptions_version() -> str:
    """Of the package that makes the corruptions, with its name: another one may draw other noise."""
    for name in ("imagecorruptions-imaug", "imagecorruptions"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _corrupt(picture: np.ndarray, corruption: str, severity: int, seed: int) -> np.ndarray:
    from imagecorruptions import corrupt

    own = {"seed": seed} if corruption in _OWN_SEED else {}
    return corrupt(picture, severity=severity, corruption_name=corruption, **own)
