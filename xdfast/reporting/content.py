"""The figures of a report as plain values: what the JSON holds and the page shows."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime, timezone
from typing import Any

import torch

from xdfast._version import __version__
from xdfast.reporting.adapt import device_name
from xdfast.reporting.flops import FlopCount, count_flops
from xdfast.reporting.groups import Group, finite
from xdfast.reporting.memory import parameter_bytes
from xdfast.reporting.records import ModelRecord
from xdfast.reporting.speed import SpeedTable
from xdfast.reporting.tables import accuracy_table, format_difference, format_metric

__all__ = [
    "cost_table",
    "counted",
    "display_names",
    "environment",
    "headline",
    "notes_on_data",
    "notes_on_speed",
    "plain",
]


def plain(value: Any) -> Any:
    """The value in JSON's own types; NaN and Inf become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):  # numpy and torch
        return plain(value.tolist())
    return str(value)


def display_names(models: Sequence[ModelRecord]) -> list[str]:
    """Unique names: the architecture, with role, size or number where needed."""
    names = [m.name for m in models]
    for suffix in (lambda m: f" ({m.role})", lambda m: f" at {m.image_size} px"):
        counts = Counter(names)
        names = [n + suffix(m) if counts[n] > 1 else n for n, m in zip(names, models, strict=True)]
    counts, seen = Counter(names), Counter[str]()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(f"{name} #{seen[name]}" if counts[name] > 1 else name)
    return unique


def counted(models: Sequence[ModelRecord], names: Sequence[str]) -> tuple[dict[str, FlopCount], list[str]]:
    """(name → FLOPs of one image, notes on models that could not be counted or only in part)."""
    counts: dict[str, FlopCount] = {}
    notes: list[str] = []
    for name, record in zip(names, models, strict=True):
        try:
            count = counts[name] = count_flops(record.model, record.image_size)
        except Exception as error:  # a tracer can fail in any way; the rest of the report is still good
            first = (str(error) or type(error).__name__).splitlines()[0]
            notes.append(f"The FLOPs of {name} could not be counted: {first}")
            continue
        if count.unsupported:
            missing = ", ".join(f"{op} ({n}×)" for op, n in count.unsupported.items())
            notes.append(f"The FLOPs of {name} do not include operators without a formula: {missing}.")
        if (count.relative_difference or 0) > 1e-3:
            notes.append(
                f"The two counters disagree on {name} by {100 * (count.relative_difference or 0):.1f} % "
                f"(fvcore {2 * count.products / 1e9:.3f} GFLOPs, torch {count.torch_flops / 1e9:.3f})."
            )
    return counts, notes


def cost_table(
    models: Sequence[ModelRecord], names: Sequence[str], counts: dict[str, FlopCount], speed: SpeedTable | None
) -> list[dict[str, Any]]:
    """One row per model: ``counted`` and ``measured`` apart."""
    rows = []
    for name, record in zip(names, models, strict=True):
        count = counts.get(name)
        rows.append(
            {
                "name": name,
                "architecture": record.name,
                "role": record.role,
                "image_size": record.image_size,
                "top1": finite(record.top1),
                "counted": {
                    "params": count.params if count else sum(p.numel() for p in record.model.parameters()),
                    "parameter_bytes": parameter_bytes(record.model),
                    "macs": count.macs if count else None,
                    "flops": count.flops if count else None,
                    "torch_flops": count.torch_flops if count else None,
                    "relative_difference": count.relative_difference if count else None,
                    "by_operator": count.by_operator if count else {},
                    "by_module": [asdict(m) for m in count.by_module] if count else [],
                    "unsupported": count.unsupported if count else {},
                    "elementwise_not_counted": count.elementwise if count else {},
                },
                "measured": [asdict(r) for r in speed.rows if r.model == name] if speed else [],
            }
        )
    return rows


