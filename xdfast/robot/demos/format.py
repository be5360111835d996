"""Our own demonstrations: a folder with a manifest and one checked file per episode. docs/demonstrations.md describes it.

::

    manifest.json                  what all episodes share
    episodes/000012.safetensors    images.CAMERA uint8 [T, H, W, 3], state and actions float32, success bool, info.NAME float32
    failed.json                    {"seeds": [...]}: the scripted expert did not solve these
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from xdfast.atomic import write_whole
from xdfast.errors import nearest
from xdfast.robot.demos.episode import Episode
from xdfast.robot.demos.episode_file import EpisodeHeader, read_episode, read_header, write_episode
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.manifest import MANIFEST, Manifest
from xdfast.robot.demos.validate import EpisodeSpec, episode_problems

__all__ = ["DemoFolder", "DemoWriter", "failed_seeds", "is_demo_folder"]

_EPISODES, _FAILED = "episodes", "failed.json"
_NAME = re.compile(r"(\d{6,})\.safetensors")
_ABANDONED = 60.0  # seconds after which a file aside of a process that is gone is rubbish


def is_demo_folder(path: Path) -> bool:
    """Whether a :class:`DemoWriter` made this folder."""
    return (path / MANIFEST).is_file() and (path / _EPISODES).is_dir()


class DemoWriter:
    """Writes episodes into a folder, each of them whole or not at all; a folder of the same settings is continued.

    Several processes may write different episodes of one folder at the same time.

    Args:
        folder: made if it is not there.
        task: ``"metaworld/drawer-open-v3"``, or None.
        cameras: camera → (height, width) in pixels.
        fps: control frequency in Hz, or None.
        action_dim: numbers in an action.
        state_dim: numbers of proprioception.
        facts: whatever else shall be kept, as JSON: simulator versions, collection settings. They count as settings.

    Attributes:
        done: index → seed of the episodes in the folder, those of earlier sessions included.
        failed: seeds whose expert failed.

    Raises:
        DemoError: the folder was begun with other settings (both values are named), an episode in it is damaged, or it
            cannot be written.
    """

    done: dict[int, int | None]
    failed: set[int]

    def __init__(
        self,
        folder: str | Path,
        *,
        task: str | None,
        cameras: Mapping[str, tuple[int, int]],
        fps: float | None,
        action_dim: int,
        state_dim: int,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        sizes = {name: (size[0], size[1]) for name, size in cameras.items()}
        self.manifest = Manifest(task, sizes, fps, action_dim, state_dim, dict(facts or {}))
        self._spec = EpisodeSpec(sizes, action_dim, state_dim)
        try:
            (self.folder / _EPISODES).mkdir(parents=True, exist_ok=True)
            if (self.folder / MANIFEST).exists():
                self._same_settings()
            else:
                self.manifest.save(self.folder)
        except OSError as error:
            raise DemoError(f"cannot write demonstrations to {self.folder}: {error}; choose another folder") from error
        _sweep(self.folder / _EPISODES)
        self.done = {index: read_header(path).seed for index, path in _episode_paths(self.folder).items()}
        self.failed = set(failed_seeds(self.folder))

    def write(self, episode: Episode, *, index: int) -> None:
        """Checks an episode and writes it to ``episodes/INDEX.safetensors``; on return it is on the disk.

        Raises:
            DemoError: the episode is not one of this data set (the step, camera or size is named), the index is taken,
                or the disk is full; what was written before is unharmed.
        """
        if index < 0:
            raise DemoError(f"{self.folder}: {index} is not the index of an episode; count from 0")
        if index in self.done:
            raise DemoError(f"{self.folder} has episode {index} already (seed {self.done[index]}); use another index")
        problems = episode_problems(episode, self._spec)
        if problems:
            raise DemoError(
                f"{self.folder}: episode {index} (seed {episode.seed}) is not written: {'; '.join(problems)}"
            )
        write_episode(_episode_path(self.folder, index), episode, index)
        self.done[index] = episode.seed

    def record_failure(self, seed: int) -> None:
        """Keeps the seed of an episode that its expert did not solve, so that nobody tries it again.

        Raises:
            DemoError: the disk is full or the folder cannot be written.
        """
        try:
            with open(self.folder / "lock", "ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another process may have added seeds since
                self.failed = {*self.failed, *failed_seeds(self.folder), seed}
                text = json.dumps({"seeds": sorted(self.failed)}) + "\n"
                write_whole(self.folder / _FAILED, lambda aside: aside.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise DemoError(f"cannot write {self.folder / _FAILED}: {error}; free some space") from error

    def _same_settings(self) -> None:
        differences = Manifest.load(self.folder).differences(self.manifest)
        if differences:
            raise DemoError(
                f"{self.folder} holds demonstrations of other settings ({'; '.join(differences)}); "
                "use the same settings to continue it, or another folder"
            )


class DemoFolder:
    """Reads a folder that :class:`DemoWriter` wrote, also while it is being written: it sees the episodes there now.

    Args:
        path: the folder.
        cameras: which cameras, in which order; default all.

    Raises:
        DemoError: not such a folder, no such camera, or the header of an episode is damaged.
    """

    format = "xdfast"

    def __init__(self, path: Path, *, cameras: Sequence[str] | None = None) -> None:
        self.path = path
        self.manifest = Manifest.load(path)
        there = self.manifest.cameras
        for name in cameras or ():
            if name not in there:
                raise DemoError(f"{path} has no camera {name!r}.{nearest(name, there)} It has: {', '.join(there)}")
        self._paths = list(_episode_paths(path).values())
        self._headers = [read_header(file) for file in self._paths]
        self.task = self.manifest.task
        self.image_sizes = {name: there[name] for name in (there if cameras is None else cameras)}
        self.fps = self.manifest.fps
        self.action_dim, self.state_dim = self.manifest.action_dim, self.manifest.state_dim
        self.lengths = [header.length for header in self._headers]
        self.facts = dict(self.manifest.facts)

    def read(self, i: int) -> Episode:
        """The ``i``-th episode in the order of indices. Raises: DemoError, if it is damaged."""
        header, episode = read_episode(self._paths[i])
        if header != self._headers[i]:
            raise DemoError(f"{self._paths[i]} has changed since it was opened; open the folder again")
        # a camera that an episode lacks is left out here, and reported as missing by whoever checks the episode; one that the
        # manifest does not know stays in, to be reported as well
        unused = set(self.manifest.cameras) - set(self.image_sizes)
        episode.images = {name: frames for name, frames in episode.images.items() if name not in unused}
        return episode

    def where(self, i: int) -> str:
        """The file of the ``i``-th episode, for messages."""
        return str(self._paths[i])

    def content_hash(self, count: int) -> str:
        """SHA-256 of the settings and of the checksums of the first ``count`` episodes; reads no more than their headers."""
        # facts are left out: two collections with equal content are the same data, whatever versions made them
        digest = hashlib.sha256(repr((self.task, self.image_sizes, self.fps, self.action_dim, self.state_dim)).encode())
        for header in self._headers[:count]:
            digest.update(_identity(header))
        return digest.hexdigest()


def _identity(header: EpisodeHeader) -> bytes:
    return f"{header.index} {header.seed} {header.length} {header.crc:08x}\n".encode()


def _episode_path(folder: Path, index: int) -> Path:
    return folder / _EPISODES / f"{index:06d}.safetensors"


def _episode_paths(folder: Path) -> dict[int, Path]:
    """index → file, in ascending order."""
    found = {}
    for path in (folder / _EPISODES).iterdir():
        if match := _NAME.fullmatch(path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def failed_seeds(folder: Path) -> list[int]:
    """Seeds that :meth:`DemoWriter.record_failure` kept, in ascending order.

    Raises:
        DemoError: the file is damaged.
    """
    path = folder / _FAILED
    try:
        seeds = json.loads(path.read_text(encoding="utf-8"))["seeds"]
        return [int(seed) for seed in seeds]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoError(f"{path} is damaged ({error}); delete it: those seeds are then tried again") from error


def _sweep(folder: Path) -> None:
    """Removes what a killed writer left half written. A process on another machine gets a minute's grace."""
    for aside in folder.glob(".*.aside"):
        with suppress(OSError, ValueError):
            if not _alive(int(aside.name.split(".")[-2])) and time.time() - aside.stat().st_mtime > _ABANDONED:
                aside.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
