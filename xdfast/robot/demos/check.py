"""Every episode read once: what is wrong with it, and how the numbers are distributed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from xdfast.robot.demos.episode import Episode
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.open import Demonstrations
from xdfast.robot.demos.validate import episode_problems

__all__ = ["DemoReport", "Problem", "Statistics", "check_demos"]

_BLACK = 2  # of 255: an image without a brighter value shows nothing
_FAR = 10.0  # times the spread of the middle 98 %
_MANY = 100  # values below which that spread means little
_FEW = 3  # so many values far away are a fault of the recording; more are a rare movement


@dataclass(frozen=True)
class Problem:
    """What is wrong, and where: the file of an episode, or the whole data set."""

    where: str
    what: str


@dataclass
class Statistics:
    """Of each dimension over all steps of the readable episodes, float64 ``[D]``; empty if there are none."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> Statistics:
        """Of ``[N, D]``."""
        if len(values) == 0:
            return cls(*(np.zeros(0) for _ in range(4)))
        wide = values.astype(np.float64)
        return cls(wide.min(0), wide.max(0), wide.mean(0), wide.std(0))


@dataclass
class DemoReport:
    """What :func:`check_demos` found.

    Attributes:
        episodes: how many there are.
        read: how many could be used.
        steps: in those.
        problems: reasons not to train on this data.
        notes: what may be meant so.
        actions: statistics of each action dimension.
        state: statistics of each state dimension.
        brightness: camera → mean value of its images, 0 to 255.
        successes: episodes with a successful step; None where the format does not tell.
    """

    episodes: int
    read: int = 0
    steps: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    actions: Statistics = field(default_factory=lambda: Statistics.of(np.zeros((0, 0))))
    state: Statistics = field(default_factory=lambda: Statistics.of(np.zeros((0, 0))))
    brightness: dict[str, float] = field(default_factory=dict)
    successes: int | None = None


def check_demos(demos: Demonstrations, *, progress: Callable[[int, int], None] | None = None) -> DemoReport:
    """Reads every episode, one at a time.

    Problems: episodes that cannot be read; missing frames, NaN, other sizes; black images; an image sequence that stands still;
    the same episode twice; single values far from all others; actions none of which ever changes. Notes: dimensions that never
    change (a gripper that stays open is no fault), actions beyond [-1, 1], episodes without success.

    Args:
        demos: what to check.
        progress: called with (episodes read, episodes).
    """
    report = DemoReport(len(demos))
    actions, states, ends = [], [], []
    sums = dict.fromkeys(demos.cameras, 0.0)
    seen: dict[str, str] = {}
    told: list[bool] = []
    for i in range(len(demos)):
        where = demos.where(i)
        try:
            episode = demos.read(i)
            problems = episode_problems(episode, demos.spec)
        except DemoError as error:
            report.problems.append(Problem(where, str(error)))
        else:
            report.problems += [Problem(where, what) for what in problems]
            if not problems:
                report.problems += [
                    Problem(where, what) for what in [*_image_problems(episode), *_twice(episode, where, seen)]
                ]
                actions.append(episode.actions)
                states.append(episode.state)
                ends.append(i)
                for camera, frames in episode.images.items():
                    sums[camera] += float(frames.mean()) * len(frames)
                if episode.success is not None:
                    told.append(bool(episode.success.any()))
        if progress is not None:
            progress(i + 1, len(demos))
    report.read, report.steps = len(actions), sum(map(len, actions))
    if not actions:
        return report
    report.actions, report.state = Statistics.of(np.concatenate(actions)), Statistics.of(np.concatenate(states))
    report.brightness = {camera: total / report.steps for camera, total in sums.items()}
    report.successes = sum(told) if told else None
    if (report.actions.low == report.actions.high).all():
        report.problems.append(Problem(str(demos.path), "all actions are the same: there is nothing to learn"))
    for name, values in (("actions", actions), ("state", states)):
        report.problems += _outliers(name, values, [demos.where(i) for i in ends])
    report.notes = _notes(report, told)
    return report


def _image_problems(episode: Episode) -> list[str]:
    found = []
    for camera, frames in episode.images.items():
        peaks = frames.reshape(len(frames), -1).max(1)
        black = np.flatnonzero(peaks <= _BLACK)
        if len(black):
            found.append(
                f"camera {camera!r}: {len(black)} of {len(frames)} images are black, the first at step {black[0]}"
            )
        elif len(frames) > 1 and (frames == frames[0]).all():
            found.append(f"camera {camera!r}: all {len(frames)} images are the same")
    return found


def _twice(episode: Episode, where: str, seen: dict[str, str]) -> list[str]:
    digest = hashlib.sha256(
        np.ascontiguousarray(episode.actions).tobytes() + np.ascontiguousarray(episode.state).tobytes()
    )
    for frames in episode.images.values():
        digest.update(np.ascontiguousarray(frames[0]).tobytes())
    first = seen.setdefault(digest.hexdigest(), where)
    return [] if first == where else [f"the same episode as {first}"]


def _outliers(name: str, parts: list[np.ndarray], wheres: list[str]) -> list[Problem]:
    """The farthest value of each dimension, if it is far beyond what 98 % of the values span: it would set the normalisation."""
    values = np.concatenate(parts)
    if len(values) < _MANY or values.shape[1] == 0:
        return []
    low, middle, high = np.percentile(values, (1, 50, 99), axis=0)
    spread = high - low
    distance = np.abs(values - middle)
    found = []
    far = (distance > _FAR * spread).sum(0)
    for d in np.flatnonzero((spread > 0) & (far >= 1) & (far <= _FEW)):
        row = int(distance[:, d].argmax())
        starts = np.cumsum([0, *map(len, parts)])
        episode = int(np.searchsorted(starts, row, side="right")) - 1
        found.append(
            Problem(
                wheres[episode],
                f"{name}: {values[row, d]:g} at step {row - starts[episode]}, dimension {d}, is far out of range: "
                f"98 % of all values are within {low[d]:g} and {high[d]:g}",
            )
        )
    return found


def _notes(report: DemoReport, told: list[bool]) -> list[str]:
    notes = []
    beyond = np.flatnonzero((report.actions.low < -1) | (report.actions.high > 1))
    if len(beyond):
        notes.append(f"action dimensions {beyond.tolist()} go beyond [-1, 1]; the policy normalises them")
    for name, statistics in (("action", report.actions), ("state", report.state)):
        fixed = np.flatnonzero(statistics.low == statistics.high)
        if len(fixed):
            notes.append(f"{name} dimensions {fixed.tolist()} never change")
    if told and not all(told):
        notes.append(f"{told.count(False)} of {len(told)} episodes never report success")
    return notes