def headline(groups: Sequence[Group], cost: Sequence[dict[str, Any]], speed: SpeedTable | None) -> list[str]:
    """Sentences with what was found in this report, nothing else."""
    told: list[str] = []
    rated = [row for row in accuracy_table(groups) if "top1" in row["metrics"]]
    best = max(rated, key=lambda row: row["metrics"]["top1"]["mean"], default=None)
    if best is not None:
        n = best["metrics"]["top1"]["n"]
        runs = "1 run, no interval" if n == 1 else f"{n} runs, 95 % interval of the mean"
        told.append(f"Best student: {best['label']} reaches {_percent(best['metrics']['top1'])} % top-1 ({runs}).")
        gained = best["to_scratch"]
        if gained:
            paired = ", paired by seed" if gained["paired"] else ""
            half = gained["half_width"]
            sure = (
                "one run each: no interval"
                if half is None
                else f"± {100 * half:.1f}{paired}"
                + ("" if abs(gained["mean"]) > half else "; the interval includes zero")
            )
            told.append(
                f"That is {100 * gained['mean']:+.1f} points over training from scratch ({sure}).".replace("+-", "−")
            )
    taught = [row for row in rated if row["method"] not in ("from scratch", "fine-tuned")]
    if best is not None and taught and best not in taught:
        second = max(taught, key=lambda row: row["metrics"]["top1"]["mean"])
        text = f"No distilled student is above it: the best, {second['label']}, reaches {_percent(second['metrics']['top1'])} %"
        points = second["to_scratch"]
        told.append(text + (f", {format_difference(points)} points against training from scratch." if points else "."))
    teachers = [row for row in cost if row["role"] == "teacher"]
    students = [row for row in cost if row["role"] == "student"]
    if best is not None:
        students = [row for row in students if row["architecture"] == best["model"]] or students
    if len(teachers) == 1 and students:
        told.append(_against(students[0], teachers[0], speed))
    return told


def _percent(value: dict[str, Any]) -> str:
    return format_metric("top1", value)


def _against(student: dict[str, Any], teacher: dict[str, Any], speed: SpeedTable | None) -> str:
    a, b = student["counted"], teacher["counted"]
    parts = [_ratio(b["params"], a["params"], "parameters", "counted")]
    if a["macs"] and b["macs"]:
        parts.append(_ratio(b["macs"], a["macs"], "FLOPs", "counted"))
    text = f"Against the teacher {teacher['name']}, {student['name']} has {' and '.join(parts)}"
    timed = [r for r in student["measured"] if r["speedup"] is not None]
    # An interval this wide says that the machine was busy, not how fast the student is; the table still has it.
    sure = [r for r in timed if r["speedup_high"] <= 2 * r["speedup_low"]]
    if sure and speed is not None and speed.baseline == teacher["name"]:
        pieces = [
            f"{r['speedup']:.2f}× ({r['speedup_low']:.2f} to {r['speedup_high']:.2f}) at batch {r['batch_size']}"
            for r in sure
        ]
        text += f"; its measured speed on {speed.device_name} is {' and '.join(pieces)} that of the teacher"
    text += "."
    if len(sure) < len(timed):
        batches = " and ".join(str(r["batch_size"]) for r in timed if r not in sure)
        text += f" Its speedup at batch {batches} was too uncertain to state; the table has the intervals."
    if teacher["top1"] is not None:
        text += f" The teacher's top-1 is {100 * teacher['top1']:.1f} %."
    return text


def _ratio(big: float, small: float, what: str, how: str) -> str:
    if not big or not small:
        return f"unknown {what}"
    return f"{big / small:.1f}× fewer {what} ({how})" if big >= small else f"{small / big:.1f}× more {what} ({how})"


def notes_on_data(groups: Sequence[Group]) -> list[str]:
    """Warnings where figures are not comparable."""
    runs = [run for group in groups for run in group.runs]
    notes = []
    data = {str(run.config["val_data"] or run.config.get("data")) for run in runs if "val_data" in run.config}
    if len(data) > 1:
        notes.append(f"The runs were validated on different data ({', '.join(sorted(data))}): do not compare them.")
    totals = {sum(map(sum, run.confusion)) for run in runs if run.confusion}
    if len(totals) == 1:
        notes.append(f"Accuracies are of {totals.pop():,} validation images.")
    elif len(totals) > 1:
        notes.append(
            f"Runs were validated on different numbers of images ({', '.join(f'{t:,}' for t in sorted(totals))})."
        )
    if runs and all(len(group.runs) == 1 for group in groups):
        notes.append("Each method has one run: differences may be chance. Repeat with other seeds for intervals.")
    return notes


def notes_on_speed(speed: SpeedTable) -> list[str]:
    """What was not measured, and whether the machine was quiet enough for latencies to mean something."""
    notes = list(speed.skipped)
    unsteady = [f"{r.model} at batch {r.batch_size}" for r in speed.rows if r.p95_ms > 2 * r.min_ms]
    if unsteady:
        load = "" if speed.load is None else f"; load {speed.load:.1f} on {os.cpu_count()} cores before it began"
        notes.append(
            f"The machine was not quiet during the measurement ({', '.join(unsteady)}: p95 above twice the fastest "
            f"sample{load}): latencies are too high, and speedups as uncertain as their intervals."
        )
    return notes


def environment() -> dict[str, str]:
    """Machine, versions and threads of the process that made the report."""
    import timm

    facts = {
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "xdfast": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "Python": platform.python_version(),
        "system": platform.platform(),
        "processor": device_name(torch.device("cpu")),
        "torch threads": str(torch.get_num_threads()),
        "load (1 min)": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown",
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
        facts["CUDA"] = str(torch.version.cuda)
    return facts
