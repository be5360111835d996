"""Means with intervals over seeds, and differences to the baseline paired by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from xdfast.reporting.groups import Group, finite, group_runs
from xdfast.reporting.records import RunRecord

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "METRICS",
    "Difference",
    "Summary",
    "accuracy_table",
    "compare_to_scratch",
    "difference",
    "method_table",
    "summarize",
]

#: Metric → column title; all in [0, 1], shown in per cent except the CKA.
METRICS = {"top1": "Top-1", "top5": "Top-5", "knn": "k-NN", "linear_probe": "Linear probe", "cka": "CKA to teacher"}

#: What must be equal for a difference to tell something about the method.
_SAME = (
    *("data", "val_data", "val_fraction", "labels_per_class", "augment"),
    *("student_size", "student_options", "image_size"),
)


@dataclass(frozen=True)
class Summary:
    """Mean of n values; ``half_width`` of its 95 % t interval, None below two values (one run has no interval)."""

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Difference of two means and half the width of its 95 % interval; ``paired`` by seed, n pairs, or not (Welch)."""

    mean: float
    half_width: float | None
    n: int
    paired: bool


def summarize(values: Iterable[float]) -> Summary:
    r"""Mean and 95 % confidence interval of the mean over repetitions (seeds), by Student's t.

    .. math:: \bar x \pm t_{0.975,\,n-1} \, s / \sqrt n

    NaN, infinite and missing values are left out, and n tells.

    Raises:
        ValueError: no finite value.
    """
    kept = [x for x in map(finite, values) if x is not None]
    if not kept:
        raise ValueError("summarize needs at least one finite value")
    mean, n = math.fsum(kept) / len(kept), len(kept)
    if n == 1:
        return Summary(mean, None, 1)
    return Summary(mean, _t(n - 1) * math.sqrt(_variance(kept) / n), n)


def difference(group: Group, baseline: Group, metric: str = "top1") -> Difference | None:
    """group − baseline. Paired by seed where all seeds match or at least two do; else Welch's interval.

    None if one of the two lacks the metric. Without two repetitions there is no interval.
    """
    mine, theirs = group.by_seed(metric), baseline.by_seed(metric)
    shared = sorted(set(mine) & set(theirs))
    if shared and (len(shared) >= 2 or set(mine) == set(theirs)):
        told = summarize(mine[seed] - theirs[seed] for seed in shared)
        return Difference(told.mean, told.half_width, told.n, paired=True)
    a, b = group.values(metric), baseline.values(metric)
    if not a or not b:
        return None
    mean = math.fsum(a) / len(a) - math.fsum(b) / len(b)
    if min(len(a), len(b)) < 2:
        return Difference(mean, None, min(len(a), len(b)), paired=False)
    va, vb = _variance(a) / len(a), _variance(b) / len(b)
    if va + vb == 0:
        return Difference(mean, 0.0, min(len(a), len(b)), paired=False)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))  # Welch–Satterthwaite
    return Difference(mean, _t(freedom) * math.sqrt(va + vb), min(len(a), len(b)), paired=False)


def baseline_of(group: Group, groups: Sequence[Group]) -> Group | None:
    """The group trained from scratch with the same student, data and steps; None for itself, and unless there is exactly one."""

    def setup(g: Group) -> str:
        first = g.runs[0]
        length = first.config.get("epochs") if first.steps is None else f"{first.steps} steps"
        settings = [first.config.get(key) for key in _SAME]
        return json.dumps([g.model_name, length, *settings], default=str, sort_keys=True)

    found = [g for g in groups if g.is_scratch and setup(g) == setup(group)]
    return found[0] if len(found) == 1 and found[0] is not group else None


def accuracy_table(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One plain row per group: label, method, model, seeds, each metric's summary, difference of top-1 to scratch."""
    rows = []
    for group in groups:
        base = baseline_of(group, groups)
        gained = None if base is None else difference(group, base)
        rows.append(
            {
                "label": group.label,
                "method": group.method,
                "model": group.model_name,
                "runs": [run.name for run in group.runs],
                "seeds": [run.seed for run in group.runs],
                "n": len(group.runs),
                "metrics": {m: asdict(summarize(v)) for m in METRICS if (v := group.values(m))},
                "to_scratch": None if gained is None else asdict(gained),
            }
        )
    return rows


def compare_to_scratch(records: Sequence[RunRecord], metric: str = "top1") -> dict[str, Difference]:
    """Label of each method that has a baseline → its difference to training from scratch, in the metric's unit."""
    groups, _ = group_runs(records)
    found = {}
    for group in groups:
        base = baseline_of(group, groups)
        told = None if base is None else difference(group, base, metric)
        if told is not None:
            found[group.label] = told
    return found


def method_table(records: Sequence[RunRecord], metrics: Sequence[str] = tuple(METRICS)) -> Table:
    """The accuracy table for a terminal: mean ± half the 95 % interval over seeds; a single run has no interval.

    Args:
        records: runs; those that differ only in their seed make one row.
        metrics: columns, of those the runs have: top1, top5, knn, linear_probe, cka.

    Raises:
        ValueError: no records, or an unknown metric.
    """
    from rich.markup import escape
    from rich.table import Table

    groups, _ = group_runs(records)
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")
    rows = accuracy_table(groups)
    shown = [metric for metric in metrics if any(metric in row["metrics"] for row in rows)]
    table = Table(caption="mean ± half the 95 % t interval over seeds; n = 1 has none")
    table.add_column("Method", no_wrap=True)
    table.add_column("n", justify="right")
    for metric in shown:
        table.add_column(METRICS[metric], justify="right")
    with_difference = any(row["to_scratch"] for row in rows)
    if with_difference:
        table.add_column("vs scratch", justify="right")
    for row in rows:
        cells = [format_metric(metric, row["metrics"].get(metric)) for metric in shown]
        extra = [format_difference(row["to_scratch"])] if with_difference else []
        table.add_row(escape(row["label"]), str(row["n"]), *cells, *extra)
    return table


def format_metric(metric: str, value: dict[str, Any] | None) -> str:
    """``93.1 ± 0.4`` in per cent (the CKA in [0, 1]); a dash if missing."""
    if value is None:
        return "–"
    scale, digits = (1.0, 3) if metric == "cka" else (100.0, 1)
    text = f"{value['mean'] * scale:.{digits}f}"
    return text if value["half_width"] is None else f"{text} ± {value['half_width'] * scale:.{digits}f}"


def format_difference(value: dict[str, Any] | None) -> str:
    """``+2.1 ± 0.8`` percentage points; a dash if missing."""
    if value is None:
        return "–"
    text = f"{value['mean'] * 100:+.1f}".replace("-", "−")
    return text if value["half_width"] is None else f"{text} ± {value['half_width'] * 100:.1f}"


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)


def _t(freedom: float) -> float:
    from scipy.special import stdtrit  # comes with scikit-learn

    return float(stdtrit(freedom, 0.975))
