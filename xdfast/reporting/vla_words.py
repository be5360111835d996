"""What a report says about students that skip layers: what the evidence shows, what it does not, what to beware of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xdfast.reporting.groups import Group
from xdfast.reporting.policy_words import short
from xdfast.reporting.vla_tables import EQUAL, fraction_of, task_names, vlas_of

__all__ = ["findings", "points", "remarks", "speed_words", "unsteady"]

#: More students are told by the tables alone.
_MOST = 4


def findings(
    columns: Sequence[dict[str, Any]],
    total: dict[str, Any],
    compared: Sequence[dict[str, Any]],
    cost: Sequence[dict[str, Any]],
) -> list[str]:
    """The result first; then how sure it is, the baselines, the measured speed."""
    told = []
    cells = {column["label"]: cell for column, cell in zip(columns, total["cells"], strict=True) if cell}
    shown = [column for column in columns if column["label"] in cells]
    students = [column for column in shown if column["role"] == "learned"][:_MOST]
    students = students or [column for column in shown if column["role"] in ("static", "random")][:_MOST]
    rivals = _rivals([row for row in compared if row["kind"] == "baseline"])
    teacher = next((column for column in shown if column["role"] == "teacher"), None)
    for column in students:
        text = f"{_named(column, columns)} solves {_of(cells[column['label']])} episodes{_seeds(column)}{_with(column['fraction'])}"
        if teacher is not None:
            text += f"; the teacher {_of(cells[teacher['label']])}"
        told.append(f"{text}.")
        mine = [row for row in compared if row["label"] == column["label"]]
        told += [_against(row) for row in mine if teacher is not None and row["base"] == teacher["label"]]
        told += [_baseline(row, _named(column, columns)) for row in mine if row in rivals]
    if not students:
        told += [
            f"{_named(c, columns)} solves {_of(cells[c['label']])} episodes{_interval(cells[c['label']])}."
            for c in shown[:_MOST]
        ]
    first = next((row for row in cost if students and row["label"] == students[0]["label"]), None)
    speed = speed_words(first, _lower(_named(students[0], columns))) if first else None
    return [*told, speed] if speed else told


def _rivals(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each baseline the comparison with the student whose FLOPs are nearest to its own."""

    def distance(row: dict[str, Any]) -> float:
        mine, theirs = row["fractions"]
        return 2.0 if mine is None or theirs is None else abs(mine - theirs)

    return [
        min((row for row in rows if row["base"] == base), key=distance)
        for base in dict.fromkeys(row["base"] for row in rows)
    ]


def speed_words(row: dict[str, Any], name: str) -> str | None:
    """The measured speedups of one row of the cost table; None if nothing was timed."""
    sure: list[dict[str, Any]] = []
    unsure: list[dict[str, Any]] = []
    for m in row["measured"]:
        if m["stack_speedup"]:
            wide = any(
                told.get("speedup_high", 1) > 2 * told.get("speedup_low", 1)
                for told in (m["stack"], m["decision"])
                if told
            )
            (unsure if wide else sure).append(m)
    # An interval that wide says that the machine was busy, not how fast the student is; the table still has it.
    late = (
        f" The speedup at batch {' and '.join(str(m['batch']) for m in unsure)} was too uncertain to state."
        if unsure
        else ""
    )
    if not sure:
        return late.strip() or None
    parts = [
        f"{m['stack_speedup']:.2f}× at batch {m['batch']}"
        + (f" (the whole decision {m['decision_speedup']:.2f}×)" if m["decision_speedup"] else "")
        for m in sure
    ]
    machine = f" on {row['machine'].partition(';')[0]}" if row.get("machine") else ""
    return f"Measured{machine}: the layers of {name} run at {' and '.join(parts)} the speed of the teacher's.{late}"


def points(value: float, digits: int = 0) -> str:
    """``+3`` or ``−10``: percentage points of a difference of rates."""
    text = f"{100 * value:+.{digits}f}".replace("-", "−")
    return text.replace("+0", "0").replace("−0", "0") if float(f"{100 * value:.{digits}f}") == 0 else text


def remarks(groups: Sequence[Group], total: dict[str, Any]) -> list[str]:
    """Where figures are not comparable, budgets that were missed, and what the runs themselves have to say."""
    told: list[str] = []
    names = task_names(groups)
    left = [short(name) for name in names if name not in total["names"]]
    if left and total["names"]:
        told.append(
            f"Totals and differences are of the tasks that all were evaluated in; {', '.join(left)} is not among them."
        )
    elif left:
        told.append("No task was evaluated by all, so there is no total.")
    differing: dict[str, list[str]] = {}
    for name in names:
        for text in _unequal(groups, name):
            differing.setdefault(text, []).append(short(name))
    for text, where in differing.items():
        told.append(f"{'Every task' if len(where) == len(names) > 1 else ', '.join(where)}: {text}")
    said: dict[str, list[str]] = {}
    for group in groups:
        for run in vlas_of(group):
            for text in run.remarks:
                said.setdefault(text, []).append(run.name)
        told += _budget(group)
    told += [f"{', '.join(runs)}: {text}" for text, runs in said.items()]
    evaluated = [group for group in groups if any(run.tasks for run in vlas_of(group))]
    if len(evaluated) > 1 and all(len(group.runs) == 1 for group in evaluated):
        told.append(
            "Each column is one training run: the intervals are over episodes only, and another training seed may do better "
            "or worse than they say."
        )
    elif any(len(group.runs) > 1 for group in evaluated):
        told.append(
            "Episodes of several training runs are pooled. Runs that are tried in the same worlds are not independent, so the "
            "intervals over episodes are a little too narrow; those over training seeds stand beside them."
        )
    return told


