"""What a reader of some format offers, and helpers that the readers share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from xdfast.robot.demos.episode import Episode

__all__ = ["DemoSource", "hash_files"]

_BLOCK = 1 << 22


class DemoSource(Protocol):
    """Episodes in some format on disk; opening reads descriptions, :meth:`read` the data.

    Attributes:
        format: ``"xdfast"``, ``"lerobot"``, ``"diffusion_policy"`` or ``"robomimic"``.
        path: what was opened.
        task: its name or description; None where the format does not tell.
        image_sizes: camera → (height, width) in pixels.
        fps: control frequency in Hz; None where the format does not tell.
        action_dim: numbers in an action.
        state_dim: numbers of proprioception.
        lengths: steps of each episode.
        facts: whatever else is known, values as in JSON.
    """

    format: str
    path: Path
    task: str | None
    image_sizes: dict[str, tuple[int, int]]
    fps: float | None
    action_dim: int
    state_dim: int
    lengths: list[int]
    facts: dict[str, Any]

    def read(self, i: int) -> Episode:
        """Episode ``i`` as it is on disk, sound or not. Raises: DemoError, if it cannot be read."""

    def where(self, i: int) -> str:
        """Where episode ``i`` is, for messages."""

    def content_hash(self, count: int) -> str:
        """Hexadecimal digest of everything that the first ``count`` episodes are made from."""


def hash_files(paths: Iterable[Path], root: Path, *facts: object) -> str:
    """SHA-256 over names (below ``root``) and contents of files and over ``facts``, about 1 GB/s.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256(repr(facts).encode())
    for path in sorted(paths):
        digest.update(f"\n{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()
