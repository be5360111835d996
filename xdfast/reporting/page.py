"""``build_report``: records and models to one self-contained HTML page, and a JSON with all its figures beside it."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from xdfast.reporting import content, plots
from xdfast.reporting.adapt import check_size
from xdfast.reporting.analysis_page import AnalysisPart, analysis_part
from xdfast.reporting.embedding import tsne
from xdfast.reporting.groups import Group, group_runs
from xdfast.reporting.policy_page import PolicyPart, policy_part
from xdfast.reporting.policy_words import short
from xdfast.reporting.records import Analysis, ModelRecord, PolicyRecord, Report, RunRecord, VLARecord
from xdfast.reporting.speed import SpeedTable, compare_speed
from xdfast.reporting.svg import Picture
from xdfast.reporting.tables import METRICS, accuracy_table, format_difference, format_metric
from xdfast.reporting.vla_page import VLAPart, vla_part
from xdfast.reporting.vla_words import points

__all__ = ["build_report", "target"]

log = logging.getLogger("xdfast")

#: Most t-SNE pictures: each takes seconds.
_MOST_TSNE = 8
_SECTIONS = ("accuracy", "curves", "cost", "confusion", "tsne")


def build_report(
    records: Sequence[RunRecord],
    models: Sequence[ModelRecord],
    out: str | Path,
    *,
    title: str = "Distillation report",
    batch_sizes: Sequence[int] = (1, 32),
    device: str = "cpu",
    measure_speed: bool = True,
    notes: Sequence[str] = (),
    seconds: float | None = None,
    policies: Sequence[PolicyRecord] = (),
    vlas: Sequence[VLARecord] = (),
    analysis: Analysis | None = None,
) -> Report:
    """Writes the page and the JSON.

    Args:
        records: finished and evaluated runs of image models; may be empty if there are policies.
        models: networks whose cost is counted and measured; may be empty. Speedups are over the teacher if there is
            one, else over the model with the most parameters.
        out: the page; ``.html`` is added if it has no suffix. The JSON has the same name with ``.json``.
        title: of the page.
        batch_sizes: at which latency is measured.
        device: on which it is measured.
        measure_speed: False leaves it out.
        notes: sentences for under the title.
        seconds: rough limit of the measurement; default: 5 per model and batch size.
        policies: finished runs of robots' policies; the JSON then has ``robot``.
        vlas: finished runs of policies of several tasks, by themselves; the JSON then has ``vla``.
        analysis: what was looked at beyond accuracy, see :class:`Analysis`; the JSON then has ``analysis``.

    Returns:
        :class:`Report`.

    Raises:
        ValueError: no records, a bad batch size or image size, or policies of several tasks next to other runs.
        OSError: the folder cannot be made or written; told before anything is measured.
    """
    if vlas and (records or policies or models):
        raise ValueError("policies of several tasks have a page of their own: make two reports")
    groups, left_out = group_runs(records) if records or not (policies or vlas) else ([], [])
    for batch in batch_sizes:
        check_size("batch_sizes", batch)
    if measure_speed and not batch_sizes:
        raise ValueError("batch_sizes must hold at least one size, or measure_speed=False")
    for model in models:
        check_size(f"image_size of {model.name}", model.image_size)
    path, json_path = target(Path(out))
    names = content.display_names(models)
    counts, count_notes = content.counted(models, names)
    speed = _speed(models, names, batch_sizes, device, seconds) if measure_speed and models else None
    cost = content.cost_table(models, names, counts, speed)
    warned = [
        *content.notes_on_data(groups),
        *left_out,
        *count_notes,
        *(content.notes_on_speed(speed) if speed else []),
    ]
    part = policy_part(policies) if policies else None
    told = vla_part(vlas) if vlas else None
    looked = analysis_part(groups, models, names, analysis) if analysis is not None else None
    warned += analysis.remarks if analysis is not None else []
    data: dict[str, Any] = content.plain(
        {
            "title": title,
            "headline": [
                *(part.headline if part else []),
                *(told.headline if told else []),
                *content.headline(groups, cost, speed),
            ],
            "notes": list(notes),
            "remarks": warned,
            "accuracy": accuracy_table(groups),
            "cost": cost,
            "speed": speed.to_dict() if speed else None,
            "runs": [_run(record) for record in [*records, *policies, *vlas]],
            "skipped_images": {path: why for record in records for path, why in record.skipped.items()},
            "environment": content.environment(),
            **({"robot": part.data} if part else {}),
            **({"vla": told.data} if told else {}),
            **({"analysis": looked.data} if looked else {}),
        }
    )
    pictures = _pictures(groups, cost, data["speed"]) if groups else {section: [] for section in _SECTIONS}
    page = _render(data, pictures, part, told, looked)
    _write(json_path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _write(path, page)
    log.info("report written to %s", path)
    return Report(path, json_path, data)


def target(path: Path) -> tuple[Path, Path]:
    """The page and the JSON, in a folder that is known to be writable before anything is measured."""
    path = path.expanduser()
    if path.suffix.lower() not in (".html", ".htm"):
        path = path.with_name(path.name + ".html")
    if path.is_dir():
        raise IsADirectoryError(f"out must be a file such as report.html, but {path} is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(f"cannot write the report into {path.parent}: {error}") from error
    return path, path.with_suffix(".json")


def _write(path: Path, text: str) -> None:
    """Aside first, then renamed: a reader sees the old file or the new one, never half of it."""
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(aside, 0o666 & ~mask)  # mkstemp makes files that only their owner reads
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _speed(
    models: Sequence[ModelRecord], names: Sequence[str], batches: Sequence[int], device: str, seconds: float | None
) -> SpeedTable:
    """Each model against the teacher, or against the largest."""
    by_size = sorted(zip(names, models, strict=True), key=lambda m: -sum(p.numel() for p in m[1].model.parameters()))
    teachers = [name for name, model in by_size if model.role == "teacher"]
    baseline = (teachers or [name for name, _ in by_size])[0] if len(models) > 1 else None
    with _progress() as tell:
        return compare_speed(
            dict(zip(names, (m.model for m in models), strict=True)),
            dict(zip(names, (m.image_size for m in models), strict=True)),
            batches,
            device,
            baseline,
            seconds=seconds or 5.0 * len(models) * len(set(batches)),
            progress=tell,
        )


class _progress:
    """A rich bar on a terminal, silence elsewhere."""

    def __enter__(self) -> Callable[[str, float], None]:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._bar.start()
        task = self._bar.add_task("measuring speed", total=1.0)
        return lambda what, share: self._bar.update(task, completed=share, description=f"measuring speed, {what}")

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()


def _run(record: RunRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "method": record.method,
        "seed": record.seed,
        "steps": record.steps,
        "kind": record.kind,
        "model": record.model_name,
        "metrics": record.metrics,
        "classes": record.classes,
        "confusion": record.confusion,
        "history": record.history,
        "config": record.config,
    }


def _pictures(groups: Sequence[Group], cost: Sequence[dict[str, Any]], speed: Any) -> dict[str, list[Picture]]:
    """Section → pictures; sections without any are empty."""
    group, best = max(
        ((g, g.best) for g in groups), key=lambda pair: content.finite(pair[1].metrics.get("top1")) or -1.0
    )
    name = f"{group.label}, run {best.name}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matplotlib and sklearn, about fonts and few points
        drawn: dict[str, list[Picture | None]] = {
            "accuracy": [plots.methods(groups)],
            "curves": [plots.curves(groups)],
            "cost": [_tradeoff(cost, speed) if speed and speed["rows"] else None, _tradeoff(cost, None)],
            "confusion": [plots.confusion_matrix(best.confusion, best.classes, name) if best.confusion else None],
            "tsne": [_tsne(group) for group in groups[:_MOST_TSNE]],
        }
    return {section: [p for p in found if p is not None] for section, found in drawn.items()}


def _tsne(group: Group) -> Picture | None:
    run = group.best
    try:
        return tsne(run.embedding, run.classes, f"{group.label}, run {run.name}")
    except ValueError as error:
        log.warning("no t-SNE of %s: %s", run.name, error)
        return None


def _tradeoff(cost: Sequence[dict[str, Any]], speed: Any) -> Picture | None:
    """Against measured latency if there is a measurement, else against counted MACs."""
    if speed and speed["rows"]:
        batch = min(row["batch_size"] for row in speed["rows"])
        x = {r["name"]: next((m["p50_ms"] for m in r["measured"] if m["batch_size"] == batch), None) for r in cost}
        label, name = f"latency, ms (measured, batch {batch}, p50)", "Accuracy and latency"
    else:
        x = {r["name"]: r["counted"]["macs"] and r["counted"]["macs"] / 1e9 for r in cost}
        label, name = "GMACs per image (counted)", "Accuracy and MACs"
    points = [{"x": x[r["name"]], "top1": r["top1"], "name": r["name"], "role": r["role"]} for r in cost]
    return plots.tradeoff(points, label, name)


def _render(
    data: dict[str, Any],
    pictures: dict[str, list[Picture]],
    part: PolicyPart | None,
    told: VLAPart | None,
    looked: AnalysisPart | None,
) -> str:
    import jinja2
    import markupsafe  # comes with jinja2

    folder = resources.files("xdfast.reporting")
    jinja = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
    )
    jinja.filters.update(
        metric=lambda value, name: format_metric(name, value),
        points=format_difference,
        rate=lambda value: format_metric("success", value),
        signed=points,
        share=lambda value: "–" if value is None else f"{100 * value:.0f}",
        whole=lambda text: text.replace(" %", "\u00a0%"),  # a number and its unit stay on one line
        task=lambda name: short(name).removesuffix("-v3"),
        short=short,
        bytes=_bytes,
        giga=lambda v: "–" if v is None else f"{v / 1e9:.3g}" if v >= 1e7 else f"{v / 1e9:.2g}",
        count=_count,
        breaks=lambda v: markupsafe.Markup("_<wbr>").join(markupsafe.escape(v).split("_")),
        ms=lambda v: f"{v:.3g}" if v < 1000 else f"{v:,.0f}",
        shown=lambda v: "none" if v is None else v if isinstance(v, str) else json.dumps(v, ensure_ascii=False),
    )
    robot = data.get("robot")
    rows = data["accuracy"] or []
    return jinja.get_template("page.html.j2").render(
        data=data,
        pictures=pictures
        | {"success": [], "training": [], "stages": [], "pareto": []}
        | ({**looked.pictures, "tsne": looked.pictures["tsne"] + pictures["tsne"]} if looked else {})
        | (part.pictures if part else told.pictures if told else {}),
        clips=part.clips if part else told.clips if told else [],
        routes=told.routes if told else [],
        strips=part.strips if part else [],
        metrics={m: t for m, t in METRICS.items() if any(m in row["metrics"] for row in rows)},
        with_scratch=any(row["to_scratch"] for row in [*rows, *(robot["table"] if robot else [])]),
        with_speedup=bool(data["speed"] and data["speed"]["baseline"]),
    )


def _bytes(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def _count(value: float | None) -> str:
    if value is None:
        return "–"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"
