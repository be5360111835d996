"""Reads LeRobotDataset v3: parquet tables, mp4 videos (or images in the tables), ``meta/``; without importing lerobot.

The layout is that of lerobot/datasets/utils.py and https://huggingface.co/docs/lerobot/lerobot-dataset-v3: several episodes
share a table and a video; ``meta/episodes`` tells which, and from when to when.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xdfast.errors import nearest
from xdfast.robot.demos.episode import Episode
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.keys import StateKey
from xdfast.robot.demos.lerobot_meta import LeRobotMeta, read_columns, to_array
from xdfast.robot.demos.source import hash_files
from xdfast.robot.demos.video import read_frames

__all__ = ["LeRobotSource"]

_PREFIXES = ("observation.images.", "observation.")


class LeRobotSource:
    """Episodes of a LeRobotDataset on disk.

    Args:
        path: the folder with ``meta/info.json``.
        cameras: features of images, whole (``observation.images.top``) or as what follows the prefix (``top``); default: all.
        state_keys: features of proprioception in order; default: ``observation.state``.
        action_key: default ``action``.

    Raises:
        DemoError: damaged, of another version, empty, or a name is not there.
        ImportError: pyarrow is missing.
    """

    format = "lerobot"

    def __init__(
        self,
        path: Path,
        *,
        cameras: Sequence[str] | None = None,
        state_keys: Sequence[str] | None = None,
        action_key: str | None = None,
    ) -> None:
        self.path = path
        self.meta = LeRobotMeta(path)
        images = {name: f for name, f in self.meta.features.items() if _is_colour(f)}
        if not images:
            raise DemoError(f"{path} has no images, which the policy needs. It has: {', '.join(self.meta.features)}")
        self._cameras = {
            _short(name): name for name in (images if cameras is None else map(self._camera(images), cameras))
        }
        self._action = action_key or "action"
        keys = ["observation.state"] if state_keys is None else list(state_keys)
        low = {name: f for name, f in self.meta.features.items() if f["dtype"] not in ("image", "video", "string")}
        for name, option in [(self._action, "action_key"), *((key, "state_keys") for key in keys)]:
            if name not in low:
                raise DemoError(f"{path} has no {name!r} ({option}).{nearest(name, low)} It has: {', '.join(low)}")
        self._state = [StateKey(name, 0, _size(low[name])) for name in keys]
        self.image_sizes = {short: _image_size(images[name]) for short, name in self._cameras.items()}
        self.action_dim = _size(low[self._action])
        self.state_dim = sum(key.size for key in self._state)
        self.lengths = [episode["length"] for episode in self.meta.episodes]
        self.fps: float | None = self.meta.fps
        tasks = self.meta.tasks()
        self.task = tasks[0] if len(tasks) == 1 else None
        self.facts: dict[str, Any] = {
            "robot_type": self.meta.info.get("robot_type"),
            "codebase_version": self.meta.info["codebase_version"],
            "tasks": tasks,
            "state_keys": keys,
            "action_key": self._action,
        }

    def read(self, i: int) -> Episode:
        """Episode ``i``; ``next.success`` and ``next.reward`` are kept where they are. Raises: DemoError, if it cannot be read."""
        names = [key.name for key in self._state] + [self._action, "timestamp", "frame_index"]
        extra = [name for name in ("next.success", "next.reward") if name in self.meta.features]
        stored = {short: name for short, name in self._cameras.items() if self.meta.features[name]["dtype"] == "image"}
        rows = read_columns(self.meta.data_file(i), i, [*dict.fromkeys(names), *extra, *stored.values()])
        length, where = self.lengths[i], self.where(i)
        if rows.num_rows != length:
            raise DemoError(f"{where} has {rows.num_rows} rows in {self.meta.data_file(i)}, {length} by meta/episodes")
        if to_array(rows, "frame_index", where).reshape(-1).tolist() != list(range(length)):
            raise DemoError(f"{where}: frame_index in {self.meta.data_file(i)} does not count from 0 to {length - 1}")
        times = to_array(rows, "timestamp", where).astype(np.float64).reshape(-1)
        images = {}
        for short, name in self._cameras.items():
            if short in stored:
                images[short] = _decode_images(rows.column(name), f"{where}, camera {short!r}")
            else:
                file, start = self.meta.video_file(i, name)
                images[short] = read_frames(file, start + times, self.meta.fps, f"{where}, camera {short!r}")
        parts = [key.take(to_array(rows, key.name, where)) for key in self._state]
        success = to_array(rows, "next.success", where).reshape(-1).astype(bool) if "next.success" in extra else None
        reward = (
            {"reward": to_array(rows, "next.reward", where).reshape(-1).astype(np.float32)}
            if "next.reward" in extra
            else {}
        )
        return Episode(
            images=images,
            state=np.concatenate(parts, 1) if parts else np.zeros((length, 0), np.float32),
            actions=to_array(rows, self._action, where).astype(np.float32).reshape(length, -1),
            success=success,
            info=reward,
        )

    def where(self, i: int) -> str:
        """``"FOLDER: episode 3"``."""
        return f"{self.path}: episode {i}"

    def content_hash(self, count: int) -> str:
        """SHA-256 of the tables and videos that the first ``count`` episodes need."""
        files = {self.path / "meta/info.json", *self.meta.episode_files}
        for i in range(count):
            files.add(self.meta.data_file(i))
            videos = [name for name in self._cameras.values() if self.meta.features[name]["dtype"] == "video"]
            files.update(self.meta.video_file(i, name)[0] for name in videos)
        return hash_files(files, self.path, self._cameras, self._state, self._action, count)

    def _camera(self, images: dict[str, Any]) -> Any:
        def find(name: str) -> str:
            whole = next((image for image in images if name in (image, _short(image))), None)
            if whole is None:
                known = [_short(image) for image in images]
                raise DemoError(f"{self.path} has no camera {name!r}.{nearest(name, known)} It has: {', '.join(known)}")
            return whole

        return find


def _short(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _is_colour(feature: dict[str, Any]) -> bool:
    """An image or a video of three channels; depth maps are stored as either, too."""
    if feature["dtype"] not in ("image", "video") or len(feature["shape"]) != 3:
        return False
    about = feature.get("info") or {}
    return 3 in (feature["shape"][0], feature["shape"][2]) and not about.get("video.is_depth_map")


def _size(feature: dict[str, Any]) -> int:
    return int(np.prod(feature["shape"], dtype=np.int64))


def _image_size(feature: dict[str, Any]) -> tuple[int, int]:
    """The feature's shape is [H, W, 3] as recorded, [3, H, W] in some data sets."""
    shape = [int(side) for side in feature["shape"]]
    return (shape[1], shape[2]) if shape[0] == 3 and shape[2] != 3 else (shape[0], shape[1])


def _decode_images(column: Any, what: str) -> np.ndarray:
    """uint8 ``[T, H, W, 3]`` from a column of encoded files: {"bytes", "path"}."""
    from PIL import Image

    frames = []
    for step, cell in enumerate(column.to_pylist()):
        try:
            with Image.open(io.BytesIO(cell["bytes"])) as image:
                frames.append(np.asarray(image.convert("RGB")))
        except (OSError, TypeError, SyntaxError, ValueError) as error:  # Pillow's ways to say that a file is damaged
            raise DemoError(f"{what}: the image of step {step} cannot be decoded ({error})") from error
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        raise DemoError(f"{what}: images of different sizes: {sorted(shapes)}")
    return np.stack(frames)
