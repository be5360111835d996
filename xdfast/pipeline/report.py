"""``report``: from finished runs to one page and a JSON."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdfast.losses import parse_losses
from xdfast.models import create_model
from xdfast.pipeline.evaluate import EvaluateResult, evaluate, load_evaluation
from xdfast.pipeline.folder import RunResult, load_run, model_source
from xdfast.pipeline.report_policy import policy_records

if TYPE_CHECKING:
    from xdfast.reporting import ModelRecord, Report, RunRecord

__all__ = ["first_stage", "method_of", "records_of", "report", "teacher_spec"]

log = logging.getLogger("xdfast")

_NAMES = {"rsd": "RSD", "rsd-logits": "RSD (logits)", "kd": "KD", "mse": "feature MSE"}


def report(
    runs: Any,
    *,
    out: str | Path = "report.html",
    title: str | None = None,
    batch_sizes: Sequence[int] | None = None,
    device: str = "cpu",
    measure_speed: bool = True,
    notes: Sequence[str] = (),
    analysis: Any = (),
    analysis_images: int | None = None,
    progress: bool = True,
) -> Report:
    """One self-contained HTML page, and a JSON beside it: accuracy, FLOPs, memory, latency, speedup over the teacher, pictures.

    Of robots' policies: success by task and encoder, training, latency, videos, saliency, stages of the task in feature space.
    Of policies of several tasks: students that skip layers next to their teacher and baselines, in success, FLOPs, latency, and
    which layers ran where; they make a report by themselves.
    Runs that differ only in their seed are one method with a confidence interval. A run that was not evaluated yet is
    evaluated first. Models are timed side by side, in turns, on this machine.

    Args:
        runs: a finished run, its folder, or several of them.
        out: the page; the JSON has the same name with ``.json``.
        title: of the page; default: "Distillation report", or what kind of policies there are.
        batch_sizes: at which latency and images/s are measured; default: 1 and 32, of policies of several tasks 1 and 16.
        device: on which they are measured.
        measure_speed: False leaves the measurement out.
        notes: sentences to print under the title.
        analysis: of image models, beyond accuracy: ``"cka"`` (maps of the student's layers against the teacher's, before and
            after), ``"tsne"`` (the teacher's features beside the students'), ``"saliency"`` (where they look), ``"robustness"``
            (accuracy under common corruptions), several of these, or ``"all"``. What the JSON of an earlier report at ``out``
            holds of the same weights and images is taken from there.
        analysis_images: how many validation images CKA and robustness take; default: 1,024 and 256, above 64 px 256 and 64.
        progress: of the analysis.

    Returns:
        A report with ``.path``, ``.json_path``, and ``.data``, the content of the JSON.

    Raises:
        FileNotFoundError: a folder holds no finished run.
        ValueError: no runs, policies of several tasks together with other runs, or an analysis that is unknown or of no
            image model.
        ImportError: a package that an analysis needs is missing.
    """
    from xdfast.pipeline.analysis import add_analysis, parts_of
    from xdfast.reporting import build_report
    from xdfast.reporting.page import target

    listed = [runs] if isinstance(runs, (str, Path, RunResult)) else list(runs)
    if not listed:
        raise ValueError("report needs at least one finished run or its folder")
    parts = parts_of(analysis)
    if analysis_images is not None and (isinstance(analysis_images, bool) or analysis_images < 4):
        raise ValueError(f"analysis_images must be ≥ 4, got {analysis_images!r}")
    found = [run if isinstance(run, RunResult) else load_run(run) for run in listed]
    if parts and not any(run.kind in ("distill", "finetune") for run in found):
        raise ValueError("analysis is of image models, but the runs are policies of robots; leave it out")
    told = [run for run in found if run.kind == "vla"]
    if told and len(told) < len(found):
        other = next(run for run in found if run.kind != "vla")
        raise ValueError(
            f"{told[0].path} is a policy of several tasks, {other.path} is not ({other.kind}): make two reports, one of each"
        )
    if told:
        from xdfast.pipeline.report_vla import vla_report

        return vla_report(
            told,
            out,
            title=title,
            batch_sizes=(1, 16) if batch_sizes is None else tuple(batch_sizes),
            device=device,
            measure_speed=measure_speed,
            notes=list(notes),
        )
    policies = [run for run in found if run.kind == "policy"]
    found = [run for run in found if run.kind != "policy"]
    page, json_path = target(Path(out))  # now, not after the measurements
    records = records_of(found)
    teachers = _teachers(found)
    looked_at = None
    if parts:
        looked_at = add_analysis(
            found,
            records,
            teachers,
            parts,
            images=analysis_images,
            device=device,
            json_path=json_path,
            progress=progress,
        )
    return build_report(
        records,
        [*teachers.values(), *_students(found, records)],
        page,
        title=title or ("Distillation report" if found else "Robot policies"),
        batch_sizes=(1, 32) if batch_sizes is None else tuple(batch_sizes),
        device=device,
        measure_speed=measure_speed,
        notes=list(notes),
        policies=policy_records(policies) if policies else [],
        analysis=looked_at,
    )


def method_of(run: RunResult) -> str:
    """What a run is called in tables: its losses (and "→ fine-tuned" after them), or "from scratch" or "fine-tuned"."""
    if run.kind == "distill":
        return " + ".join(
            _NAMES.get(name, name) + (f" · {weight:g}" if weight is not None else "")
            for name, weight in parse_losses(str(run.config["loss"])).items()
        )
    first = _stage_before(run)
    if first is not None:
        return f"{method_of(first)} → fine-tuned"
    spec = str(run.config.get("model"))
    warm = run.config.get("student_pretrained") or "@" in spec or Path(spec).is_dir()
    return "fine-tuned" if warm else "from scratch"


def records_of(runs: Sequence[RunResult]) -> list[RunRecord]:
    """What ``xdfast.reporting`` needs to know of each run; one that was not evaluated yet is evaluated first."""
    return [_record(run) for run in runs]


def first_stage(run: RunResult) -> RunResult:
    """The run in which the network of this one began: itself, or what it was fine-tuned from, and so on."""
    before = _stage_before(run)
    return run if before is None else first_stage(before)


def teacher_spec(run: RunResult) -> str | None:
    """By what name the run, or the latest stage before it that had one, knows its teacher; None without."""
    return next((str(r.config["teacher"]) for r in _with_earlier_stages([run]) if r.config.get("teacher")), None)


def _stage_before(run: RunResult) -> RunResult | None:
    """The finished run whose student this one started from."""
    spec = run.config.get("model") if run.kind == "finetune" else run.config.get("student")
    if isinstance(spec, str) and (Path(spec) / "summary.json").is_file():
        return load_run(spec)
    return None


def _record(run: RunResult) -> RunRecord:
    from xdfast.reporting import RunRecord

    config, steps, spec = dict(run.config), run.metrics["steps"], run.config.get("teacher")
    first = _stage_before(run)
    while first is not None:  # the stage that made the network tells its options and the teacher
        steps += first.metrics["steps"]
        config |= {key: first.config[key] for key in ("student_options", "student_size")}
        spec = spec or first.config.get("teacher")
        first = _stage_before(first)
    evaluation = load_evaluation(run.path)
    if evaluation is None:
        log.info("%s was not evaluated yet; doing so now", run.path)
        told = evaluate(run, teacher=False if spec is None or _is_object(spec) else spec)
        assert isinstance(told, EvaluateResult)  # policies have records of their own
        evaluation = told
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
        config=config,
        model=run.student,
        model_name=run.student.name,
        skipped={**run.bad_images, **evaluation.skipped},
        steps=int(steps),
    )


def _is_object(spec: Any) -> bool:
    return isinstance(spec, str) and spec.startswith("object:")


def _teachers(runs: list[RunResult]) -> dict[str, ModelRecord]:
    """Spec → each teacher once, with its accuracy where a run of ours tells it."""
    from xdfast.reporting import ModelRecord

    models: dict[str, ModelRecord] = {}
    for run in _with_earlier_stages(runs):
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
    return models


def _with_earlier_stages(runs: list[RunResult]) -> Iterator[RunResult]:
    for run in runs:
        current: RunResult | None = run
        while current is not None:
            yield current
            current = _stage_before(current)


def _students(runs: list[RunResult], records: list[RunRecord]) -> list[ModelRecord]:
    """Each student architecture once: runs of one architecture and size are equally fast. Its accuracy is that of the
    best method, a mean over seeds, not that of the luckiest run."""
    from xdfast.reporting import ModelRecord

    models: dict[tuple[Any, ...], ModelRecord] = {}
    reached: dict[tuple[Any, ...], dict[str, list[float]]] = {}
    for run, record in zip(runs, records, strict=True):
        student = run.student
        key = (student.name, student.image_size, student.num_classes, sum(p.numel() for p in student.parameters()))
        models.setdefault(
            key, ModelRecord(name=student.name, model=student, image_size=student.image_size, role="student")
        )
        if "top1" in record.metrics:
            reached.setdefault(key, {}).setdefault(record.method, []).append(record.metrics["top1"])
    for key, methods in reached.items():
        models[key].top1 = max(sum(values) / len(values) for values in methods.values())
    return list(models.values())
