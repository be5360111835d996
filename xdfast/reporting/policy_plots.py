"""Pictures of policies: success by task and encoder, training curves, stages of a task in feature space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xdfast.reporting.groups import Group, finite
from xdfast.reporting.policy_tables import TaskGroups
from xdfast.reporting.policy_words import short
from xdfast.reporting.svg import INK, Picture, drawing, legend, new_figure, style

__all__ = ["policy_curves", "stages", "styles", "success"]

#: Never the colour alone: each stage has its own mark.
_STAGE_LOOK = (("#4477aa", "o"), ("#d9622b", "^"), ("#228833", "s"), ("#aa3377", "X"))


def styles(tasks: Sequence[TaskGroups]) -> dict[str, dict[str, Any]]:
    """Label → colour, marker and line, the same for all tasks; what was trained from scratch is grey."""
    found = {group.label: group.is_scratch for task in tasks for group in task.groups}
    numbers = {
        scratch: [label for label, is_scratch in found.items() if is_scratch == scratch] for scratch in (False, True)
    }
    return {label: style(numbers[scratch].index(label), scratch) for label, scratch in found.items()}


def success(tasks: Sequence[TaskGroups], rows: Sequence[dict[str, Any]]) -> Picture | None:
    """A dot with its interval per task and encoder, each training run as a small mark. None if nothing was evaluated."""
    shown = [row for row in rows if row["success"]]
    if not shown:
        return None
    look = styles(tasks)
    names = list(dict.fromkeys(row["task"] for row in shown))
    figure, (ax,) = new_figure(7.4, 0.8 + 0.36 * len(shown) + 0.3 * len(names))
    places, labels, y = [], [], 0.0
    for task in names:
        if len(names) > 1:
            ax.text(
                0, y, short(task), transform=ax.get_yaxis_transform(), fontsize=9, va="center", color=INK, weight="bold"
            )
            y += 0.8
        for row in (row for row in shown if row["task"] == task):
            own = look[row["label"]]
            rate, low_high = 100 * row["success"]["mean"], row["wilson"]
            if low_high:  # around the pooled rate, which is the mean where all runs have equally many episodes
                ax.plot([100 * x for x in low_high], [y, y], color=own["color"], linewidth=2, solid_capstyle="butt")
            if row["n"] > 1:
                values = [round(100 * v, 6) for v in row["per_run"]]
                heights = [
                    y + 0.24 + 0.13 * values[:i].count(v) for i, v in enumerate(values)
                ]  # equal ones side by side
                ax.scatter(values, heights, s=12, color=own["color"], linewidths=0)
            ax.plot([rate], [y], marker=own["marker"], color=own["color"], markersize=8)
            places.append(y)
            labels.append(row["label"])
            y += 1
        y += 0.3
    ax.set_yticks(places, [_wrapped(label) for label in labels])
    ax.set_ylim(y - 0.4, -0.6)
    ax.set_xlim(-2, 102)
    ax.set_xlabel("episodes solved, %")
    told = "; ".join(f"{short(r['task'])}, {r['label']} {100 * r['success']['mean']:.1f} %" for r in shown)
    caption = "Large marks: mean over training runs. Lines: Wilson's 95 % interval of the pooled episodes."
    if any(row["n"] > 1 for row in shown):
        caption += " Small marks: single training runs."
    return drawing(
        figure, "Success by task and encoder" if len(names) > 1 else "Success by encoder", told + ".", caption
    )


def policy_curves(task: TaskGroups, look: dict[str, dict[str, Any]]) -> Picture | None:
    """Training loss and, where it was measured during training, success by step. None without a history."""
    panels = [
        ("train", "loss", "training loss", 1.0),
        ("val", "success", "success in evaluations during training, %", 100.0),
    ]
    series = {
        key: {group.label: _by_step(group, kind, key, scale) for group in task.groups} for kind, key, _, scale in panels
    }
    # one evaluation, at the end of training, is no curve: the table has it
    drawn = [p for p in panels if any(len(s) > 1 for s in series[p[1]].values())]
    if not drawn:
        return None
    figure, axes = new_figure(4.6 * max(len(drawn), 1) + (2 if len(drawn) == 1 else 0), 3.4, len(drawn))
    for ax, (_, key, title, _) in zip(axes, drawn, strict=True):
        for label, points in series[key].items():
            if not points:
                continue
            own, steps = look[label], sorted(points)
            few = len(steps) <= 12
            ax.plot(
                steps,
                [float(np.mean(points[s])) for s in steps],
                color=own["color"],
                linestyle=own["linestyle"],
                marker=own["marker"] if few else None,
                markersize=4,
                linewidth=1.6,
                label=label,
            )
            if max(map(len, points.values())) > 1:
                low, high = [min(points[s]) for s in steps], [max(points[s]) for s in steps]
                ax.fill_between(steps, low, high, color=own["color"], alpha=0.18, lw=0)
        ax.set_xlabel("step")
        ax.set_title(title, fontsize=10, loc="left", color=INK)
        if key == "loss":
            ax.set_yscale("log")
        else:
            ax.set_ylim(-3, 103)
    handles = axes[0].get_legend_handles_labels()
    if len(handles[0]) > 1:
        figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    names = ", ".join(group.label for group in task.groups)
    return drawing(
        figure,
        f"Training on {short(task.task)}",
        f"Lines by step for {names}: {' and '.join(p[2] for p in drawn)}.",
        "Lines: mean over seeds; bands: from the lowest to the highest run. The loss is the denoiser's mean squared error, of "
        "the running weights; success is that of the averaged weights (EMA)."
        if len(drawn) > 1
        else "Mean over seeds; bands: from the lowest to the highest run. The loss is the denoiser's mean squared error.",
    )


def stages(found: dict[str, Any], title: str) -> Picture:
    """t-SNE of frames by the stage of the task.

    Args:
        found: see :func:`xdfast.robot.stages.stage_separation`.
        title: of the picture.
    """
    points, labels = np.asarray(found["points"], dtype=float), np.asarray(found["labels"])
    figure, (ax,) = new_figure(5.6, 4.2)
    ax.grid(False)
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    for number, name in enumerate(found["stages"]):
        mine = labels == number
        if mine.any():
            color, marker = _STAGE_LOOK[number % len(_STAGE_LOOK)]
            ax.scatter(
                points[mine, 0], points[mine, 1], s=14, color=color, marker=marker, linewidths=0, alpha=0.75, label=name
            )
    legend(ax, loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.5)
    score = "none (fewer than two stages)" if found["silhouette"] is None else f"{found['silhouette']:.3f}"
    rule = (
        "stages from the simulator's progress and success"
        if found["rule"] == "progress"
        else "thirds of each demonstration's time, for want of anything that tells stages"
    )
    return drawing(
        figure,
        title,
        f"t-SNE of {found['frames']} frames of demonstrations by stage ({', '.join(found['stages'])}); silhouette score {score}.",
        f"Silhouette score {score} ({found['metric']}, of the features themselves, {found['frames']} frames). t-SNE: perplexity "
        f"{found['perplexity']:.0f}, PCA start, fixed seed; {rule}. Distances between clusters mean nothing.",
    )


def _by_step(group: Group, kind: str, key: str, scale: float) -> dict[int, list[float]]:
    """Step → the value of each run."""
    found: dict[int, list[float]] = {}
    for run in group.runs:
        for row in run.history:
            value = finite(row.get(key))
            if row.get("kind") == kind and value is not None and isinstance(row.get("step"), int):
                found.setdefault(row["step"], []).append(scale * value)
    return found


def _wrapped(label: str, width: int = 32) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(label, width)) or label