def unsteady(cost: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the machine was quiet enough for latencies to mean something."""
    busy = [
        f"{row['label']} at batch {m['batch']}"
        for row in cost
        for m in row["measured"]
        if any(t["p95"] > 2 * t["p50"] for part in ("stack", "decision") if m.get(part) for t in _times(m[part]))
    ]
    if not busy:
        return []
    return [
        f"The machine was not quiet during the measurement ({', '.join(busy)}: p95 above twice the median): latencies are too "
        "high, and speedups as uncertain as their intervals."
    ]


def _times(part: dict[str, Any]) -> list[dict[str, float]]:
    return [part["dense"], part["routed"]]


def _unequal(groups: Sequence[Group], name: str) -> list[str]:
    """How the evaluations in a task differ."""
    mine = [(run.name, task) for group in groups for run in vlas_of(group) for task in run.tasks if task.task == name]
    told = []
    if len({tuple(sorted(e["seed"] for e in task.episodes)) for _, task in mine}) > 1:
        listed = ", ".join(f"{run} {len(task.episodes)}" for run, task in mine)
        told.append(f"the runs were not evaluated in the same episodes ({listed}); compare with care.")
    limits = {task.evaluated.get("max_steps") for _, task in mine}
    if len(limits) > 1:
        listed = ", ".join("the task's" if x is None else str(x) for x in sorted(limits, key=str))
        told.append(f"episodes ended after different numbers of steps ({listed}).")
    return told


def _budget(group: Group) -> list[str]:
    runs = vlas_of(group)
    asked, done = runs[0].target_flops, fraction_of(runs)
    if runs[0].routing == "dense" or asked is None:
        return []
    if done is None:
        evaluated = [run.name for run in runs if run.tasks]
        why = "the evaluation does not tell which layers ran" if evaluated else "it was not evaluated"
        return [f"{group.label}: its share of FLOPs is not known, because {why}."]
    if abs(done - asked) > EQUAL:
        return [
            f"{group.label}: {100 * asked:.0f} % of the FLOPs were asked for, {100 * done:.0f} % were executed in the episodes."
        ]
    return []


def _named(column: dict[str, Any], columns: Sequence[dict[str, Any]]) -> str:
    """A column as the subject of a sentence: "The student" where there is one, "The 50 % student" where there are more."""
    label = column["label"]
    if column["role"] in ("teacher", "learned"):
        word = "teacher" if column["role"] == "teacher" else "student"
        if sum(other["role"] == column["role"] for other in columns) == 1:
            return f"The {word}"
        asked = label.removeprefix("student, ")
        if asked.removesuffix(" %").replace(".", "").isdigit():
            return f"The {asked} student"
    return label[:1].upper() + label[1:]


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _of(cell: dict[str, Any]) -> str:
    return f"{cell['solved']} of {cell['episodes']}"


def _with(fraction: float | None) -> str:
    return "" if fraction is None else f" with {100 * fraction:.0f} % of the transformer's FLOPs"


def _seeds(column: dict[str, Any]) -> str:
    runs = len(column["runs"])
    return f" ({runs} training runs)" if runs > 1 else ""


def _interval(cell: dict[str, Any]) -> str:
    low, high = cell["wilson"]
    return f" (95 % interval {100 * low:.0f} to {100 * high:.0f} %)"


def _against(row: dict[str, Any]) -> str:
    """What the evidence shows of the difference to the teacher, and what it does not."""
    low, high = row["low"], row["high"]
    text = f"That is {_amount(row['points'], 'the teacher')} (95 % interval {points(low)} to {points(high)} points"
    if row["pairs"]:
        pairs = row["pairs"]
        text += (
            f"; in the same {row['episodes']} episodes both solve {pairs['both']}, the student alone {pairs['only_first']}, "
            f"the teacher alone {pairs['only_second']}"
        )
    text += "): "
    if low > 0:
        text += "more than chance over episodes explains."
    elif high < 0:
        text += "a loss that chance over episodes does not explain."
    else:
        lost, won = max(-100 * low, 0.0), max(100 * high, 0.0)
        text += (
            f"no difference is shown. A loss of more than {lost:.0f} points and a gain of more than {won:.0f} are unlikely; "
            "anything between is possible."
        )
    return f"{text} This is over episodes{_over_seeds(row)}." if row["seeds"] else text


def _over_seeds(row: dict[str, Any]) -> str:
    told = row["seeds"]
    if not told:
        return ""
    return f"; over {told['n']} training seeds, paired, {points(told['mean'], 1)} ± {100 * told['half_width']:.1f}"


def _amount(value: float, base: str) -> str:
    amount = abs(100 * value)
    if amount < 0.05:
        return f"equal to {base}"
    number = f"{amount:.0f}" if abs(amount - round(amount)) < 0.05 else f"{amount:.1f}"
    return f"{number} point{'' if number == '1' else 's'} {'above' if value > 0 else 'below'} {base}"


def _baseline(row: dict[str, Any], student: str) -> str:
    what = {"static": "Leaving out the same layers always", "random": "Skipping layers at random"}[row["base_role"]]
    low, high = row["low"], row["high"]
    sure = f"95 % interval {points(low)} to {points(high)}"
    verdict = "the student is better" if low > 0 else "the baseline is better" if high < 0 else "no difference is shown"
    share = row["fractions"][1]
    flops = "" if share is None else f" with {100 * share:.0f} % of the FLOPs"
    unequal = "" if row["equal_flops"] else ", not at equal FLOPs" if row["equal_flops"] is False else ""
    return (
        f"{what} ({row['base']}) solves {row['base_solved']} of {row['base_episodes']}{flops}: {_lower(student)} is "
        f"{_amount(row['points'], 'it')} ({sure}{unequal}{_over_seeds(row)}), {verdict}."
    )
