"""Policies of several tasks side by side: success by task, differences to the teacher, FLOPs, speed, the layers that ran."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

from xdfast.reporting.groups import Group, finite, group_runs
from xdfast.reporting.intervals import newcombe_interval, paired_interval, wilson_interval
from xdfast.reporting.policy_tables import TaskGroups
from xdfast.reporting.records import VLARecord
from xdfast.reporting.tables import summarize

__all__ = [
    "EQUAL",
    "column_rows",
    "comparisons",
    "fraction_of",
    "groups_of",
    "path_table",
    "role",
    "success_table",
    "task_groups",
    "task_names",
    "vlas_of",
]

#: Fractions of FLOPs that differ by no more are called equal.
EQUAL = 0.05
#: Most paths in a table.
_MOST_PATHS = 8
_ORDER = ("teacher", "dense", "learned", "static", "random")


def vlas_of(group: Group) -> list[VLARecord]:
    """Its runs, of which each is a :class:`VLARecord`."""
    return cast(list[VLARecord], group.runs)


def role(group: Group) -> str:
    """ "teacher", "dense", "learned", "static" or "random"."""
    first = vlas_of(group)[0]
    return "teacher" if first.is_teacher else first.routing


def groups_of(records: Sequence[VLARecord]) -> tuple[list[Group], list[str]]:
    """(groups: teachers first, then students from many FLOPs to few, then baselines; notes on runs left out).

    Raises:
        ValueError: no records.
    """
    groups, notes = group_runs(records)

    def place(group: Group) -> tuple[int, float]:
        return _ORDER.index(role(group)), -(vlas_of(group)[0].target_flops or 1.0)

    return sorted(groups, key=place), notes


def task_names(groups: Sequence[Group]) -> list[str]:
    """Every task in which a run was evaluated, in order of appearance."""
    return list(dict.fromkeys(task.task for group in groups for run in vlas_of(group) for task in run.tasks))


def task_groups(groups: Sequence[Group]) -> list[TaskGroups]:
    """The same by task, as videos and settings of policies are sorted."""
    found = []
    for name in task_names(groups):
        parts = []
        for group in groups:
            mine: list[Any] = [task for run in vlas_of(group) for task in run.tasks if task.task == name]
            if mine:
                parts.append(Group(group.label, group.method, group.model_name, mine))
        found.append(TaskGroups(name, parts))
    return found


def fraction_of(runs: Sequence[VLARecord], kind: str = "executed") -> float | None:
    """FLOPs of the stack over those of the dense one, over all decisions of all runs; 1 for dense ones, None if not known."""
    if all(run.routing == "dense" for run in runs):
        return 1.0
    told = [paths for run in runs for paths in run.paths.values()]
    if any(run.routing != "dense" and not run.paths for run in runs) or not sum(p["decisions"] for p in told):
        return None
    return sum(p[kind] * p["decisions"] for p in told) / sum(p["dense"] * p["decisions"] for p in told)


def column_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What each column of the tables is."""
    return [
        {
            "label": group.label,
            "role": role(group),
            "runs": [run.name for run in group.runs],
            "seeds": [run.seed for run in group.runs],
            "target_flops": vlas_of(group)[0].target_flops,
            "fraction": fraction_of(vlas_of(group)),
            "fraction_nominal": fraction_of(vlas_of(group), "nominal"),
            "per_run": [{"run": run.name, "fraction": fraction_of([run]), **_total(run)} for run in vlas_of(group)],
        }
        for group in groups
    ]


def success_table(groups: Sequence[Group]) -> dict[str, Any]:
    """``rows`` (a task, its ``cells``, one per group) and ``total`` (cells over the tasks that all groups have, how many ``tasks``
    and their ``names``).

    A cell: solved, episodes, rate, wilson, per_run (rates); None where a group was not evaluated.
    """
    names = task_names(groups)
    rows = [{"task": name, "cells": [_cell(group, [name]) for group in groups]} for name in names]
    shared = _shared(groups)
    total = {"tasks": len(shared), "names": shared, "cells": [_cell(group, shared) for group in groups]}
    return {"rows": rows, "total": total}


