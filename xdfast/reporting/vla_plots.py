"""Pictures of policies that skip layers: success against FLOPs, and which layers ran where and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xdfast.reporting.policy_words import short
from xdfast.reporting.records import VLARecord
from xdfast.reporting.svg import INK, Picture, drawing, new_figure

__all__ = ["LOOK", "bare", "heat_maps", "over_time", "pareto"]

#: Role → colour and mark: never the colour alone. Shades differ in lightness, too, for print without colours.
LOOK: dict[str, tuple[str, str]] = {
    "teacher": (INK, "*"),
    "dense": ("#8a8f98", "D"),
    "learned": ("#2f7fc1", "o"),
    "static": ("#d9622b", "s"),
    "random": ("#1b9e77", "^"),
}
#: Cells up to this many layers have their number.
_NUMBERED = 16
#: Dark text is readable above it, light text below.
_BRIGHT = 0.55
_MAP = "cividis"


def pareto(columns: Sequence[dict[str, Any]], total: dict[str, Any]) -> Picture | None:
    """Success with its interval over the executed share of the stack's FLOPs. None below two points.

    Args:
        columns: of :func:`xdfast.reporting.vla_tables.column_rows`.
        total: of :func:`xdfast.reporting.vla_tables.success_table`.
    """
    shown = [
        (column, cell)
        for column, cell in zip(columns, total["cells"], strict=True)
        if cell and column["fraction"] is not None
    ]
    if len(shown) < 2:
        return None
    figure, (ax,) = new_figure(7.4, 4.4)
    xs = _apart([(100 * column["fraction"], *(100 * end for end in cell["wilson"])) for column, cell in shown])
    for (column, cell), x in zip(shown, xs, strict=True):
        color, marker = LOOK[column["role"]]
        rate = 100 * cell["solved"] / cell["episodes"]
        low, high = (100 * end for end in cell["wilson"])
        ax.plot([x, x], [low, high], color=color, linewidth=1.8, solid_capstyle="butt", zorder=2)
        if len(column["per_run"]) > 1:
            seen = [(r["fraction"], r["rate"]) for r in column["per_run"] if None not in (r["fraction"], r["rate"])]
            beside = x - 1.6 - 100 * column["fraction"]  # where the mark does not hide them
            ax.scatter(
                [100 * f + beside for f, _ in seen],
                [100 * r for _, r in seen],
                s=12,
                color=color,
                alpha=0.6,
                linewidths=0,
            )
        size = 14 if marker == "*" else 9
        ax.plot([x], [rate], marker=marker, color=color, markersize=size, zorder=3)
    for kind in ("learned", "static", "random"):  # points of one kind at several budgets are one curve
        line = sorted(
            (x, 100 * cell["solved"] / cell["episodes"])
            for (column, cell), x in zip(shown, xs, strict=True)
            if column["role"] == kind
        )
        if len(line) > 1:
            style = {"learned": "-", "static": "--", "random": ":"}[kind]
            ax.plot(*zip(*line, strict=True), color=LOOK[kind][0], linewidth=1.2, linestyle=style, zorder=1)
    ends = [100 * end for _, cell in shown for end in cell["wilson"]]
    ax.set_xlim(min(0.0, *xs) - 2, max(100.0, *xs) + 8)
    ax.set_ylim(max(min(ends) - 8, -4), min(max(ends) + 8, 104))
    ax.set_xticks([0, 25, 50, 75, 100])
    ax.set_xlabel("executed FLOPs of the transformer, % of the dense one")
    ax.set_ylabel("episodes solved, %")
    _label(
        figure,
        ax,
        [(x, 100 * cell["solved"] / cell["episodes"], c["label"]) for (c, cell), x in zip(shown, xs, strict=True)],
    )
    told = "; ".join(
        f"{c['label']} {100 * cell['solved'] / cell['episodes']:.0f} % at {100 * c['fraction']:.0f} % of the FLOPs"
        for c, cell in shown
    )
    several = any(len(column["per_run"]) > 1 for column, _ in shown)
    names = {
        "teacher": "star: teacher",
        "learned": "circles: learned routing",
        "static": "squares: the same layers always left out",
        "random": "triangles: layers skipped at random",
        "dense": "diamonds: other dense policies",
    }
    kinds = ", ".join(text for kind, text in names.items() if any(c["role"] == kind for c, _ in shown))
    return drawing(
        figure,
        "Success and computation",
        told + ".",
        f"{kinds[:1].upper()}{kinds[1:]}. Lines: Wilson's 95 % interval of the pooled episodes"
        + ("; small marks beside: single training runs." if several else ".")
        + " Shares are counted over the decisions of these episodes, the router included.",
    )


def heat_maps(run: VLARecord, label: str) -> Picture | None:
    """Layers × tasks, and layers × time in the episode: the share of decisions in which a layer ran. None without routing."""
    told = {task: paths for task, paths in run.paths.items() if paths["decisions"]}
    if not told:
        return None
    by_task = np.array([paths["use"] for paths in told.values()], dtype=float).T  # [L, tasks]
    layers, tasks = by_task.shape
    moments = _mean_over_time(list(told.values()))
    parts = 1 if moments is None else 2
    wide = 1.9 + 0.62 * tasks, 5.0
    height = 1.5 + 0.3 * min(layers, 32) + (0.6 if tasks > 1 else 0)
    ratios = {"width_ratios": [wide[0], wide[1]]} if parts == 2 else {}
    figure, axes = new_figure(sum(wide[:parts]) + 0.8, height, parts, gridspec_kw=ratios)
    image = bare(axes[0], by_task, run.always_on)
    axes[0].set_xticks(range(tasks), [_wrapped(short(task)) for task in told], rotation=60, fontsize=8.5)
    for tick in axes[0].get_xticklabels():
        tick.set_ha("right")
        tick.set_rotation_mode("anchor")
    axes[0].set_title("by task", fontsize=10, loc="left", color=INK)
    axes[0].set_ylabel("layer")
    if moments is not None:
        image = bare(axes[1], moments.T, run.always_on)
        _time_axis(axes[1], len(moments))
        axes[1].set_title(
            "over the episode, all tasks" if tasks > 1 else "over the episode", fontsize=10, loc="left", color=INK
        )
    _bar(figure, image, list(axes))
    shares = ", ".join(f"{number} {100 * share:.0f} %" for number, share in enumerate(by_task.mean(1)))
    fixed = ", ".join(map(str, run.always_on))
    return drawing(
        figure,
        f"Layers that ran: {label}, run {run.name}",
        f"Share of decisions in which each layer ran, mean over {tasks} tasks: {shares}.",
        "Share of decisions in which a layer ran. Time is relative to the length of each episode."
        + (f" Always on (•): {fixed}." if fixed else ""),
    )


def over_time(run: VLARecord, label: str) -> Picture | None:
    """Layers × time, one small map per task. None for one task, or without times."""
    told = {task: p for task, p in run.paths.items() if p["decisions"] and _times(p) is not None}
    if len(told) < 2:
        return None
    columns = min(3, len(told))
    rows = -(-len(told) // columns)
    layers = len(next(iter(told.values()))["use"])
    figure, axes = new_figure(9.4, 0.6 + rows * (1.0 + 0.17 * min(layers, 32)), columns, rows, sharey=True)
    image = None
    for place, ax in enumerate(axes):
        if place >= len(told):
            ax.set_visible(False)
            continue
        task, paths = list(told.items())[place]
        times = _times(paths)
        assert times is not None
        image = bare(ax, times.T, run.always_on, numbered=False)
        _time_axis(ax, len(times), named=place >= len(told) - columns)
        ax.set_title(short(task), fontsize=9.5, loc="left", color=INK)
        if place % columns == 0:
            ax.set_ylabel("layer")
    _bar(figure, image, list(axes))
    return drawing(
        figure,
        f"Layers that ran over the episode, by task: {label}, run {run.name}",
        f"One map per task ({', '.join(short(task) for task in told)}): layers by tenths of the episode.",
    )


def bare(ax: Any, values: np.ndarray, always_on: Sequence[int], *, numbered: bool = True) -> Any:
    """A heat map [L, columns] of shares, layer 0 at the bottom; NaN stays empty."""
    ax.grid(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    image = ax.imshow(values, cmap=_MAP, vmin=0, vmax=1, interpolation="nearest", aspect="auto", origin="lower")
    layers, columns = values.shape
    step = 1 if layers <= _NUMBERED else 4
    ticks = list(range(0, layers, step))
    ax.set_yticks(ticks, [f"• {i}" if i in always_on else str(i) for i in ticks])
    ax.tick_params(length=0)
    ax.set_xticks(np.arange(-0.5, columns), minor=True)
    ax.set_yticks(np.arange(-0.5, layers), minor=True)
    ax.grid(True, which="minor", color="#ffffff", alpha=0.55, linewidth=0.8)
    ax.tick_params(which="minor", length=0)
    if numbered and layers <= _NUMBERED:
        for layer in range(layers):
            for column in range(columns):
                share = values[layer, column]
                if np.isfinite(share):
                    color = "black" if share > _BRIGHT else "white"
                    ax.text(column, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    return image


# --- inner workings


def _times(paths: dict[str, Any]) -> np.ndarray | None:
    """[bins, L] with NaN where no decision fell; None without any."""
    bins = paths.get("use_over_time") or []
    if not any(row is not None for row in bins):
        return None
    empty = [float("nan")] * len(paths["use"])
    return np.array([empty if row is None else row for row in bins], dtype=float)


def _mean_over_time(told: Sequence[dict[str, Any]]) -> np.ndarray | None:
    """Mean over tasks, each with the same weight; a moment without any decision is NaN."""
    found = [times for paths in told if (times := _times(paths)) is not None]
    if not found or len({times.shape for times in found}) > 1:
        return None
    stacked = np.stack(found)
    count = np.isfinite(stacked).sum(0)
    return np.where(count > 0, np.nansum(stacked, 0) / np.maximum(count, 1), np.nan)


def _time_axis(ax: Any, bins: int, *, named: bool = True) -> None:
    ax.set_xticks([-0.5, bins / 2 - 0.5, bins - 0.5], ["0", "50", "100"])
    for tick, across in zip(ax.get_xticklabels(), ("left", "center", "right"), strict=False):
        tick.set_ha(across)
    if named:
        ax.set_xlabel("time in the episode, %")


def _bar(figure: Any, image: Any, axes: list[Any]) -> None:
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015, aspect=25, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0", "50", "100 %"])
    bar.ax.tick_params(colors=INK, labelsize=8, length=0)
    bar.outline.set_visible(False)


def _apart(points: Sequence[tuple[float, float, float]], least: float = 1.6) -> list[float]:
    """Where to draw points ``(x, low, high)``: those at the same x whose intervals overlap are moved by about a per cent."""
    moved = [x for x, _, _ in points]
    waiting = sorted(range(len(points)), key=lambda i: points[i][0])
    while waiting:
        group = [waiting.pop(0)]
        for i in group:  # which grows: whatever hides one of them
            near = [j for j in waiting if abs(points[i][0] - points[j][0]) < least and _overlap(points[i], points[j])]
            group += near
            waiting = [j for j in waiting if j not in near]
        if len(group) > 1:
            group.sort(key=lambda i: points[i][0])
            middle = sum(points[i][0] for i in group) / len(group)
            for place, i in enumerate(group):
                moved[i] = middle + least * (place - (len(group) - 1) / 2)
    return moved


def _overlap(one: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    return one[1] <= other[2] and other[1] <= one[2]


def _label(figure: Any, ax: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """A name beside each point, at the first place where it covers neither a mark nor another name."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()  # places are known after the layout
    renderer = figure.canvas.get_renderer()
    marks = [ax.transData.transform((x, y)) for x, y, _ in points]
    frame = ax.get_window_extent(renderer)
    taken: list[Any] = []
    for x, y, name in points:
        best: tuple[float, Any, Any] | None = None
        for dx, dy, across in [
            (9, 0, "left"), (-9, 0, "right"), (9, 11, "left"), (9, -11, "left"), (-9, 11, "right"), (-9, -11, "right"),
            (9, 22, "left"), (9, -22, "left"), (-9, 22, "right"), (-9, -22, "right"),
        ]:  # fmt: skip
            text = ax.annotate(
                name, (x, y), xytext=(dx, dy), textcoords="offset points", ha=across, va="center", fontsize=9, color=INK
            )
            box = text.get_window_extent(renderer)
            outside = max(0.0, frame.x0 - box.x0) + max(0.0, box.x1 - frame.x1)
            covered = sum(box.padded(5).contains(*mark) for mark in marks) + sum(box.overlaps(other) for other in taken)
            bars = sum(
                box.x0 - 2 < mx < box.x1 + 2 for mx, my in marks if abs(mx - ax.transData.transform((x, y))[0]) > 1
            )
            cost = 1000 * covered + 20 * outside + 3 * bars + abs(dy) / 10
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = cost, text, box
            else:
                text.remove()
        assert best is not None
        taken.append(best[2])


def _wrapped(label: str) -> str:
    return label.removesuffix("-v3").removesuffix("-v2")
