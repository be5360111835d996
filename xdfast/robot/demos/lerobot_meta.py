"""The descriptions and tables of a LeRobotDataset v3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from xdfast._optional import require
from xdfast.robot.demos.errors import DemoError

__all__ = ["INFO", "LeRobotMeta", "read_columns", "to_array"]

INFO = Path("meta") / "info.json"
_CONVERTER = "python -m lerobot.datasets.v30.convert_dataset_v21_to_v30 --repo-id=YOUR/DATASET"


class LeRobotMeta:
    """``meta/`` of a LeRobotDataset.

    Attributes:
        info: ``meta/info.json``.
        features: name → {"dtype", "shape", …}.
        fps: frames a second.
        episodes: rows of ``meta/episodes``, by episode index.
        episode_files: the tables these rows are from.

    Raises:
        DemoError: damaged, of another version, or without episodes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        file = path / INFO
        try:
            self.info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            version = str(self.info["codebase_version"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DemoError(f"{file} cannot be read ({error!r}); download the data set again") from error
        if not version.startswith("v3."):
            raise DemoError(
                f"{path} is a LeRobotDataset {version}, this xdfast reads v3: convert it with LeRobot's own `{_CONVERTER}`"
            )
        try:
            self.features: dict[str, dict[str, Any]] = {name: {**f} for name, f in self.info["features"].items()}
            self.fps = float(self.info["fps"])
            self._data_path, self._video_path = self.info["data_path"], self.info.get("video_path")
            for feature in self.features.values():
                feature["dtype"], feature["shape"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DemoError(f"{file} is damaged: {error!r}; download the data set again") from error
        self.episode_files = sorted((path / "meta" / "episodes").glob("*/*.parquet"))
        self.episodes = self._read_episodes()
        if not self.episodes:
            raise DemoError(f"{path} has no episodes (meta/episodes)")
        if [episode["episode_index"] for episode in self.episodes] != list(range(len(self.episodes))):
            raise DemoError(f"{path}: meta/episodes does not list every episode once; download the data set again")
        if any(not isinstance(episode.get("length"), int) or episode["length"] < 0 for episode in self.episodes):
            raise DemoError(f"{path}: meta/episodes lacks the length of an episode; download the data set again")
        promised = self.info.get("total_episodes", len(self.episodes))
        if promised != len(self.episodes):
            raise DemoError(
                f"{path}: meta/info.json promises {promised} episodes, meta/episodes has {len(self.episodes)}"
            )

    def tasks(self) -> list[str]:
        """What the robot is told to do, each text once, in the order of episodes."""
        return list(dict.fromkeys(task for episode in self.episodes for task in episode.get("tasks") or ()))

    def data_file(self, i: int) -> Path:
        """The table of episode ``i``."""
        episode = self.episodes[i]
        try:
            chunk, file = episode["data/chunk_index"], episode["data/file_index"]
        except KeyError as error:
            raise DemoError(f"{self.path}: meta/episodes does not say which table has episode {i} ({error})") from error
        return self._format(self._data_path, i, chunk, file)

    def video_file(self, i: int, feature: str) -> tuple[Path, float]:
        """The video of a camera in episode ``i``, and the second at which the episode begins in it."""
        episode, prefix = self.episodes[i], f"videos/{feature}"
        try:
            chunk, file = episode[f"{prefix}/chunk_index"], episode[f"{prefix}/file_index"]
            start = float(episode[f"{prefix}/from_timestamp"])
        except (KeyError, TypeError) as error:
            raise DemoError(
                f"{self.path}: meta/episodes does not say where the video of {feature} is ({error!r})"
            ) from error
        return self._format(self._video_path, i, chunk, file, feature), start

    def _format(self, pattern: Any, i: int, chunk: Any, file: Any, video_key: str = "") -> Path:
        try:
            return self.path / pattern.format(chunk_index=chunk, file_index=file, video_key=video_key)
        except (AttributeError, KeyError, ValueError, TypeError, IndexError) as error:
            raise DemoError(
                f"{self.path}: no file name for episode {i} from {pattern!r} in meta/info.json ({error!r})"
            ) from error

    def _read_episodes(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for file in self.episode_files:
            with _parquet_errors(file) as parquet:
                schema = parquet.read_schema(file)
                names = [
                    name for name in schema.names if not name.startswith("stats/")
                ]  # statistics are most of the table
                rows += parquet.read_table(file, columns=names).to_pylist()
        try:
            return sorted(rows, key=lambda row: row["episode_index"])
        except (KeyError, TypeError) as error:
            raise DemoError(f"{self.path}: meta/episodes is damaged: {error!r}") from error


class _parquet_errors:
    """Gives pyarrow.parquet; its errors, which are of several kinds, become ours, with the file named."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> Any:
        self._arrow = require("pyarrow", extra="robot", purpose="LeRobot's tables")
        return require("pyarrow.parquet", extra="robot", purpose="LeRobot's tables")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, UnicodeDecodeError, self._arrow.ArrowException)):
            raise DemoError(f"{self._file} is missing or damaged ({error}); download it again") from error


def read_columns(file: Path, episode: int, names: list[str]) -> Any:
    """The rows of one episode as a ``pyarrow.Table``, in the order of the file.

    Raises:
        DemoError: the file is missing or damaged, or has no such column.
    """
    with _parquet_errors(file) as parquet:
        there = parquet.read_schema(file).names
        absent = [name for name in names if name not in there]
        if absent:
            raise DemoError(
                f"{file} has no column {absent[0]!r}, which meta/info.json promises; it has: {', '.join(there)}"
            )
        return parquet.read_table(file, columns=names, filters=[("episode_index", "=", episode)])


def to_array(rows: Any, name: str, where: str) -> np.ndarray:
    """``[T, …]`` from a column of numbers or of lists of equal length.

    Raises:
        DemoError: a value is missing, or lists differ in length.
    """
    values = rows.column(name).to_pylist()
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise DemoError(f"{where}: {name!r} has not the same number of values at each step") from error
    if array.dtype.kind not in "biuf":
        raise DemoError(f"{where}: {name!r} has missing values, or values that are no numbers")
    return array
