"""Demonstrations of any format that xdfast reads, behind one class."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from xdfast.errors import nearest
from xdfast.robot.demos.diffusion_policy import DiffusionPolicySource
from xdfast.robot.demos.episode import Episode
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.format import DemoFolder, is_demo_folder
from xdfast.robot.demos.lerobot import LeRobotSource
from xdfast.robot.demos.lerobot_meta import INFO
from xdfast.robot.demos.manifest import MANIFEST
from xdfast.robot.demos.robomimic import RobomimicSource
from xdfast.robot.demos.source import DemoSource
from xdfast.robot.demos.validate import EpisodeSpec, episode_problems

__all__ = ["Demonstrations", "Format", "open_demos"]

Format = Literal["auto", "xdfast", "lerobot", "diffusion_policy", "robomimic"]
_HDF5 = b"\x89HDF\r\n\x1a\n"


class Demonstrations:
    """Episodes on disk, read one at a time. Keeps no open files: it can be pickled, and used after a fork.

    Attributes:
        path: what was opened.
        format: ``"xdfast"``, ``"lerobot"``, ``"diffusion_policy"`` or ``"robomimic"``.
        task: the task's name, or its description in words; None where the format does not tell.
        cameras: names, in the order of the policy's inputs.
        image_sizes: camera → (height, width) in pixels.
        fps: control frequency in Hz; None where the format does not tell.
        action_dim: numbers in an action; their range is the format's, not necessarily [-1, 1].
        state_dim: numbers of proprioception.
        lengths: steps of each episode.
        facts: whatever else the format tells, values as in JSON.
    """

    def __init__(self, source: DemoSource, count: int) -> None:
        self._source = source
        self.path = source.path
        self.format = source.format
        self.task = source.task
        self.image_sizes = dict(source.image_sizes)
        self.cameras = tuple(self.image_sizes)
        self.fps = source.fps
        self.action_dim = source.action_dim
        self.state_dim = source.state_dim
        self.lengths = source.lengths[:count]
        self.facts: dict[str, Any] = dict(source.facts)
        self.spec = EpisodeSpec(self.image_sizes, self.action_dim, self.state_dim)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[Episode]:
        return (self.episode(i) for i in range(len(self)))

    def episode(self, i: int) -> Episode:
        """Reads episode ``i``. Arrays may be read-only.

        Raises:
            IndexError: there are not that many.
            DemoError: it cannot be read, or is not sound: missing frames, NaN, another size of action, state or image.
        """
        episode = self.read(i)
        problems = episode_problems(episode, self.spec)
        if problems:
            raise DemoError(
                f"{self.where(i)} cannot be used: {'; '.join(problems)}. `xdfast demos check` looks at all episodes"
            )
        return episode

    def read(self, i: int) -> Episode:
        """Episode ``i`` as it is on disk, sound or not.

        Raises:
            IndexError: there are not that many.
            DemoError: it cannot be read.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"{self.path} has {len(self)} episodes, 0 to {len(self) - 1}; there is no {i}")
        return self._source.read(i)

    def where(self, i: int) -> str:
        """The file of episode ``i`` (and its number there), for messages."""
        return self._source.where(i)

    def fingerprint(self) -> str:
        """A digest of the content: the same for copies, another when any number or pixel of these episodes differs.

        Of our own format only the headers are read, which hold each episode's checksum (milliseconds; reading an episode
        compares it with that checksum). Of other formats every byte of the files used is read, at about 1 GB/s, and the choice
        of cameras, state and actions counts, as does the file layout: the same episodes converted have another fingerprint.
        """
        return self._source.content_hash(len(self))


def open_demos(
    path: str | Path,
    *,
    format: Format = "auto",
    limit: int | None = None,
    cameras: Sequence[str] | None = None,
    state_keys: Sequence[str] | None = None,
    action_key: str | None = None,
    mask: str | None = None,
) -> Demonstrations:
    """Opens demonstrations; pictures and numbers are read when an episode is asked for.

    Args:
        path: a folder of ``xdfast demos collect`` or ``convert``, a LeRobotDataset v3, a diffusion_policy ``.zarr`` folder or
            ``.zarr.zip``, or a robomimic ``.hdf5``.
        format: which of these; ``"auto"`` looks.
        limit: only the first so many episodes.
        cameras: which cameras, in which order; default all.
        state_keys: which arrays make up the proprioception, in order (not for our own format, which keeps one array).
        action_key: which array is the action (not for our own format).
        mask: robomimic's filter key, such as ``"train"``.

    Raises:
        DemoError: not there, damaged, of no known format, empty, a name that is not in it, or fewer than ``limit`` episodes.
        ImportError: the package that reads this format is missing.
    """
    path = Path(path).expanduser()
    if format not in get_args(Format):
        raise DemoError(
            f"format={format!r} is not known; {', '.join(get_args(Format))}.{nearest(format, get_args(Format))}"
        )
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DemoError(f"no demonstrations at {path}: there is no such file or folder.{nearest(path.name, siblings)}")
    found = _detect(path) if format == "auto" else format
    if mask is not None and found != "robomimic":
        raise DemoError(f"mask={mask!r} is for robomimic's files; {path} is of the format {found!r}")
    keys: dict[str, Any] = {"cameras": cameras, "state_keys": state_keys, "action_key": action_key}
    if found == "xdfast":
        if state_keys is not None or action_key is not None:
            raise DemoError(
                f"{path}: xdfast's own demonstrations have one state and one action; drop state_keys and action_key"
            )
        source: DemoSource = DemoFolder(path, cameras=cameras)
    elif found == "lerobot":
        source = LeRobotSource(path, **keys)
    elif found == "diffusion_policy":
        source = DiffusionPolicySource(path, **keys)
    else:
        source = RobomimicSource(path, **keys, mask=mask)
    there = len(source.lengths)
    if there == 0:
        raise DemoError(f"{path} has no episodes yet; `xdfast demos collect` or `convert` write them")
    if limit is not None and not 1 <= limit <= there:
        raise DemoError(
            f"{path} has {there} episodes, limit={limit} asks for {limit}; give 1 to {there}, or leave it out for all"
        )
    return Demonstrations(source, there if limit is None else limit)


def _detect(path: Path) -> Format:
    if path.is_dir():
        if is_demo_folder(path):
            return "xdfast"
        if (path / INFO).is_file():
            return "lerobot"
        if (path / ".zgroup").is_file() or (path / "zarr.json").is_file():
            return "diffusion_policy"
        hint = f"; {MANIFEST} is there without episodes/" if (path / MANIFEST).is_file() else ""
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise DemoError(
            f"{path} is no folder of demonstrations that xdfast knows{hint}: not its own (manifest.json, episodes/), not a "
            f"LeRobotDataset (meta/info.json), not zarr (.zgroup). It has: {inside}"
        )
    with open(path, "rb") as file:
        start = file.read(8)
    if start == _HDF5:
        return "robomimic"
    if start.startswith(b"PK"):
        return "diffusion_policy"
    raise DemoError(
        f"{path} is neither HDF5 (robomimic) nor a zip (diffusion_policy's .zarr.zip); it begins with {start!r}"
    )
