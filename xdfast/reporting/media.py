"""Videos and pictures inside a page: as much as fits, a list of the rest, and pictures under a map of what matters in them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xdfast.reporting.policy_tables import TaskGroups, runs_of

__all__ = ["Clip", "Clips", "choose_clips", "data_uri", "overlay"]

#: A page with more is slow to open; base64 adds a third.
MOST_BYTES = 12 * 2**20
#: Successes, and failures, of each group.
MOST_EACH = 2


@dataclass(frozen=True)
class Clip:
    """One video of an episode.

    Attributes:
        task, label, run: whose.
        name: "success-SEED" or "failure-SEED".
        solved: which of the two.
        words: for people, such as "seed 100003, not solved in 200 steps".
        file: where it lies.
    """

    task: str
    label: str
    run: str
    name: str
    solved: bool
    words: str
    file: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"task": self.task, "label": self.label, "run": self.run, "name": self.name, "file": str(self.file)}


@dataclass
class Clips:
    """Which videos go into the page.

    Attributes:
        shown: in the order of tasks and groups.
        left_out: for want of room.
        missing: sentences about files that are not there.
    """

    shown: list[Clip] = field(default_factory=list)
    left_out: list[Clip] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def choose_clips(tasks: Sequence[TaskGroups], most_bytes: int = MOST_BYTES, most_each: int = MOST_EACH) -> Clips:
    """The first successes and failures of every group, round by round, so that a small room is shared by all groups."""
    clips = Clips()
    queues: list[list[Clip]] = []  # per group and outcome
    for task in tasks:
        for group in task.groups:
            found: dict[bool, list[Clip]] = {True: [], False: []}
            for run in runs_of(group):
                steps = {episode["seed"]: episode["steps"] for episode in run.episodes}
                for name, file in run.videos.items():
                    if not file.is_file():
                        clips.missing.append(
                            f"{run.name}: the video {file} is not there any more; evaluate makes it again"
                        )
                        continue
                    outcome, _, seed = name.partition("-")
                    taken = steps.get(int(seed)) if seed.isdigit() else None
                    solved = outcome == "success"
                    words = f"seed {seed}, {'solved' if solved else 'not solved'}" + (
                        f" in {taken} steps" if taken else ""
                    )
                    found[solved].append(Clip(task.task, group.label, run.name, name, solved, words, file))
            queues += [found[True], found[False]]
    room = most_bytes
    chosen: set[Clip] = set()
    for turn in range(most_each):
        for queue in queues:
            if turn < len(queue) and queue[turn].file.stat().st_size <= room:
                room -= queue[turn].file.stat().st_size
                chosen.add(queue[turn])
    for queue in queues:
        for clip in queue:
            (clips.shown if clip in chosen else clips.left_out).append(clip)
    return clips


def data_uri(file: Path, kind: str) -> str:
    """The file as ``data:KIND;base64,…``. Raises OSError: it cannot be read."""
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"


def overlay(frame: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """uint8 ``[S, S, 3]``: the frame greyed and darkened where nothing matters, in inferno colours where something does."""
    import matplotlib

    grey = frame.astype(np.float32).mean(2, keepdims=True) / 255
    colour = matplotlib.colormaps["inferno"](0.25 + 0.75 * heat)[..., :3]
    share = 0.7 * heat[..., None]
    return (255 * ((1 - share) * 0.8 * grey + share * colour)).clip(0, 255).astype(np.uint8)
