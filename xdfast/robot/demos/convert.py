"""Any format into our own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from xdfast.robot.demos.episode import Episode
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.format import DemoWriter
from xdfast.robot.demos.open import Demonstrations

__all__ = ["convert_demos", "resize_frames"]


def convert_demos(
    demos: Demonstrations,
    out: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DemoWriter:
    """Writes every episode in our format; a conversion that was interrupted goes on where it stopped.

    Args:
        demos: the source; every episode must be sound.
        out: a new folder, or that of the same conversion.
        image_size: all cameras are resized to (height, width); one number for a square; None: as they are.
        progress: called with (episodes in ``out``, episodes).

    Raises:
        DemoError: an episode is not sound, ``out`` was begun with other settings or another source, or cannot be written.
    """
    if Path(out).expanduser().resolve() == demos.path.resolve():
        raise DemoError(f"{out} is the source itself; name another folder")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and min(size) < 1:
        raise DemoError(f"image_size={image_size!r}: give the pixels of a side, or (height, width)")
    facts = {
        **demos.facts,
        "source": {"format": demos.format, "name": demos.path.name, "fingerprint": demos.fingerprint()},
        "resized_from": {camera: list(old) for camera, old in demos.image_sizes.items()} if size else None,
    }
    writer = DemoWriter(
        out,
        task=demos.task,
        cameras={camera: size or old for camera, old in demos.image_sizes.items()},
        fps=demos.fps,
        action_dim=demos.action_dim,
        state_dim=demos.state_dim,
        facts=facts,
    )
    for i in range(len(demos)):
        if i not in writer.done:
            episode = demos.episode(i)
            writer.write(_resized(episode, size) if size else episode, index=i)
        if progress is not None:
            progress(i + 1, len(demos))
    return writer


def resize_frames(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 ``[T, H, W, 3]`` → ``[T, *size, 3]``: Pillow's bilinear filter, which averages when it shrinks (antialias)."""
    from PIL import Image

    height, width = size
    if frames.shape[1:3] == (height, width):
        return frames
    small = [Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR) for frame in frames]
    return np.stack([np.asarray(image) for image in small])


def _resized(episode: Episode, size: tuple[int, int]) -> Episode:
    return replace(episode, images={camera: resize_frames(frames, size) for camera, frames in episode.images.items()})
