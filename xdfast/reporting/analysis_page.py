"""The part of a page about what models are like beyond accuracy: its tables and pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from xdfast.reporting import analysis_plots
from xdfast.reporting.embedding import tsne
from xdfast.reporting.groups import Group
from xdfast.reporting.records import Analysis, ModelRecord
from xdfast.reporting.svg import Picture
from xdfast.reporting.tables import baseline_of, difference, summarize

__all__ = ["AnalysisPart", "analysis_part", "robustness_table"]

log = logging.getLogger("xdfast")

#: Each is large.
_MOST_MAPS = 8
_MOST_ROWS = 8


@dataclass
class AnalysisPart:
    """``data`` for the JSON, ``pictures`` by section ("cka", "saliency", "robustness", "tsne"), sentences for the remarks."""

    data: dict[str, Any]
    pictures: dict[str, list[Picture]] = field(default_factory=dict)


def analysis_part(
    groups: Sequence[Group], models: Sequence[ModelRecord], names: Sequence[str], found: Analysis
) -> AnalysisPart:
    """Tables and pictures of what was found; the records of runs and teachers hold it.

    Args:
        groups: methods.
        models: with the teachers; ``names`` are what they are called in the report.
        found: what belongs to no record.
    """
    teachers = [(name, m) for name, m in zip(names, models, strict=True) if m.role == "teacher"]
    maps = [{"label": g.label, "run": g.best.name, **cka} for g in groups if (cka := g.best.analysis.get("cka"))]
    rows = robustness_table(groups, teachers)
    looks = [
        {"name": _as_teacher(name), **look} for name, m in teachers if (look := m.analysis.get("saliency")) is not None
    ]
    looks += [{"name": g.label, **look} for g in groups if (look := g.best.analysis.get("saliency")) is not None]
    data = {
        "parts": found.parts,
        "cka": [{**m, **_told(m)} for m in maps],
        "robustness": rows,
        "saliency": [{k: v for k, v in look.items() if k != "maps"} for look in looks],
        "truths": found.truths,
        "measurements": found.measurements,
    }
    pictures = {
        "cka": [analysis_plots.cka_maps(m) for m in maps[:_MOST_MAPS]],
        "saliency": [analysis_plots.saliency_grid(found.frames, found.truths, looks[:_MOST_ROWS])] if looks else [],
        "robustness": [p for p in (analysis_plots.by_severity(rows), analysis_plots.by_corruption(rows)) if p]
        if rows
        else [],
        "tsne": [p for name, m in teachers if (p := _features(name, m)) is not None],
    }
    return AnalysisPart(data, pictures)


def robustness_table(groups: Sequence[Group], teachers: Sequence[tuple[str, ModelRecord]] = ()) -> list[dict[str, Any]]:
    """One plain row for each teacher and each group that was measured.

    ``label``, ``role``, ``scratch`` (whether it is a baseline), ``n`` runs; ``clean``, ``corrupted`` (mean over corruptions and
    severities) and the five ``severities`` as summaries over seeds; ``corruptions``: name → mean over severities and runs;
    ``lowest`` and ``highest`` run at severity 0 (clean) to 5; ``to_scratch``: difference of ``corrupted``.
    """
    rows = []
    for name, model in teachers:
        if "robustness" in model.analysis:
            rows.append(_row(_as_teacher(name), "teacher", False, [model.analysis["robustness"]], None))
    for group in groups:
        measured = [run.analysis["robustness"] for run in group.runs if "robustness" in run.analysis]
        if measured:
            base = baseline_of(group, groups)
            gained = None if base is None else difference(group, base, "corrupted")
            rows.append(_row(group.label, "student", group.is_scratch, measured, gained))
    return rows


def _row(label: str, role: str, scratch: bool, measured: list[dict[str, Any]], gained: Any) -> dict[str, Any]:
    corruptions = list(measured[0]["accuracy"])
    steps = [[m["clean"] for m in measured]]
    for severity in range(5):
        steps.append([_mean([m["accuracy"][name][severity] for name in corruptions]) for m in measured])
    return {
        "label": label,
        "role": role,
        "scratch": scratch,
        "n": len(measured),
        "clean": asdict(summarize(steps[0])),
        "severities": [asdict(summarize(values)) for values in steps[1:]],
        "corrupted": asdict(summarize(m["mean"] for m in measured)),
        "corruptions": {name: _mean([_mean(m["accuracy"][name]) for m in measured]) for name in corruptions},
        "lowest": [min(values) for values in steps],
        "highest": [max(values) for values in steps],
        "to_scratch": None if gained is None else asdict(gained),
        "images": measured[0]["images"],
        "size": measured[0]["size"],
    }


def _told(cka: dict[str, Any]) -> dict[str, Any]:
    """Means over all pairs of layers, and the value of the two last ones, before and after."""
    told: dict[str, Any] = {}
    for when in ("before", "after"):
        table = cka[when]
        cells = [v for row in table or [] for v in row if v is not None]
        told[f"mean_{when}"] = _mean(cells) if cells else None
        told[f"last_{when}"] = table[-1][-1] if table else None
    return told


def _features(name: str, model: ModelRecord) -> Picture | None:
    embedding = model.analysis.get("embedding")
    if embedding is None:
        return None
    try:
        return tsne(embedding, embedding["classes"], _as_teacher(name))
    except ValueError as error:
        log.warning("no t-SNE of %s: %s", name, error)
        return None


def _as_teacher(name: str) -> str:
    return name if "(teacher)" in name else f"{name} (teacher)"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
