"""A comparison's figures: rows with intervals and costs, as Markdown and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdfast.pipeline.folder import RunResult

__all__ = ["markdown", "picture", "table_rows"]

_HEADINGS = ("", "seeds", "top-1 %", "against scratch, points", "ms per step", "peak MB", "trained beside it")


def table_rows(pair: str, methods: dict[str, list[RunResult]], teacher_top1: float | None) -> list[dict[str, Any]]:
    """One row per method of a pair.

    Args:
        pair: its name.
        methods: method → finished runs, one per seed.
        teacher_top1: of the pair's teacher, None if unknown.

    Returns:
        Rows with ``pair``, ``method``, ``teacher_top1``, ``top1`` and ``against_scratch`` (``mean``, ``half_width`` of the 95 %
        t interval over seeds, ``n``; the latter of differences paired by seed; None where there is nothing to say),
        ``by_seed``, ``ms_per_step`` (median over seeds; loading and the last validation included), ``peak_mb`` (largest over
        seeds), ``peak_of``, ``extra_parameters``.
    """
    scratch = next((runs for runs in methods.values() if runs and runs[0].kind == "finetune"), [])
    base = {run.config["seed"]: run.metrics["top1"] for run in scratch}
    rows = []
    for method, runs in methods.items():
        top1 = {run.config["seed"]: run.metrics["top1"] for run in runs if "top1" in run.metrics}
        gained = [top1[seed] - base[seed] for seed in top1 if seed in base] if runs is not scratch else []
        costs = [json.loads((run.path / "cost.json").read_text()) for run in runs if (run.path / "cost.json").is_file()]
        rows.append(
            {
                "pair": pair,
                "method": method,
                "teacher_top1": teacher_top1,
                "top1": _summary(list(top1.values())),
                "against_scratch": _summary(gained),
                "by_seed": {str(seed): value for seed, value in top1.items()},
                "ms_per_step": 1e3 * statistics.median(run.metrics["seconds"] / run.metrics["steps"] for run in runs),
                "peak_mb": max((cost["peak_bytes"] for cost in costs), default=0) / 1e6 or None,
                "peak_of": costs[0]["of"] if costs else None,
                "extra_parameters": costs[0]["extra_parameters"] if costs else None,
            }
        )
    return rows


def _summary(values: Sequence[float]) -> dict[str, Any] | None:
    from xdfast.reporting import summarize

    if not values:
        return None
    told = summarize(values)
    return {"mean": told.mean, "half_width": told.half_width, "n": told.n}


def markdown(rows: Sequence[dict[str, Any]], level: int = 3) -> str:
    """A table for each pair, under a heading of its own."""
    parts = []
    for pair in dict.fromkeys(row["pair"] for row in rows):
        mine = [row for row in rows if row["pair"] == pair]
        known = mine[0]["teacher_top1"]
        teacher = "" if known is None else f" (teacher {100 * known:.1f} %)"
        lines = [_HEADINGS, ("---", *["---:"] * (len(_HEADINGS) - 1)), *(_cells(row) for row in mine)]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(f"{'#' * level} {pair}{teacher}\n\n{table}\n")
    return "\n".join(parts)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    top1, gained = row["top1"], row["against_scratch"]
    extra = row["extra_parameters"]
    return (
        row["method"],
        str(top1["n"]) if top1 else "0",
        _interval(top1, "") if top1 else "–",
        _interval(gained, "+") if gained else "–",
        f"{row['ms_per_step']:.0f}",
        f"{row['peak_mb']:.0f}" if row["peak_mb"] else "–",
        "–" if extra is None else f"{extra / 1e6:.2f} M" if extra else "0",
    )


def _interval(told: dict[str, Any], sign: str) -> str:
    half = "" if told["half_width"] is None else f" ± {100 * told['half_width']:.1f}"
    return f"{100 * told['mean']:{sign}.1f}{half}"


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Top-1 of every method, a panel for each pair: the mean with its interval, the single runs, scratch and teacher as lines."""
    from matplotlib.figure import Figure

    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    most = max(sum(row["pair"] == pair for row in rows) for pair in pairs)
    figure = Figure(figsize=(4.2 * len(pairs) + 0.8, 0.32 * most + 1.4), layout="constrained")
    panels = figure.subplots(1, len(pairs), squeeze=False)[0]
    for panel, pair in zip(panels, pairs):
        mine = [row for row in rows if row["pair"] == pair and row["top1"]]
        for place, row in enumerate(mine):
            told, colour = row["top1"], "0.45" if row["against_scratch"] is None else "tab:blue"
            half = 0 if told["half_width"] is None else 100 * told["half_width"]
            panel.errorbar(100 * told["mean"], place, xerr=half, fmt="o", color=colour, capsize=3, markersize=5)
            single = [100 * value for value in row["by_seed"].values()]
            panel.plot(single, [place] * len(single), "|", color=colour, alpha=0.6, markersize=9)
        for row in mine:
            if row["against_scratch"] is None:
                panel.axvline(100 * row["top1"]["mean"], color="0.75", linewidth=1, zorder=0)
        if mine and mine[0]["teacher_top1"] is not None:
            panel.axvline(100 * mine[0]["teacher_top1"], color="tab:orange", linewidth=1, linestyle="--", zorder=0)
            panel.set_title(f"{pair}\ndashed: the teacher", fontsize=10)
        else:
            panel.set_title(pair, fontsize=10)
        panel.set_yticks(range(len(mine)), [row["method"] for row in mine], fontsize=9)
        panel.invert_yaxis()
        panel.set_xlabel("top-1 %: mean, 95 % interval, single runs", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
