"""From finished runs of policies of several tasks to their page: teachers, students that skip layers, baselines."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdfast.pipeline.evaluate_policy import PolicyEvaluation, evaluate_policy, load_policy_evaluation
from xdfast.pipeline.folder import RunResult, load_run
from xdfast.pipeline.policy_config import EvaluatePolicyConfig
from xdfast.pipeline.report_vla_cost import add_costs

if TYPE_CHECKING:
    from xdfast.reporting import PolicyRecord, Report, VLARecord

__all__ = ["vla_records", "vla_report"]

log = logging.getLogger("xdfast")

#: How a routed run chooses its layers → what it is called in tables.
_NAMES = {"learned": "student", "static": "static", "random": "random"}


def vla_report(
    runs: Sequence[RunResult],
    out: str | Path,
    *,
    title: str | None = None,
    batch_sizes: Sequence[int] = (1, 16),
    device: str = "cpu",
    measure_speed: bool = True,
    notes: Sequence[str] = (),
) -> Report:
    """One page of policies of several tasks; see :func:`xdfast.report`.

    The teacher of a student is added if its folder is there. Each student is counted and timed against its teacher once: a
    report that is made again takes the measurement from its JSON, as long as weights, machine and settings are the same.

    Raises:
        FileNotFoundError: a folder holds no finished run.
        ValueError: bad batch sizes.
        OSError: the page cannot be written.
    """
    from xdfast.reporting import build_report
    from xdfast.reporting.adapt import check_size
    from xdfast.reporting.page import target

    for batch in batch_sizes:
        check_size("batch_sizes", batch)
    if measure_speed and not batch_sizes:
        raise ValueError("batch_sizes must hold at least one size, or measure_speed=False")
    _, json_path = target(Path(out))  # now, not after the measurement
    everyone = _with_teachers(runs)
    records = vla_records(everyone)
    add_costs(records, everyone, tuple(batch_sizes) if measure_speed else (), device, json_path)
    return build_report(
        [],
        [],
        out,
        title=title or "Vision-language-action policies",
        notes=list(notes),
        measure_speed=False,
        vlas=records,
    )


def vla_records(runs: Sequence[RunResult]) -> list[VLARecord]:
    """One record per run; one that was evaluated in no task is evaluated in all of its own first, if it can be here."""
    routed = [run for run in runs if _routing(run) != "dense"]
    dense = [run for run in runs if _routing(run) == "dense"]
    taught_by = {_resolved(run.config.get("teacher")) for run in routed}
    teachers = {run.path.resolve() for run in dense} & taught_by
    if not teachers and routed and len(dense) == 1:  # moved since
        teachers = {dense[0].path.resolve()}
    return [_record(run, is_teacher=run.path.resolve() in teachers) for run in runs]


def _routing(run: RunResult) -> str:
    return str(run.config.get("routing") or "dense")


def _resolved(path: Any) -> Path | None:
    return Path(path).expanduser().resolve() if isinstance(path, (str, Path)) else None


def _with_teachers(runs: Sequence[RunResult]) -> list[RunResult]:
    """The runs, and before them the teachers that were not named but lie where the students found them."""
    known = {run.path.resolve() for run in runs}
    added: list[RunResult] = []
    for run in runs:
        path = _resolved(run.config.get("teacher")) if _routing(run) != "dense" else None
        if path is not None and path not in known and (path / "summary.json").is_file():
            teacher = load_run(path)
            if teacher.kind == "vla":
                log.info("%s: its teacher %s is put into the report, too", run.path, path)
                added.append(teacher)
                known.add(path)
    return [*added, *runs]


def _record(run: RunResult, *, is_teacher: bool) -> VLARecord:
    from xdfast.reporting import VLARecord

    remarks: list[str] = []
    evaluations = _evaluations(run, remarks)
    routing, asked = _routing(run), run.config.get("target_flops")
    asked = None if routing == "dense" or asked is None else float(asked)
    policy = run.policy
    unseen = [task for task in policy.spec.tasks if task not in {e.task for e in evaluations}]
    if evaluations and unseen:
        remarks.append(f"was not evaluated in {', '.join(unseen)}")
    rates = [e.metrics["success"] for e in evaluations]
    share = "" if asked is None else f", {100 * asked:g} %"
    return VLARecord(
        name=run.path.name,
        method="teacher" if is_teacher else "dense" if routing == "dense" else f"{_NAMES.get(routing, routing)}{share}",
        seed=run.config.get("seed"),
        kind=run.kind,
        metrics={**run.metrics, **({"success": sum(rates) / len(rates)} if rates else {})},
        history=run.history,
        config=dict(run.config),
        model_name=policy.spec.encoder.architecture or policy.spec.encoder.source,
        steps=int(run.metrics["steps"]) if "steps" in run.metrics else None,
        routing=routing,
        target_flops=asked,
        is_teacher=is_teacher,
        tasks=[_task(run, evaluation) for evaluation in evaluations],
        paths={e.task: e.routing for e in evaluations if getattr(e, "routing", None)},
        always_on=tuple(getattr(policy.layers, "always_on", ())),
        remarks=remarks,
    )


def _task(run: RunResult, evaluation: PolicyEvaluation) -> PolicyRecord:
    from xdfast.reporting import PolicyRecord

    assert evaluation.path is not None  # it was read from a folder
    return PolicyRecord(
        name=run.path.name,
        method="",
        seed=run.config.get("seed"),
        kind="vla",
        metrics=evaluation.metrics,
        task=evaluation.task,
        episodes=evaluation.episodes,
        evaluated=evaluation.settings,
        latency=evaluation.latency,
        videos={key: evaluation.path / file for key, file in evaluation.videos.items()},
    )


def _evaluations(run: RunResult, remarks: list[str]) -> list[PolicyEvaluation]:
    """Those in the run's folder, its own tasks first; made now if there are none."""
    folders = sorted(path.parent for path in (run.path / "tasks").glob("*/evaluation.json"))
    found = [evaluation for folder in folders if (evaluation := load_policy_evaluation(folder)) is not None]
    own = list(run.policy.spec.tasks)
    if found:
        return sorted(found, key=lambda e: own.index(e.task) if e.task in own else len(own))
    return _evaluated(run, own, remarks)


def _evaluated(run: RunResult, tasks: Sequence[str], remarks: list[str]) -> list[PolicyEvaluation]:
    """Every task, or what could be done before the first that cannot be here, and a remark why."""
    from xdfast.robot.sim.gl import NoRendererError
    from xdfast.robot.sim.names import task_spec

    found = []
    for task in tasks:
        log.info("%s was not evaluated in %s yet; doing so now", run.path, task)
        try:
            task_spec(task)
        except ValueError:
            remarks.append(f"was not evaluated in {task}: it is not simulated")
            continue
        try:
            found.append(evaluate_policy(EvaluatePolicyConfig(model=str(run.path), task=task), None, run))
        except (NoRendererError, ImportError) as error:
            remarks.append(f"was not evaluated, and cannot be here: {error}")
            break
    return found
