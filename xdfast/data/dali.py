"""NVIDIA DALI as a decoder of JPEGs, on the CPU and the GPU.

DALI's own readers, shufflers and random crops are not used: order, crops and colours come from xdfast, so that Pillow and
DALI make the same views. On the CPU only the crop is decoded (bit by bit what Pillow decodes), and torch resizes it: DALI's
antialiased resize takes four to six times as long. On a GPU DALI does everything, equal to 0.2 of 255 on average. What
parity needs is set here: no EXIF rotation, antialiasing, sizes and windows as integers (DALI rounds its own otherwise:
another pixel in more than half of ImageNet), never the fast inverse DCT.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdfast.data.crops import Crop

__all__ = ["INTERPOLATIONS", "DaliDecoder", "DaliError", "DaliRenderer", "dali_available"]

log = logging.getLogger("xdfast")

#: Augment.interpolation → DALI's. Its lanczos differs from Pillow's by 1 of 255 on average, the others it has not.
INTERPOLATIONS = {"bilinear": "INTERP_LINEAR", "bicubic": "INTERP_CUBIC"}


class DaliError(RuntimeError):
    """DALI could not decode a batch; which image it was is not said."""


@lru_cache(maxsize=1)
def dali_available() -> tuple[bool, str]:
    """Whether nvidia-dali is installed and loads, and its version or why not."""
    import importlib.util

    try:
        if importlib.util.find_spec("nvidia.dali") is None:
            return False, "not installed: pip install 'xdfast[data]' (Linux)"
        import nvidia.dali as dali
    except ModuleNotFoundError:  # no package called nvidia at all
        return False, "not installed: pip install 'xdfast[data]' (Linux)"
    except (ImportError, OSError) as error:
        return False, f"installed, but fails to load ({error}); reinstall it: pip install 'xdfast[data]'"
    if not hasattr(dali, "pipeline_def"):
        return False, f"nvidia.dali at {dali.__file__} is not NVIDIA DALI; reinstall it: pip install 'xdfast[data]'"
    return True, f"DALI {dali.__version__}"


class _Graph:
    """A DALI pipeline that is built at the first call, and again after a failure."""

    def __init__(self, build: Callable[[], Any]) -> None:
        ok, reason = dali_available()
        if not ok:
            raise ImportError(f"NVIDIA DALI is {reason}", name="nvidia.dali")
        self._build = build
        self._pipeline: Any = None

    def run(self, feed: dict[str, Any]) -> Any:
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            (output,) = self._pipeline.run(**feed)
        except RuntimeError as error:
            self._pipeline = None  # it cannot run again: "Current pipeline object is no longer valid"
            raise DaliError(str(error)) from error
        return output

    def close(self) -> None:
        """Ends DALI's threads."""
        self._pipeline = None


class DaliDecoder(_Graph):
    """Decodes the crops of JPEGs on the CPU.

    Args:
        batch_size: largest number of images in one call.
        threads: DALI's threads.

    Raises:
        ImportError: DALI is missing or broken.
    """

    def __init__(self, batch_size: int, threads: int) -> None:
        super().__init__(lambda: _decoder(batch_size, threads))

    def __call__(self, encoded: Sequence[bytes], crops: Sequence[Crop]) -> list[np.ndarray]:
        """uint8 ``[height, width, 3]`` of each crop's box.

        Raises:
            DaliError: one of the files cannot be decoded. The next call works again.
        """
        pixels = self.run(_feed(encoded, crops))
        return [np.asarray(pixels.at(i)) for i in range(len(pixels))]


