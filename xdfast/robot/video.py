"""Frames to mp4 or GIF and back; needs PyAV (mp4) or Pillow (GIF), no ffmpeg program."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np

from xdfast._optional import require

__all__ = ["read_video", "write_gif", "write_mp4"]


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A name next to ``path`` to write to; renamed to ``path`` when all went well, removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # the suffix tells the container
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checked(frames: Iterable[np.ndarray], fps: float, suffix: str, path: Path) -> Iterator[np.ndarray]:
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path} must end in {suffix}")
    if not 0 < fps <= 1000:
        raise ValueError(f"fps={fps!r} must be above 0 and at most 1000")
    shape: tuple[int, ...] | None = None
    for number, frame in enumerate(frames):
        frame = np.asarray(frame)
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
            raise ValueError(f"frame {number} is {frame.dtype} {frame.shape}, not uint8 [H, W, 3]")
        if shape is not None and frame.shape != shape:
            raise ValueError(f"frame {number} is {frame.shape}, the ones before it {shape}")
        shape = frame.shape
        yield frame
    if shape is None:
        raise ValueError(f"no frames for {path}")


def write_mp4(path: str | Path, frames: Iterable[np.ndarray], fps: float, *, crf: int = 20) -> Path:
    """Writes an H.264 video that browsers play.

    Args:
        path: ends in ``.mp4``; appears only once it is complete. Its folder is made.
        frames: uint8 ``[H, W, 3]``, all of one size; may be a generator. Sides that are odd are lengthened by repeating the
            last row or column: 4:2:0 colour needs even ones.
        fps: frames per second.
        crf: quality, 0 (lossless) to 51; 20 looks clean at sizes of robot pictures.

    Returns:
        ``path``.

    Raises:
        ValueError: no frames, a frame of another size or type, an impossible ``fps``, another suffix.
    """
    av = require("av", "robot", purpose="videos")
    path = Path(path)
    pictures = _checked(frames, fps, ".mp4", path)
    first = next(pictures)
    height, width = first.shape[:2]
    with _aside(path) as temporary, av.open(str(temporary), "w", options={"movflags": "+faststart"}) as container:
        # PyAV takes the rate as a fraction; 1001 keeps 29.97 exact.
        stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height = width + width % 2, height + height % 2
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast", "threads": "1"}

        def encode(picture: np.ndarray) -> None:
            if height % 2 or width % 2:
                picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))

        encode(first)
        for picture in pictures:
            encode(picture)
        container.mux(stream.encode())  # what the encoder still holds
    return path


def read_video(path: str | Path) -> tuple[np.ndarray, float]:
    """All frames of a video.

    Returns:
        (uint8 ``[T, H, W, 3]``, frames per second). Sides are those of the file: even, see :func:`write_mp4`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a video, or one without a frame.
    """
    av = require("av", "robot", purpose="videos")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no video {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.base_rate or 0)
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    if not frames:
        raise ValueError(f"{path} has no frames")
    return np.stack(frames), fps


def write_gif(path: str | Path, frames: Iterable[np.ndarray], fps: float) -> Path:
    """Writes an endless GIF.

    GIF times are hundredths of a second and viewers slow down below two of them, so above 50 frames/s frames are left out
    to keep the speed.

    Args:
        path: ends in ``.gif``; appears only once it is complete.
        frames: uint8 ``[H, W, 3]``, all of one size.
        fps: frames per second.

    Raises:
        ValueError: as for :func:`write_mp4`.
    """
    from PIL import Image

    path = Path(path)
    pictures = list(_checked(frames, fps, ".gif", path))
    every = max(1, int(np.ceil(fps / 50)))
    images = [Image.fromarray(picture) for picture in pictures[::every]]
    with _aside(path) as temporary:
        images[0].save(
            temporary,
            save_all=True,
            append_images=images[1:],
            duration=max(20, 10 * round(100 * every / fps)),  # milliseconds
            loop=0,
            optimize=False,
        )
    return path