def comparisons(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Every group against the teacher, and every learned student against each baseline.

    Each row: ``label``, ``base``, ``kind`` ("teacher" or "baseline"), ``points`` (difference of the rates over shared tasks),
    ``low``, ``high`` (95 %), ``how`` ("paired" or "independent"), ``pairs`` (both, only_first, only_second, neither) or None,
    ``seeds`` (mean difference of runs paired by training seed, with its t interval; None below two pairs), ``equal_flops``.
    """
    found = []
    teachers = [group for group in groups if role(group) == "teacher"]
    for base in teachers:
        found += [_compared(group, base, "teacher") for group in groups if role(group) != "teacher"]
    for group in groups:
        if role(group) == "learned":
            found += [_compared(group, base, "baseline") for base in groups if role(base) in ("static", "random")]
    return [row for row in found if row is not None]


def path_table(runs: Sequence[VLARecord]) -> dict[str, Any]:
    """Which paths the decisions of these runs took.

    ``rows`` of ``path`` (a letter per layer: "1", "0", "a" attention alone, "m" MLP alone), ``active`` layers, ``halved`` (a
    layer ran in part), ``share`` of all decisions, ``by_task`` (share of each task's); ``tasks``; ``decisions``; how many were
    ``distinct`` at most in one task; the share ``covered`` by the rows.
    """
    counts: dict[str, Counter[str]] = {}
    decisions: Counter[str] = Counter()
    for run in runs:
        for task, told in run.paths.items():
            decisions[task] += told["decisions"]
            counts.setdefault(task, Counter()).update({path: count for path, count in told["paths"]})
    every = sum(counts.values(), Counter[str]())
    total = sum(decisions.values())
    rows = [
        {
            "path": path,
            "active": sum({"1": 1.0, "0": 0.0}.get(letter, 0.5) for letter in path),
            "halved": not set(path) <= {"0", "1"},
            "share": count / total,
            "by_task": {task: counts[task][path] / decisions[task] for task in counts if decisions[task]},
        }
        for path, count in every.most_common(_MOST_PATHS)
    ]
    distinct = max((told["distinct"] for run in runs for told in run.paths.values()), default=0)
    return {
        "rows": rows,
        "tasks": list(counts),
        "decisions": total,
        "distinct": distinct,
        "covered": sum(row["share"] for row in rows),
    }


# --- inner workings


def _shared(groups: Sequence[Group]) -> list[str]:
    """Tasks in which every run of every evaluated group acted."""
    evaluated = [run for group in groups for run in vlas_of(group) if run.tasks]
    return [name for name in task_names(groups) if all(any(t.task == name for t in run.tasks) for run in evaluated)]


def _episodes(run: VLARecord, names: Sequence[str]) -> dict[tuple[str, int], bool]:
    return {(t.task, e["seed"]): bool(e["success"]) for t in run.tasks if t.task in names for e in t.episodes}


def _rate(run: VLARecord, names: Sequence[str]) -> float | None:
    """Mean over tasks of the rates."""
    rates = [finite(t.metrics.get("success")) for t in run.tasks if t.task in names]
    known = [rate for rate in rates if rate is not None]
    return math.fsum(known) / len(known) if known else None


def _cell(group: Group, names: Sequence[str]) -> dict[str, Any] | None:
    runs = [run for run in vlas_of(group) if _episodes(run, names)]
    outcomes = [solved for run in runs for solved in _episodes(run, names).values()]
    if not outcomes:
        return None
    rates = [rate for run in runs if (rate := _rate(run, names)) is not None]
    steps = [e["steps"] for run in runs for t in run.tasks if t.task in names for e in t.episodes if e["success"]]
    return {
        "solved": sum(outcomes),
        "episodes": len(outcomes),
        "rate": math.fsum(rates) / len(rates),
        "wilson": list(wilson_interval(sum(outcomes), len(outcomes))),
        "per_run": rates,
        "over_runs": asdict(summarize(rates)),
        "mean_steps": math.fsum(steps) / len(steps) if steps else None,
    }


def _total(run: VLARecord) -> dict[str, Any]:
    outcomes = [bool(e["success"]) for t in run.tasks for e in t.episodes]
    return {"solved": sum(outcomes), "episodes": len(outcomes), "rate": _rate(run, [t.task for t in run.tasks])}


def _compared(group: Group, base: Group, kind: str) -> dict[str, Any] | None:
    names = _shared([group, base])
    mine, theirs = ([_episodes(run, names) for run in vlas_of(g) if run.tasks] for g in (group, base))
    flat, other = ([x for run in runs for x in run.values()] for runs in (mine, theirs))
    if not flat or not other:
        return None
    pairs = None
    if len(mine) == len(theirs) == 1 and mine[0].keys() == theirs[0].keys():
        told = Counter((mine[0][key], theirs[0][key]) for key in mine[0])
        pairs = [told[True, True], told[True, False], told[False, True], told[False, False]]
        low, high = paired_interval(*pairs)
    else:
        low, high = newcombe_interval(sum(flat), len(flat), sum(other), len(other))
    rates = [{run.seed: _rate(run, names) for run in vlas_of(g) if run.tasks} for g in (group, base)]
    seeds = sorted(seed for seed in rates[0].keys() & rates[1].keys() if seed is not None)
    gained = [cast(float, rates[0][seed]) - cast(float, rates[1][seed]) for seed in seeds]
    fractions = [fraction_of(vlas_of(g)) for g in (group, base)]
    return {
        "label": group.label,
        "base": base.label,
        "kind": kind,
        "role": role(group),
        "base_role": role(base),
        "tasks": len(names),
        "solved": sum(flat),
        "episodes": len(flat),
        "base_solved": sum(other),
        "base_episodes": len(other),
        "points": sum(flat) / len(flat) - sum(other) / len(other),
        "low": low,
        "high": high,
        "how": "independent" if pairs is None else "paired",
        "pairs": None
        if pairs is None
        else dict(zip(("both", "only_first", "only_second", "neither"), pairs, strict=True)),
        "seeds": asdict(summarize(gained)) if len(gained) > 1 else None,
        "runs": [len(mine), len(theirs)],
        "fractions": fractions,
        "equal_flops": None
        if None in fractions
        else abs(cast(float, fractions[0]) - cast(float, fractions[1])) <= EQUAL,
    }
