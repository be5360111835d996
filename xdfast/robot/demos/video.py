"""Frames of a part of a video, by their times."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xdfast._optional import require
from xdfast.robot.demos.errors import DemoError

__all__ = ["read_frames"]

_TOLERANCE = 0.1  # of the time between two frames


def read_frames(path: Path, times: np.ndarray, fps: float, what: str) -> np.ndarray:
    """The frames shown at ``times``, each decoded once, in order.

    Args:
        path: a video of any codec that FFmpeg decodes (AV1, h264, …).
        times: float64 ``[T]`` seconds, ascending.
        fps: frames a second; a frame belongs to a time when it is at most a tenth of a frame's duration away.
        what: whose frames these are, for messages.

    Returns:
        uint8 ``[T, H, W, 3]``.

    Raises:
        DemoError: the file is missing or damaged, or has no frame at one of the times.
        ImportError: PyAV is missing.
    """
    av = require("av", extra="robot", purpose="videos")
    if not path.is_file():
        raise DemoError(f"{what}: the video {path} is missing; download or copy it again")
    found: dict[int, np.ndarray] = {}
    to_rgb = (
        av.video.reformatter.VideoReformatter()
    )  # one for all frames: frame.to_ndarray() makes its own, ten times as slow
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DemoError(f"{what}: {path} has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if times[0] > 1 / fps:  # to the key frame before the first wanted one
                container.seek(int((times[0] - 0.5 / fps) / stream.time_base), stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.time is None:
                    continue
                nearest = int(np.abs(times - frame.time).argmin())
                if abs(times[nearest] - frame.time) <= _TOLERANCE / fps:
                    found[nearest] = to_rgb.reformat(frame, format="rgb24").to_ndarray()
                if frame.time > times[-1]:
                    break
                if len(found) == len(times):
                    break
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:  # the last: damaged names inside the file
        raise DemoError(f"{what}: {path} cannot be decoded ({error}); download or copy it again") from error
    if len(found) < len(times):
        first = next(i for i in range(len(times)) if i not in found)
        raise DemoError(
            f"{what}: {path} has {len(found)} of {len(times)} frames; the first missing one is step {first}, at "
            f"{times[first]:.3f} s of the video. Download or copy it again"
        )
    return np.stack([found[i] for i in range(len(times))])