class DaliRenderer(_Graph):
    """Makes whole views of JPEGs: decode, resize, window, flip, jitter.

    Args:
        batch_size: largest number of images in one call.
        image_size: S.
        interpolation: ``"bilinear"`` or ``"bicubic"``, antialiased.
        threads: DALI's threads.
        device: the number of a GPU ("mixed" decoding: bytes parsed by the CPU, the rest by the GPU's decoder), or None
            for the CPU (tests compare it with Pillow there).
        jitter: changes colours as well.

    Raises:
        ImportError: DALI is missing or broken.
    """

    def __init__(
        self, batch_size: int, image_size: int, interpolation: str, threads: int, device: int | None, jitter: bool
    ) -> None:
        name = INTERPOLATIONS[interpolation]
        super().__init__(lambda: _renderer(batch_size, image_size, name, threads, device, jitter))
        self._jitter = jitter

    def __call__(
        self, encoded: Sequence[bytes], crops: Sequence[Crop], jitters: Sequence[list[tuple[str, float]]]
    ) -> Tensor:
        """uint8 ``[B, S, S, 3]``: a view of each file.

        Raises:
            DaliError: one of the files cannot be decoded. The next call works again.
        """
        feed = _feed(encoded, crops)
        feed["size"] = np.array([(c.size[1], c.size[0]) for c in crops], dtype=np.float32)
        feed["window"] = np.array([(c.window[1], c.window[0]) for c in crops], dtype=np.int32)
        feed["flip"] = np.array([c.flip for c in crops], dtype=np.int32)
        if self._jitter:
            feed["jitter"] = np.array([_jitter_row(j) for j in jitters], dtype=np.float32)
        return torch.from_dlpack(self.run(feed).as_tensor())  # no copy: DALI takes new memory for the next batch


def _feed(encoded: Sequence[bytes], crops: Sequence[Crop]) -> dict[str, Any]:
    return {
        "encoded": [np.frombuffer(data, dtype=np.uint8) for data in encoded],
        "box": np.array([(c.box[1], c.box[0], c.box[3], c.box[2]) for c in crops], dtype=np.int32),
    }


def _jitter_row(jitter: list[tuple[str, float]]) -> list[float]:
    """Three steps of (factor, is contrast, is saturation); see :func:`_jitter`."""
    return [value for name, factor in jitter for value in (factor, name == "contrast", name == "saturation")]


def _decode(device: str, **options: Any) -> Any:
    """Nodes of a graph: the crop of each file, uint8 HWC."""
    from nvidia.dali import fn, types

    box = fn.external_source(name="box", dtype=types.INT32, ndim=1)  # top, left, height, width
    return fn.decoders.image_slice(
        fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
        box[:2],
        box[2:],
        axes=[0, 1],
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        use_fast_idct=False,
        **options,
    )


# Calls are synchronous (a bad file is then in the batch at hand); the loader makes them ahead in a thread of its own.
_SYNCHRONOUS = {"prefetch_queue_depth": 1, "exec_dynamic": True}


def _decoder(batch_size: int, threads: int) -> Any:
    from nvidia.dali import pipeline_def

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None, **_SYNCHRONOUS)
    def graph() -> Any:
        return _decode("cpu")

    pipeline = graph()
    pipeline.build()
    return pipeline


def _renderer(
    batch_size: int, image_size: int, interpolation: str, threads: int, device: int | None, jitter: bool
) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=device, **_SYNCHRONOUS)
    def graph() -> Any:
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        window = fn.external_source(name="window", dtype=types.INT32, ndim=1)
        # On the GPU libjpeg's chroma filter has to be asked for.
        image = _decode("cpu") if device is None else _decode("mixed", jpeg_fancy_upsampling=True)
        image = fn.resize(image, size=size, interp_type=getattr(types, interpolation), antialias=True)
        image = fn.slice(image, start=window, shape=[image_size, image_size], axes=[0, 1])
        image = fn.flip(image, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))
        if jitter:
            image = _jitter(image, fn.external_source(name="jitter", dtype=types.FLOAT, ndim=1))
        return image

    pipeline = graph()
    pipeline.build()
    return pipeline


def _jitter(image: Any, steps: Any) -> Any:
    """Brightness, contrast and saturation in any order, without branches.

    Each is a blend with a reference: black, the mean grey level, the image in grey; ``steps`` [9] has, for each of three
    steps, the factor and which reference. Rounding follows Pillow: down after each step.
    """
    from nvidia.dali import fn, math, types

    weights = np.array([[[0.299, 0.587, 0.114]]], dtype=np.float32)
    for step in range(3):
        factor, contrast, saturation = (steps[3 * step + k] for k in range(3))
        pixels = fn.cast(image, dtype=types.FLOAT)
        grey = math.floor(fn.reductions.sum(pixels * types.Constant(weights), axes=[2], keep_dims=True) + 0.5)
        mean = math.floor(fn.reductions.mean(grey) + 0.5)
        reference = contrast * mean + saturation * grey
        image = fn.cast(
            math.floor(math.clamp(pixels * factor + reference * (1.0 - factor), 0.0, 255.0)), dtype=types.UINT8
        )
    return image
