"""Training of policies of several tasks: every term of the loss by step, and the share of FLOPs against what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xdfast.reporting.groups import Group, finite
from xdfast.reporting.svg import INK, Picture, drawing, new_figure, style
from xdfast.reporting.vla_tables import role, vlas_of

__all__ = ["curves", "looks", "terms"]

#: Term → what it is called, in this order; others follow by their own names.
TERMS = {
    "loss": "loss, weighted sum",
    "policy": "policy: the student's own actions",
    "semantic": "semantic",
    "cosine": "semantic: 1 − cosine to the teacher",
    "relation": "semantic: relations between samples",
    "action": "action",
    "to_target": "action heads to the demonstrations",
    "to_teacher": "action heads to the teacher's",
    "to_previous": "action heads to the layer before",
    "budget": "budget",
    "fraction": "share of the stack's FLOPs, %",
}
#: Rows of metrics.jsonl that are no terms.
_OTHER = {"kind", "epoch", "step", "lr", "images_per_s", "time", "seconds"}
#: Values of one mean over neighbouring rows: noise of single batches hides the course.
_POINTS = 60


def terms(groups: Sequence[Group]) -> list[str]:
    """Every term that a run logged while it trained, the known ones first."""
    found = dict.fromkeys(
        _plain(key)
        for group in groups
        for run in group.runs
        for row in run.history
        if row.get("kind") == "train"
        for key, value in row.items()
        if key not in _OTHER and finite(value) is not None
    )
    return [t for t in TERMS if t in found] + [t for t in found if t not in TERMS]


def looks(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Label → colour and line; dense policies are grey."""
    numbers = {
        dense: [g.label for g in groups if (role(g) in ("teacher", "dense")) == dense] for dense in (True, False)
    }
    found = {}
    for group in groups:
        dense = role(group) in ("teacher", "dense")
        found[group.label] = style(numbers[dense].index(group.label), dense)
    lines = ("-", "--", "-.", ":")
    for number, label in enumerate(numbers[False]):
        found[label]["linestyle"] = lines[number % 4]
    return found


def curves(groups: Sequence[Group]) -> Picture | None:
    """A panel per term, a line per group. None without a history."""
    shown = [term for term in terms(groups) if any(len(_by_step(group, term)) > 1 for group in groups)]
    if not shown:
        return None
    columns = min(3, len(shown)) if len(shown) != 4 else 2
    rows = -(-len(shown) // columns)
    figure, axes = new_figure(3.5 * columns + (1 if columns == 1 else 0), 2.5 * rows + 0.5, columns, rows)
    look = looks(groups)
    handles: dict[str, Any] = {}
    for place, ax in enumerate(axes):
        if place >= len(shown):
            ax.set_visible(False)
            continue
        term = shown[place]
        lowest = np.inf
        for group in groups:
            points = _by_step(group, term)
            if not points:
                continue
            own, steps = look[group.label], sorted(points)
            scale = 100 if term == "fraction" else 1
            means = scale * np.array([float(np.mean(points[s])) for s in steps])
            at, smooth = _smoothed(np.array(steps), means)
            lowest = min(lowest, float(smooth.min()))
            (line,) = ax.plot(at, smooth, color=own["color"], linestyle=own["linestyle"], linewidth=1.6)
            handles.setdefault(group.label, line)
            if max(map(len, points.values())) > 1:
                low, high = ([scale * end(points[s]) for s in steps] for end in (min, max))
                ax.fill_between(at, _smoothed(np.array(steps), np.array(low))[1], _smoothed(np.array(steps), np.array(high))[1],
                                color=own["color"], alpha=0.18, lw=0)  # fmt: skip
            if term == "fraction" and (asked := vlas_of(group)[0].target_flops) is not None:
                ax.axhline(100 * asked, color=own["color"], linestyle=(0, (1, 2)), linewidth=1)
        ax.set_title(TERMS.get(term, term.replace("_", " ")), fontsize=9.5, loc="left", color=INK)
        if term == "fraction":
            ax.set_ylim(0, 103)
        elif lowest > 0 and term != "budget":
            _log(ax)
        else:
            ax.set_ylim(bottom=min(0.0, lowest))
        if place >= len(shown) - columns:
            ax.set_xlabel("step")
    if len(handles) > 1:
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=min(4, len(handles)), frameon=False,
            fontsize=9, labelcolor=INK,
        )  # fmt: skip
    several = any(len(group.runs) > 1 for group in groups)
    caption = "Means of neighbouring steps" + (
        " and over seeds; bands: from the lowest to the highest run." if several else "."
    )
    if "loss" in shown and len({role(group) for group in groups if _by_step(group, "loss")}) > 1:
        caption += (
            " The weighted sum has other terms for a student than for its teacher: their heights are not comparable."
        )
    if "fraction" in shown:
        caption += " Dotted: the share that was asked for."
    names = ", ".join(group.label for group in groups if any(_by_step(group, term) for term in shown))
    return drawing(
        figure,
        "Loss and computation by step",
        f"Lines by step for {names}: {', '.join(TERMS.get(t, t) for t in shown)}.",
        caption,
    )


def _plain(key: str) -> str:
    return key.removeprefix("loss_")


def _by_step(group: Group, term: str) -> dict[int, list[float]]:
    """Step → the value of each run."""
    found: dict[int, list[float]] = {}
    for run in group.runs:
        for row in run.history:
            value = finite(row.get(f"loss_{term}", row.get(term)))
            if row.get("kind") == "train" and value is not None and isinstance(row.get("step"), int):
                found.setdefault(row["step"], []).append(value)
    return found


def _smoothed(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of equal stretches, at most :data:`_POINTS` of them."""
    if len(steps) <= _POINTS:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), _POINTS)
    return np.array([steps[p].mean() for p in parts]), np.array([values[p].mean() for p in parts])


def _log(ax: Any) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
