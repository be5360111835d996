"""Pictures of CKA maps, saliency and robustness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from xdfast.reporting.media import overlay
from xdfast.reporting.svg import INK, Picture, drawing, legend, new_figure, style

__all__ = ["by_corruption", "by_severity", "cka_maps", "saliency_grid"]

_TEACHER: dict[str, Any] = {"color": INK, "marker": "*", "linestyle": "-"}


def cka_maps(cka: dict[str, Any]) -> Picture:
    """Student's layers (rows, input below) against the teacher's (columns), before and after, on one colour scale.

    Args:
        cka: ``label``, ``teacher``, ``rows``, ``columns``, ``before`` (or None), ``after``, ``images``, ``batch``.
    """
    import matplotlib

    shown = [(title, cka[when]) for when, title in (("before", "before"), ("after", "after")) if cka[when] is not None]
    tables = [np.array([[np.nan if v is None else v for v in row] for row in table], dtype=float) for _, table in shown]
    height, width = tables[0].shape
    cell = 0.3
    colours = matplotlib.colormaps["cividis"].with_extremes(bad="#8a8f98")  # where there is no value
    figure, axes = new_figure(
        1.9 + len(shown) * (0.5 + max(cell * width, 2.0)), 1.6 + max(cell * height, 1.8), len(shown), sharey=True
    )
    for ax, (title, _), table in zip(axes, shown, tables, strict=True):
        ax.grid(False)
        image = ax.imshow(
            np.ma.masked_invalid(table),
            cmap=colours,
            vmin=0,
            vmax=1,
            interpolation="nearest",
            aspect="auto",
            origin="lower",
        )
        ax.set_xticks(range(width), [_short(name) for name in cka["columns"]], fontsize=8, rotation=60, ha="right")
        for tick in ax.get_xticklabels():
            tick.set_rotation_mode("anchor")
        ax.set_yticks(range(height), [_short(name) for name in cka["rows"]], fontsize=8)
        ax.set_title(title, fontsize=10, loc="left", color=INK)
        ax.set_xlabel("teacher")
        if width <= 8:
            for i, j in np.argwhere(np.isfinite(table)):
                ink = "black" if table[i, j] > 0.5 else "white"
                ax.text(j, i, f"{table[i, j]:.2f}".replace("-", "−"), ha="center", va="center", fontsize=7, color=ink)
    axes[0].set_ylabel("student")
    bar = figure.colorbar(image, ax=list(axes), shrink=0.9)
    bar.set_label("CKA", color=INK, fontsize=9)
    bar.ax.tick_params(colors=INK, labelsize=8)
    bar.outline.set_visible(False)
    told = "; ".join(
        f"{title}: {np.nanmean(t):.2f} on average, {t[-1, -1]:.2f} between the pooled features"
        for (title, _), t in zip(shown, tables, strict=True)
        if np.isfinite(t).any()
    ).replace("-", "−")
    empty = " Grey: a layer that says the same of every image." if any(np.isnan(t).any() for t in tables) else ""
    start = "" if len(shown) == 2 else " The student's start could not be made again."
    return drawing(
        figure,
        f"CKA to {cka['teacher']}: {cka['label']}",
        f"{height} layers of the student against {width} of the teacher. {told}.",
        f"Linear CKA of whole activations, unbiased, {cka['images']:,} validation images in batches of {cka['batch']}; "
        f"before: the student's first weights. {told}.{empty}{start}",
    )


def saliency_grid(frames: Any, truths: Sequence[str], looks: Sequence[dict[str, Any]]) -> Picture:
    """A column for each picture; under it a row for each model, with what it said.

    Args:
        frames: uint8 ``[n, S, S, 3]``.
        truths: their classes.
        looks: ``name``, ``maps`` [n, S, S], ``method``, ``said``, ``right``, of each model.
    """
    count = len(frames)
    cell, side = 1.25, 1.7
    figure, axes = new_figure(side + cell * count, (cell + 0.26) * (1 + len(looks)), count, 1 + len(looks))
    figure.set_dpi(160)
    grid = np.asarray(axes).reshape(1 + len(looks), count)
    for ax in axes:
        ax.grid(False)
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_visible(False)
    smooth = "nearest" if frames.shape[1] < 100 else "antialiased"
    for column in range(count):
        grid[0, column].imshow(frames[column], interpolation=smooth)
        grid[0, column].set_title(truths[column][:16], fontsize=9, color=INK, pad=3)
        for row, look in enumerate(looks, 1):
            ax = grid[row, column]
            ax.imshow(overlay(frames[column], np.asarray(look["maps"][column])), interpolation=smooth)
            said, right = look["said"][column], look["right"][column]
            if said is not None:
                mark = "✓" if right else "✗"
                ax.set_title(f"{mark} {said[:14]}", fontsize=8, color=INK if right else "#d9622b", pad=2)
    for row, name in enumerate(["picture", *(look["name"] for look in looks)]):
        grid[row, 0].set_ylabel(_wrapped(name), rotation=0, ha="right", va="center", fontsize=9, labelpad=8)
    told = []
    for look in looks:
        right = [r for r in look["right"] if r is not None]
        told.append(look["name"] + (f" knows {sum(right)} of {len(right)}" if right else ""))
    methods = "; ".join(f"{look['name']}: {look['method']}" for look in looks)
    return drawing(
        figure,
        "Where the models look",
        f"{count} validation images under the saliency of {', '.join(told)}.",
        f"{methods}. Bright: raises the score; each map by its own maximum, so places in one picture compare, pictures do not. "
        "Above each map what the model takes the picture for.",
    )


def by_severity(rows: Sequence[dict[str, Any]]) -> Picture:
    """Accuracy, mean over the corruptions, at severity 0 (clean) to 5: a line for each method, a band over its runs."""
    figure, (ax,) = new_figure(7.4, 3.8)
    severities = range(6)
    for row, own in zip(rows, _looks(rows), strict=True):
        means = [100 * value["mean"] for value in (row["clean"], *row["severities"])]
        ax.plot(
            severities, means, color=own["color"], linestyle=own["linestyle"], marker=own["marker"], markersize=6, linewidth=1.8,
            label=row["label"],
        )  # fmt: skip
        if row["n"] > 1:
            low, high = ([100 * v for v in row[end]] for end in ("lowest", "highest"))
            ax.fill_between(severities, low, high, color=own["color"], alpha=0.18, lw=0)
    ax.set_xticks(severities, ["clean", *map(str, severities[1:])])
    ax.set_xlabel("severity")
    ax.set_ylabel("top-1, %")
    legend(ax, loc="center left", bbox_to_anchor=(1, 0.5))
    alt = "; ".join(
        f"{r['label']} {100 * r['clean']['mean']:.1f} % clean, {100 * r['corrupted']['mean']:.1f} % corrupted"
        for r in rows
    )
    bands = " Bands: from the lowest to the highest run." if any(row["n"] > 1 for row in rows) else ""
    return drawing(
        figure,
        "Accuracy under corruption",
        f"{alt}.",
        f"Mean over {len(rows[0]['corruptions'])} corruptions of the same {rows[0]['images']:,} validation images.{bands}",
    )


def by_corruption(rows: Sequence[dict[str, Any]]) -> Picture:
    """A row for each corruption, a mark for each method: mean over severities and runs."""
    names = list(rows[0]["corruptions"])
    figure, (ax,) = new_figure(7.4, 1.2 + 0.3 * len(names))
    for row, own in zip(rows, _looks(rows), strict=True):
        ax.scatter(
            [100 * row["corruptions"][name] for name in names], range(len(names)), s=46, color=own["color"], marker=own["marker"],
            label=row["label"], linewidths=0, alpha=0.9, zorder=3,
        )  # fmt: skip
    ax.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel("top-1, %, mean over severities")
    legend(ax, loc="center left", bbox_to_anchor=(1, 0.5))
    worst = [f"{row['label']}: {min(names, key=lambda n: row['corruptions'][n]).replace('_', ' ')}" for row in rows]
    return drawing(
        figure,
        "Accuracy by corruption",
        f"Hardest: {'; '.join(worst)}.",
        f"Mean over severities 1 to 5 and over runs. Hardest: {'; '.join(worst)}.",
    )


def _looks(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same colours as in the other pictures of the page; a teacher has the text's."""
    numbers = {False: 0, True: 0}
    looks = []
    for row in rows:
        if row["role"] == "teacher":
            looks.append(_TEACHER)
            continue
        looks.append(style(numbers[row["scratch"]], row["scratch"]))
        numbers[row["scratch"]] += 1
    return looks


def _short(name: str) -> str:
    return name.replace("stages.", "s").replace("layers.", "l").replace(".blocks.", ".").replace("blocks.", "block ")


def _wrapped(label: str, width: int = 20) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(label, width)) or label
