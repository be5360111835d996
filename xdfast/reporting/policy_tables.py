"""Success rates by task and encoder: means over seeds, pooled episodes, differences to the encoder trained from scratch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, cast

from xdfast.reporting.groups import Group, group_runs
from xdfast.reporting.intervals import wilson_interval
from xdfast.reporting.records import PolicyRecord
from xdfast.reporting.tables import Difference, difference, summarize

__all__ = [
    "TaskGroups",
    "averages",
    "baseline_of",
    "by_task",
    "cost_rows",
    "encoder_rows",
    "latency_rows",
    "policy_table",
]

#: What must be equal for two encoders to have had the same chance.
_BUDGET = ("steps", "demos", "batch size")


@dataclass
class TaskGroups:
    """One task and the groups of runs (one per encoder and settings) that acted in it."""

    task: str
    groups: list[Group]


def runs_of(group: Group) -> list[PolicyRecord]:
    """Its runs, of which each is a :class:`PolicyRecord`."""
    return cast(list[PolicyRecord], group.runs)


def by_task(records: Sequence[PolicyRecord]) -> tuple[list[TaskGroups], list[str]]:
    """(tasks in order of first appearance, notes on runs left out). Runs of a task that differ only in their seed are a group.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("a report needs at least one run record")
    tasks, notes = [], []
    for task in dict.fromkeys(record.task for record in records):
        groups, left_out = group_runs([record for record in records if record.task == task])
        tasks.append(TaskGroups(task, groups))
        notes += left_out
    return tasks, notes


def baseline_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """The group of the same task whose encoder was trained from scratch; None for such a group itself, and where none is.

    Of several the one with the same architecture and budget is taken, then the same budget, then the same architecture.
    None, too, where two are equally near: picking one of them would be arbitrary.
    """
    if group.is_scratch:
        return None

    def nearness(other: Group) -> tuple[bool, bool]:
        return budget(other) == budget(group), other.model_name == group.model_name

    found = sorted((g for g in groups if g.is_scratch), key=lambda g: (all(nearness(g)), *nearness(g)), reverse=True)
    if not found or (len(found) > 1 and nearness(found[0]) == nearness(found[1])):
        return None
    return found[0]


def budget(group: Group) -> dict[str, Any]:
    """What a group had to learn from; values of all its runs are the same, since runs of a group share their settings."""
    first = runs_of(group)[0]
    return dict(zip(_BUDGET, (first.steps, first.demos, first.config.get("batch_size")), strict=True))


def policy_table(tasks: Sequence[TaskGroups]) -> list[dict[str, Any]]:
    """One row per task and group; rates in [0, 1]. ``success`` is None for a group without an evaluated run."""
    rows = []
    for task in tasks:
        for group in task.groups:
            values = group.values("success")
            episodes = [episode for run in runs_of(group) for episode in run.episodes]
            solved = sum(bool(episode["success"]) for episode in episodes)
            base = baseline_of(group, task.groups)
            gained = None if base is None else difference(group, base, "success")
            steps = [episode["steps"] for episode in episodes if episode["success"]]
            rows.append(
                {
                    "task": task.task,
                    "label": group.label,
                    "encoder": group.method,
                    "model": group.model_name,
                    "runs": [run.name for run in group.runs],
                    "seeds": [run.seed for run in group.runs],
                    "n": len(values),
                    "success": asdict(summarize(values)) if values else None,
                    "per_run": values,
                    "solved": solved,
                    "episodes": len(episodes),
                    "wilson": list(wilson_interval(solved, len(episodes))) if episodes else None,
                    "mean_steps": math.fsum(steps) / len(steps) if steps else None,
                    "to_scratch": None if gained is None else asdict(gained),
                    "scratch": None if base is None else base.label,
                    "equal_budget": None if base is None else budget(base) == budget(group),
                }
            )
    return rows


def averages(tasks: Sequence[TaskGroups]) -> list[dict[str, Any]]:
    """Mean over the tasks that every encoder has, one row per encoder; empty for one task, or if there are no such tasks.

    A seed counts if it has a rate in each of these tasks: the mean over tasks is taken first, then mean and interval over seeds.
    """
    labels = list(dict.fromkeys(group.label for task in tasks for group in task.groups if group.values("success")))
    shared = [
        {group.label: group for group in task.groups}
        for task in tasks
        if {group.label for group in task.groups if group.values("success")} >= set(labels)
    ]
    if len(tasks) < 2 or len(shared) < 2:
        return []
    seeds: dict[str, dict[int, float]] = {}
    for label in labels:
        rates = [task[label].by_seed("success") for task in shared]
        common = set.intersection(*(set(found) for found in rates))
        seeds[label] = {seed: math.fsum(found[seed] for found in rates) / len(rates) for seed in sorted(common)}
    scratch = [label for label in labels if all(task[label].is_scratch for task in shared) and seeds[label]]
    rows = []
    for label in labels:
        if not seeds[label]:
            continue
        gained = None
        if len(scratch) == 1 and label != scratch[0]:
            paired = sorted(set(seeds[label]) & set(seeds[scratch[0]]))
            if paired:
                told = summarize(seeds[label][seed] - seeds[scratch[0]][seed] for seed in paired)
                gained = asdict(Difference(told.mean, told.half_width, told.n, paired=True))
        rows.append(
            {
                "label": label,
                "tasks": len(shared),
                "n": len(seeds[label]),
                "success": asdict(summarize(seeds[label].values())),
                "to_scratch": gained,
                "scratch": scratch[0] if gained else None,
                "equal_budget": all(budget(task[label]) == budget(task[scratch[0]]) for task in shared)
                if gained
                else None,
            }
        )
    return rows


def encoder_rows(tasks: Sequence[TaskGroups]) -> list[dict[str, Any]]:
    """Once per encoder: what it is, where it came from, what became of its BatchNorm, how it was trained."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for task in tasks:
        for group in task.groups:
            first = runs_of(group)[0]
            row = {
                "label": group.label,
                "architecture": group.model_name,
                "source": ", ".join(dict.fromkeys(run.source for run in runs_of(group))),
                "norm": first.norm,
                "training": str(first.config.get("encoder", "")),
            }
            rows.setdefault(tuple(row.values()), row)
    return list(rows.values())


def cost_rows(tasks: Sequence[TaskGroups]) -> list[dict[str, Any]]:
    """Counted cost of a decision, once per kind of policy."""
    rows: dict[str, dict[str, Any]] = {}
    for run in (run for task in tasks for group in task.groups for run in runs_of(group)):
        if run.cost is not None:
            name = run.model_name
            row = rows.setdefault(repr((name, run.cost)), {"model": name, "encoders": [], **run.cost})
            if run.method not in row["encoders"]:
                row["encoders"].append(run.method)
    return list(rows.values())


def latency_rows(tasks: Sequence[TaskGroups]) -> list[dict[str, Any]]:
    """Measured latency of a decision: per group and way of running, the median over its runs."""
    rows = []
    for task in tasks:
        for group in task.groups:
            timed = [run for run in runs_of(group) if run.latency]
            for how in dict.fromkeys(run.latency["how"] for run in timed):
                mine = [run.latency for run in timed if run.latency["how"] == how]
                row = {key: median(found[key] for found in mine) for key in ("p50", "p95", "encode", "denoise")}
                facts = {key: mine[0][key] for key in ("steps", "batch", "runs")}
                rows.append({"task": task.task, "label": group.label, "how": how, "n": len(mine), **row, **facts})
    return rows
