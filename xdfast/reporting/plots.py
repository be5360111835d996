"""Pictures of accuracy: curves, methods, cost against accuracy, confusion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from xdfast.reporting.groups import Group, finite
from xdfast.reporting.svg import INK, Picture, drawing, new_figure, style
from xdfast.reporting.tables import Summary, format_metric, summarize

__all__ = ["confusion_matrix", "curves", "methods", "styles", "tradeoff"]

#: Up to this many classes, each cell has its number and each row its name.
_NUMBERED = 15


def styles(groups: Sequence[Group]) -> dict[str, dict[str, Any]]:
    """Label → colour, marker and line, the same in every picture."""
    numbers = {scratch: [g.label for g in groups if g.is_scratch == scratch] for scratch in (False, True)}
    return {g.label: style(numbers[g.is_scratch].index(g.label), g.is_scratch) for g in groups}


def curves(groups: Sequence[Group]) -> Picture | None:
    """Training loss and validation figures by epoch: mean over seeds, band from the lowest to the highest run.

    Epoch 0 is the student before its first step.

    None if no run has a history.
    """
    panels = [
        ("train", "loss", "training loss", 1.0),
        ("val", "top1", "validation top-1, %", 100.0),
        ("val", "knn", "k-NN accuracy, %", 100.0),
        ("val", "agreement", "cosine to the teacher", 1.0),
    ]
    drawn = [
        (kind, key, title, scale)
        for kind, key, title, scale in panels
        if any(_by_epoch(run.history, kind, key) for group in groups for run in group.runs)
    ]
    if not drawn:
        return None
    figure, axes = new_figure(4.6 * len(drawn), 3.5, len(drawn))
    look = styles(groups)
    for ax, (kind, key, title, scale) in zip(axes, drawn, strict=True):
        for group in groups:
            runs = [found for run in group.runs if (found := _by_epoch(run.history, kind, key))]
            if not runs:
                continue
            epochs = sorted(set.union(*(set(run) for run in runs)))
            values = [[run[e] * scale for run in runs if e in run] for e in epochs]
            own = look[group.label]
            ticks = [e + 1 for e in epochs]
            ax.plot(
                ticks,
                [float(np.mean(v)) for v in values],
                color=own["color"],
                linestyle=own["linestyle"],
                marker=own["marker"] if len(ticks) <= 12 else None,
                markersize=4,
                linewidth=1.8,
                label=group.label,
            )
            if len(runs) > 1:
                ax.fill_between(
                    ticks, [min(v) for v in values], [max(v) for v in values], color=own["color"], alpha=0.18, lw=0
                )
        ax.set_xlabel("epoch")
        ax.set_title(title, fontsize=10, loc="left", color=INK)
        ax.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(
        *axes[-1].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2 if max(len(g.label) for g in groups) > 24 else 4,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    names = ", ".join(g.label for g in groups)
    return drawing(
        figure,
        "Training curves",
        f"Lines by epoch for {names}: {' and '.join(p[2] for p in drawn)}.",
        "Lines: mean over seeds; epoch 0 is before the first step. Bands: from the lowest to the highest run. "
        "The training loss holds the distillation "
        "terms, so its height is not comparable between methods.",
    )


def methods(groups: Sequence[Group], metric: str = "top1", title: str = "Top-1 by method") -> Picture | None:
    """A dot and its 95 % interval per method, each seed as a small mark. None if no run has the metric."""
    shown = [(g, summarize(v)) for g in groups if (v := g.values(metric))]
    if not shown:
        return None
    figure, (ax,) = new_figure(7.4, 0.9 + 0.45 * len(shown))
    look = styles(groups)
    for row, (group, told) in enumerate(shown):
        own = look[group.label]
        values = [100 * v for v in group.values(metric)]
        if told.n > 1:
            ax.scatter(values, [row + 0.22] * told.n, s=12, color=own["color"], alpha=0.6, linewidths=0)
        half = 100 * told.half_width if told.half_width is not None else None
        ax.errorbar(
            100 * told.mean, row, xerr=half, fmt=own["marker"], color=own["color"], capsize=4, markersize=8, linewidth=2
        )
    ax.set_yticks(range(len(shown)), [_wrapped(g.label) for g, _ in shown])
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlabel(f"{'top-1' if metric == 'top1' else metric}, %")
    values = [100 * v for g, _ in shown for v in g.values(metric)]
    pad = max(0.12 * (max(values) - min(values)), 0.5)
    ends = [100 * (s.mean + sign * (s.half_width or 0)) for _, s in shown for sign in (-1, 1)]
    # A very wide interval (two seeds) must not squeeze the means together.
    span = max(values) - min(values) + 2 * pad
    low = max(min(ends) - pad, min(values) - span, -2)
    high = min(max(ends) + pad, max(values) + span, 102)
    ax.set_xlim(low, high)
    ax.set_xticks([tick for tick in ax.get_xticks() if max(low, 0) <= tick <= min(high, 100)])
    cut = min(ends) < low or max(ends) > high
    alt = "; ".join(f"{g.label} {_in_words(metric, s)}" for g, s in shown)
    caption = "Large marks: mean with its 95 % t interval over seeds. Small marks: single seeds. " + (
        "An interval that leaves the axis is cut there. " if cut else ""
    )
    if any(s.n == 1 for _, s in shown):
        caption += "One run has no interval."
    return drawing(figure, title, alt + ".", caption.strip())


def tradeoff(points: Sequence[dict[str, Any]], x_label: str, title: str) -> Picture | None:
    """Accuracy against cost on a log axis.

    Args:
        points: ``x`` cost, ``top1`` in [0, 1], ``name``, ``role``; points without both numbers are left out.
        x_label: with its unit, and whether it was counted or measured.
        title: of the picture.
    """
    shown = [p for p in points if finite(p.get("x")) and finite(p.get("top1")) is not None]
    if len(shown) < 2:
        return None
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, (ax,) = new_figure(7.4, 3.4)
    for i, point in enumerate(shown):
        teacher = point["role"] == "teacher"
        own = style(i)
        color = INK if teacher else own["color"]
        ax.scatter(point["x"], 100 * point["top1"], s=90, color=color, marker="*" if teacher else own["marker"])
        ax.annotate(
            f"{point['name']}{' (teacher)' if teacher and '(teacher)' not in point['name'] else ''}",
            (point["x"], 100 * point["top1"]),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=INK,
        )
    ax.set_xscale("log")
    # 0.5, 1, 2 rather than powers of ten: costs seldom span decades.
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.15g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    low, high = min(p["x"] for p in shown), max(p["x"] for p in shown)
    room = max((high / low) ** 0.25, 1.5)  # for the names beside the marks
    ax.set_xlim(low / room, high * room)
    ax.margins(y=0.25)
    ax.set_xlabel(x_label)
    ax.set_ylabel("top-1, %")
    alt = "; ".join(f"{p['name']} {100 * p['top1']:.1f} % at {p['x']:.3g}" for p in shown)
    return drawing(figure, title, f"{x_label}: {alt}.", "Left and up is better.")


def confusion_matrix(counts: Sequence[Sequence[int]], classes: Sequence[str], name: str) -> Picture | None:
    """Rows sum to 100 %. Numbers and names up to 15 classes, above that colour alone. None if it is empty."""
    matrix = np.asarray(counts, dtype=float)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.sum() == 0:
        return None
    total = matrix.sum(1, keepdims=True)
    share = np.divide(matrix, total, out=np.full_like(matrix, np.nan), where=total > 0)
    size = len(matrix)
    numbered = size <= _NUMBERED
    figure, (ax,) = new_figure(5.6, 4.8)
    ax.grid(False)
    image = ax.imshow(share, cmap="cividis", vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    bar = figure.colorbar(image, ax=ax, shrink=0.8)
    bar.set_label("share of the true class", color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    if numbered:
        for i in range(size):
            for j in range(size):
                if share[i, j] >= 0.005:
                    color = "black" if share[i, j] > 0.5 else "white"
                    ax.text(j, i, f"{100 * share[i, j]:.0f}", ha="center", va="center", fontsize=8, color=color)
    step = 1 if size <= 30 else math.ceil(size / 20)
    ticks = list(range(0, size, step))
    names = [_clip(classes[i]) if i < len(classes) and step == 1 else str(i) for i in ticks]
    small = 9 if numbered else 7
    ax.set_xticks(ticks, names, rotation=0 if max(map(len, names)) <= 3 else 60, fontsize=small)
    ax.set_yticks(ticks, names, fontsize=small)
    if max(map(len, names)) > 3:
        for tick in ax.get_xticklabels():
            tick.set_ha("right")
            tick.set_rotation_mode("anchor")
    ax.set_xlabel("predicted" + ("" if step == 1 else " (class number)"))
    ax.set_ylabel("true" + ("" if step == 1 else " (class number)"))
    worst = _confusions(share, classes)
    right = matrix.trace() / matrix.sum()
    return drawing(
        figure,
        f"Confusion matrix of {name}",
        f"{size} classes, {100 * right:.1f} % of {int(matrix.sum()):,} images on the diagonal."
        + (f" {worst}" if worst else ""),
        "Rows are true classes and sum to 100 %." + (f" {worst}" if worst else ""),
    )


def _confusions(share: np.ndarray, classes: Sequence[str]) -> str:
    """The three most frequent confusions in words."""
    off = np.nan_to_num(share.copy())
    np.fill_diagonal(off, 0)
    top = [divmod(int(k), len(off)) for k in np.argsort(off, axis=None)[::-1][:3]]

    def name(i: int) -> str:
        return str(classes[i]) if i < len(classes) else str(i)

    told = [f"{name(i)} taken for {name(j)} ({100 * off[i, j]:.0f} %)" for i, j in top if off[i, j] > 0]
    return f"Most frequent: {', '.join(told)}." if told else ""


def _by_epoch(history: Sequence[dict[str, Any]], kind: str, key: str) -> dict[int, float]:
    """Epoch → mean of the key over the rows of that kind."""
    found: dict[int, list[float]] = {}
    for row in history:
        value = finite(row.get(key))
        if row.get("kind") == kind and value is not None and isinstance(row.get("epoch"), int):
            found.setdefault(row["epoch"], []).append(value)
    return {epoch: float(np.mean(values)) for epoch, values in found.items()}


def _in_words(metric: str, told: Summary) -> str:
    value = {"mean": told.mean, "half_width": told.half_width}
    return f"{format_metric(metric, value)} % (n = {told.n})"


def _clip(text: Any, width: int = 16) -> str:
    text = str(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def _wrapped(label: str, width: int = 30) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(label, width)) or label
