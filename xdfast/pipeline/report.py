"""``report``: from finished runs to one page and a JSON."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdfast.models import create_model
from xdfast.pipeline.evaluate import evaluate, load_evaluation
from xdfast.pipeline.folder import RunResult, load_run, model_source

if TYPE_CHECKING:
    from xdfast.reporting import ModelRecord, Report, RunRecord

__all__ = ["method_of", "report"]

log = logging.getLogger("xdfast")

_NAMES = {"rsd": "RSD", "rsd-logits": "RSD (logits)", "kd": "KD", "mse": "feature MSE"}


def report(
    runs: Any,
    *,
    out: str | Path = "report.html",
    title: str = "Distillation report",
    batch_sizes: Sequence[int] = (1, 32),
    device: str = "cpu",
    measure_speed: bool = True,
    notes: Sequence[str] = (),
) -> Report:
    """One self-contained HTML page, and a JSON beside it: accuracy, FLOPs, memory, latency, speedup over the teacher, pictures.

    Runs that differ only in their seed are one method with a confidence interval. A run that was not evaluated yet is
    evaluated first. Models are timed side by side, in turns, on this machine.

    Args:
        runs: a finished run, its folder, or several of them.
        out: the page; the JSON has the same name with ``.json``.
        title: of the page.
        batch_sizes: at which latency and images/s are measured.
        device: on which they are measured.
        measure_speed: False leaves the measurement out.
        notes: sentences to print under the title.

    Returns:
        A report with ``.path``, ``.json_path``, and ``.data``, the content of the JSON.

    Raises:
        FileNotFoundError: a folder holds no finished run.
        ValueError: no runs.
    """
    from xdfast.reporting import build_report

    listed = [runs] if isinstance(runs, (str, Path, RunResult)) else list(runs)
    if not listed:
        raise ValueError("report needs at least one finished run or its folder")
    found = [run if isinstance(run, RunResult) else load_run(run) for run in listed]
    records = [_record(run) for run in found]
    return build_report(
        records,
        [*_teachers(found), *_students(found, records)],
        out,
        title=title,
        batch_sizes=tuple(batch_sizes),
        device=device,
        measure_speed=measure_speed,
        notes=list(notes),
    )


def method_of(run: RunResult) -> str:
    """What a run is called in tables: its losses, or "from scratch" or "fine-tuned"."""
    if run.kind == "distill":
        return " + ".join(_NAMES.get(name, name) for name in str(run.config["loss"]).split("+"))
    warm = run.config.get("student_pretrained") or _is_folder_or_file(str(run.config.get("model")))
    return "fine-tuned" if warm else "from scratch"


def _is_folder_or_file(spec: str) -> bool:
    return "@" in spec or Path(spec).is_dir()


def _record(run: RunResult) -> RunRecord:
    from xdfast.reporting import RunRecord

    evaluation = load_evaluation(run.path)
    if evaluation is None:
        log.info("%s was not evaluated yet; doing so now", run.path)
        evaluation = evaluate(run, teacher=False if _is_object(run.config.get("teacher")) else None)
    return RunRecord(
        name=run.path.name,
        method=method_of(run),
        seed=run.config.get("seed"),
        kind=run.kind,
        metrics={**run.metrics, **evaluation.metrics},
        history=run.history,
        confusion=evaluation.confusion or None,
        classes=evaluation.classes,
        embedding=evaluation.embedding or None,
        config=run.config,
        model=run.student,
        model_name=run.student.name,
        skipped={**run.bad_images, **evaluation.skipped},
    )


def _is_object(spec: Any) -> bool:
    return isinstance(spec, str) and spec.startswith("object:")


def _teachers(runs: list[RunResult]) -> list[ModelRecord]:
    """Each teacher once, with its accuracy where a run of ours tells it."""
    from xdfast.reporting import ModelRecord

    models: dict[str, ModelRecord] = {}
    for run in runs:
        spec = run.config.get("teacher")
        if spec is None or spec in models:
            continue
        if _is_object(spec):
            log.warning("%s: the teacher was a Python object; it is not in the report", run.path)
            continue
        model = create_model(
            model_source(spec),
            pretrained=run.config.get("teacher_pretrained", True),
            image_size=run.config.get("teacher_size"),
            options=run.config.get("teacher_options"),
            frozen=True,
        )
        own = Path(spec)
        top1 = load_run(own).metrics.get("top1") if (own / "summary.json").is_file() else None
        models[spec] = ModelRecord(name=model.name, model=model, image_size=model.image_size, role="teacher", top1=top1)
    return list(models.values())


def _students(runs: list[RunResult], records: list[RunRecord]) -> list[ModelRecord]:
    """Each student architecture once: runs of one architecture and size are equally fast."""
    from xdfast.reporting import ModelRecord

    models: dict[tuple[Any, ...], ModelRecord] = {}
    for run, record in zip(runs, records, strict=True):
        student = run.student
        key = (student.name, student.image_size, student.num_classes, sum(p.numel() for p in student.parameters()))
        best = record.metrics.get("top1")
        if key in models:
            known = models[key]
            known.top1 = max((v for v in (known.top1, best) if v is not None), default=None)
        else:
            models[key] = ModelRecord(
                name=student.name, model=student, image_size=student.image_size, role="student", top1=best
            )
    return list(models.values())
