"""What a report says about policies in sentences: what was found, and what to beware of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xdfast.reporting.policy_tables import TaskGroups, budget, runs_of
from xdfast.settings import FREE_SETTINGS

__all__ = ["differing_settings", "findings", "remarks"]

#: A page with more tasks says only the averages in its summary.
_MOST_TASKS = 3
#: Of no interest to a comparison.
_UNTOLD = FREE_SETTINGS | {"seed", "task", "envs"}


def findings(rows: Sequence[dict[str, Any]], means: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences with what was measured: the best encoder of each task, and each encoder against scratch."""
    told = []
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if means:
        best = max(means, key=lambda row: row["success"]["mean"])
        told.append(
            f"Over {best['tasks']} tasks {best['label']} has the highest mean success: {_rate(best['success'])} "
            f"({_seeds(best['n'])})."
        )
        told += [_against(row, f"Over {row['tasks']} tasks") for row in means if row["to_scratch"]]
    for task in [] if means or len(tasks) > _MOST_TASKS else tasks:
        mine = [row for row in rows if row["task"] == task and row["success"]]
        if not mine:
            continue
        best = max(mine, key=lambda row: row["success"]["mean"])
        leads = " is the best of them:" if len(mine) > 1 else ":"
        low_high = (
            f", {best['solved']} of {best['episodes']} episodes solved, 95 % interval "
            f"{100 * best['wilson'][0]:.0f} to {100 * best['wilson'][1]:.0f} %"
            if best["wilson"]
            else ""
        )
        told.append(
            f"{short(task)}, {best['label']}{leads} {_rate(best['success'])} success ({_seeds(best['n'])}{low_high})."
        )
        told += [_against(row, short(task)) for row in mine if row["to_scratch"]]
    return told


def remarks(tasks: Sequence[TaskGroups]) -> list[str]:
    """Where figures are not comparable, and what the runs themselves have to say."""
    told: list[str] = []
    for task in tasks:
        for key in budget(task.groups[0]):
            values = {group.label: budget(group)[key] for group in task.groups}
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{label} {'unknown' if v is None else v}" for label, v in values.items())
                what = {"steps": "training steps", "demos": "demonstrations", "batch size": "batch sizes"}[key]
                told.append(f"{short(task.task)}: not an equal budget, the {what} differ ({listed}).")
        runs = [run for group in task.groups for run in runs_of(group) if run.episodes]
        if len({tuple(sorted(e["seed"] for e in run.episodes)) for run in runs}) > 1:
            listed = ", ".join(f"{run.name} {len(run.episodes)}" for run in runs)
            told.append(
                f"{short(task.task)}: the runs were not evaluated in the same episodes ({listed}); compare with care."
            )
        limits = {run.evaluated.get("max_steps") for run in runs}
        if len(limits) > 1:
            listed = ", ".join("the task's" if x is None else str(x) for x in sorted(limits, key=str))
            told.append(f"{short(task.task)}: episodes ended after different numbers of steps ({listed}).")
        picked = [run.name for run in runs if run.evaluated.get("which") == "best"]
        if picked:
            told.append(
                f"{short(task.task)}: {', '.join(picked)} was evaluated with the policy that did best in evaluations during "
                "training; its rate is too good by that choice if the episodes are the same."
            )
    said: dict[str, list[str]] = {}
    for run in (run for task in tasks for group in task.groups for run in runs_of(group)):
        for text in run.remarks:
            said.setdefault(text, []).append(run.name)
    told += [f"{_listed(names)}: {text}" for text, names in said.items()]
    groups = [group for task in tasks for group in task.groups]
    if groups and all(len(group.runs) == 1 for group in groups):
        told.append(
            "Each encoder has one training run per task: the interval is over episodes only, and a difference may be "
            "chance. Train with other seeds for intervals over training."
        )
    return told


def differing_settings(tasks: Sequence[TaskGroups]) -> dict[str, Any]:
    """``columns`` and ``rows`` (setting → one value per column) of the settings in which groups differ.

    Columns are encoders; tasks and encoders where an encoder has other settings in another task.
    """
    groups = [(task.task, group) for task in tasks for group in task.groups]
    keys = dict.fromkeys(key for _, group in groups for run in group.runs for key in run.config if key not in _UNTOLD)
    of_group = [
        (task, group.label, {key: _values(group.runs, key) for key in keys})
        for task, group in groups
    ]  # fmt: skip
    first = {label: settings for _, label, settings in reversed(of_group)}
    columns = dict(first)
    if any(settings != first[label] for _, label, settings in of_group):
        columns = {f"{short(task)} · {label}": settings for task, label, settings in of_group}
    rows = {key: [settings[key] for settings in columns.values()] for key in keys}
    names = list(dict.fromkeys(label for _, label, _ in of_group)) if columns == first else list(columns)
    ordered = {key: [columns[name][key] for name in names] for key, values in rows.items() if len(set(values)) > 1}
    return {"columns": names, "rows": ordered}


def _values(runs: Sequence[Any], key: str) -> str:
    return ", ".join(dict.fromkeys(_shown(run.config.get(key)) for run in runs))


def short(task: str) -> str:
    """``metaworld/drawer-open-v3`` → ``drawer-open-v3``."""
    return task.rpartition("/")[2] or task or "unnamed task"


def _listed(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _seeds(n: int) -> str:
    return "1 training run" if n == 1 else f"{n} training seeds"


def _rate(told: dict[str, Any]) -> str:
    half = told["half_width"]
    return f"{100 * told['mean']:.1f} %" + ("" if half is None else f" ± {100 * half:.1f}")


def _against(row: dict[str, Any], where: str) -> str:
    """The difference to scratch, whichever way it falls."""
    gained = row["to_scratch"]
    points, half = 100 * gained["mean"], gained["half_width"]
    pairs = f"{gained['n']} seeds, paired" if gained["paired"] else f"{gained['n']} seeds each, not paired"
    if half is None:
        sure = "one training run each, so this may be chance"
    elif abs(gained["mean"]) <= half:
        sure = f"95 % interval ± {100 * half:.1f}, {pairs}, includes zero: no difference is shown"
    else:
        sure = f"95 % interval ± {100 * half:.1f}, {pairs}"
    amount = f"{abs(points):.1f} points {'above' if points > 0 else 'below'}" if abs(points) >= 0.05 else "equal to"
    unequal = "; not an equal budget" if row.get("equal_budget") is False else ""
    return f"{where}: {row['label']} is {amount} {row['scratch']} ({sure}{unequal})."
