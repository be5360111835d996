"""The part of a report that is about policies: its figures, pictures and media."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xdfast.reporting import policy_plots as plots
from xdfast.reporting.media import Clips, choose_clips, data_uri
from xdfast.reporting.policy_tables import (
    TaskGroups,
    averages,
    by_task,
    cost_rows,
    encoder_rows,
    latency_rows,
    policy_table,
    runs_of,
)
from xdfast.reporting.policy_words import differing_settings, findings, remarks, short
from xdfast.reporting.records import PolicyRecord
from xdfast.reporting.svg import Picture

__all__ = ["PolicyPart", "policy_part"]

#: Most pictures of stages, and saliency strips: one per encoder of the first tasks.
_MOST_PICTURES = 12


@dataclass(frozen=True)
class PolicyPart:
    """Of a page.

    Attributes:
        data: for the JSON and the tables.
        headline: sentences with what was found.
        pictures: section → drawings.
        clips: (title, videos with ``uri`` and ``words``) in order.
        strips: ``title`` and ``uri`` of saliency strips.
    """

    data: dict[str, Any]
    headline: list[str]
    pictures: dict[str, list[Picture]]
    clips: list[tuple[str, list[dict[str, str]]]]
    strips: list[dict[str, str]]


def policy_part(records: Sequence[PolicyRecord]) -> PolicyPart:
    """Everything about the policies.

    Raises:
        ValueError: no records.
    """
    tasks, left_out = by_task(records)
    rows, means = policy_table(tasks), averages(tasks)
    clips = choose_clips(tasks)
    strips, without = _strips(tasks)
    told = _stages(tasks)
    data = {
        "tasks": [task.task for task in tasks],
        "table": rows,
        "averages": means,
        "unequal": any(row["equal_budget"] is False and row["to_scratch"] for row in rows),
        "remarks": [*remarks(tasks), *left_out, *clips.missing, *without],
        "encoders": encoder_rows(tasks),
        "settings": differing_settings(tasks),
        "counted": cost_rows(tasks),
        "latency": latency_rows(tasks),
        "stages": [{"task": t.task, "label": label, "run": run.name, **(run.stages or {})} for t, label, run in told],
        "videos": [clip.to_dict() for clip in clips.shown],
        "videos_left_out": [clip.to_dict() for clip in clips.left_out],
    }
    look = plots.styles(tasks)
    drawn: dict[str, list[Picture | None]] = {
        "success": [plots.success(tasks, rows)],
        "training": [plots.policy_curves(task, look) for task in tasks],
        "stages": [
            plots.stages(run.stages, f"{_title(tasks, t, label)}, run {run.name}")
            for t, label, run in told
            if run.stages
        ],
    }
    pictures = {section: [p for p in found if p is not None] for section, found in drawn.items()}
    return PolicyPart(data, findings(rows, means), pictures, _cards(tasks, clips), strips)


def _title(tasks: Sequence[TaskGroups], task: TaskGroups, label: str) -> str:
    return f"{short(task.task)}, {label}" if len(tasks) > 1 else label


def _stages(tasks: Sequence[TaskGroups]) -> list[tuple[TaskGroups, str, PolicyRecord]]:
    """The first run of each group that has stages, and its label."""
    found = []
    for task in tasks:
        for group in task.groups:
            run = next((run for run in runs_of(group) if run.stages), None)
            if run is not None:
                found.append((task, group.label, run))
    return found[:_MOST_PICTURES]


def _strips(tasks: Sequence[TaskGroups]) -> tuple[list[dict[str, str]], list[str]]:
    """(strips, sentences about files that are not there): one per group."""
    found: list[dict[str, str]] = []
    without: list[str] = []
    for task in tasks:
        for group in task.groups:
            for run in runs_of(group):
                if run.saliency is None:
                    continue
                if not run.saliency.is_file():
                    without.append(
                        f"{run.name}: the saliency {run.saliency} is not there any more; evaluate makes it again"
                    )
                    continue
                if len(found) < _MOST_PICTURES:
                    title = f"{_title(tasks, task, group.label)}, run {run.name}"
                    found.append({"title": title, "uri": data_uri(run.saliency, "image/png")})
                break
    return found, without


def _cards(tasks: Sequence[TaskGroups], clips: Clips) -> list[tuple[str, list[dict[str, str]]]]:
    """Videos by task and group."""
    cards = []
    for task in tasks:
        for group in task.groups:
            part = [
                {"words": clip.words, "run": clip.run, "uri": data_uri(clip.file, "video/mp4")}
                for clip in clips.shown
                if (clip.task, clip.label) == (task.task, group.label)
            ]
            if part:
                cards.append((_title(tasks, task, group.label), part))
    return cards
