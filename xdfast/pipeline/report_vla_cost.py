"""What decisions of routed students cost beside their teacher's, for a report: counted and measured once, kept in its JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xdfast.models import weights_hash
from xdfast.pipeline.finetune_policy import expert_folder
from xdfast.pipeline.folder import RunResult
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.open import open_demos
from xdfast.robot.sim.names import task_spec
from xdfast.robot.vla import CompactVLA
from xdfast.robot.vla.cost import count_vla, drawn_observations, measure_vla
from xdfast.robot.vla.interface import Observation
from xdfast.robot.windows import Windows

if TYPE_CHECKING:
    from xdfast.reporting import VLARecord

__all__ = ["add_costs"]

log = logging.getLogger("xdfast")

#: Observations that are decided about, all tasks together.
_OBSERVATIONS = 64


def add_costs(
    records: Sequence[VLARecord], runs: Sequence[RunResult], batches: tuple[int, ...], device: str, json_path: Path
) -> None:
    """Sets ``cost`` of the first run of every group of routed ones.

    Args:
        records: of the report; those whose cost cannot be told get a remark.
        runs: the same runs.
        batches: sizes to measure; none: FLOPs are counted, nothing is timed.
        device: on which they are measured.
        json_path: of the report; measurements in it are used where weights, machine and settings are the same.
    """
    from xdfast.reporting.vla_tables import groups_of, vlas_of

    by_record = {id(record): run for record, run in zip(records, runs, strict=True)}
    teachers = [(record, by_record[id(record)]) for record in records if record.is_teacher]
    before = _measured_before(json_path)
    groups, _ = groups_of(records)
    for group in groups:
        record = vlas_of(group)[0]
        if record.routing == "dense":
            continue
        teacher = _teacher_of(record, teachers)
        if teacher is None:
            record.remarks.append("its teacher is not in the report, so what it saves was not counted or measured")
            continue
        try:
            record.cost = _cost(by_record[id(record)], teacher, batches, device, before)
        except Exception as error:  # a tracer can fail in any way; the rest of the report is still good
            first = (str(error) or type(error).__name__).splitlines()[0]
            record.remarks.append(f"the cost of a decision could not be told: {first}")


def _teacher_of(record: VLARecord, teachers: Sequence[tuple[VLARecord, RunResult]]) -> RunResult | None:
    asked = Path(str(record.config.get("teacher"))).expanduser().resolve()
    named = [run for _, run in teachers if run.path.resolve() == asked]
    found = named or [run for _, run in teachers]
    return found[0] if found and (named or len(teachers) == 1) else None


def _cost(
    run: RunResult, teacher: RunResult, batches: tuple[int, ...], device: str, before: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """``counted`` and ``measured`` as :mod:`xdfast.reporting.vla_cost` reads them, and ``measurement`` for the JSON."""
    from xdfast.reporting.adapt import device_name

    dense, routed = teacher.policy, run.policy
    seen = _observations(dense, [teacher, run])
    told = "moments of the demonstrations" if seen is not None else "observations drawn at random"
    seen = drawn_observations(dense, _OBSERVATIONS) if seen is None else seen
    if not batches:
        return {"counted": _counted(count_vla(dense, routed, seen)), "measured": [], "machine": "", "measurement": None}
    place = torch.device(device)
    key = {
        "teacher": weights_hash(dense),
        "student": weights_hash(routed),
        "route": [run.config.get(name) for name in ("routing", "target_flops", "seed")],  # chance has no weights
        "batches": list(batches),
        "device": f"{place.type}, {device_name(place)}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "observations": told,
    }
    result = next((row["result"] for row in before if row["key"] == key), None)
    if result is None:
        log.info("measuring %s beside its teacher %s", run.path.name, teacher.path.name)
        result = measure_vla(dense, routed, batches, observations=seen, device=place)
    share = result["flops"]["fraction"]
    measured = [
        {"batch": row["batch"], "fraction": share, "stack": row["stack"], "decision": row["decision"]}
        for row in result["batches"]
    ]
    threads = "" if place.type == "cuda" else f", {result['threads']} thread{'s' if result['threads'] != 1 else ''}"
    return {
        "counted": _counted(result["flops"]),
        "measured": measured,
        "machine": f"{device_name(place)}{threads}; {len(seen.images)} {told}",
        "measurement": {"run": run.path.name, "teacher": teacher.path.name, "key": key, "result": result},
    }


def _counted(flops: dict[str, Any]) -> dict[str, Any]:
    return {part: flops[part] for part in ("stack", "decision")}


def _measured_before(json_path: Path) -> list[dict[str, Any]]:
    """Measurements in the JSON of an earlier report of that name."""
    try:
        found = json.loads(json_path.read_text(encoding="utf-8"))["vla"]["measurements"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [row for row in found if isinstance(row, dict) and {"key", "result"} <= row.keys()]


def _observations(vla: CompactVLA, runs: Sequence[RunResult]) -> Observation | None:
    """Moments of the demonstrations that one of the runs learned from, all tasks equally often, told their usual instructions;
    None where the demonstrations are gone."""
    for run in runs:
        try:
            return _moments(vla, run)
        except (DemoError, OSError, ValueError, KeyError) as error:
            log.debug("no observations from the demonstrations of %s: %s", run.path, error)
    return None


def _moments(vla: CompactVLA, run: RunResult) -> Observation:
    spec, given = vla.spec, str(run.config["demos"])
    each = -(-_OBSERVATIONS // len(spec.tasks))
    images, states, told = [], [], []
    for task in spec.tasks:
        env = task_spec(task).env
        if given.isdigit():
            seed, noise = run.config["demo_seed"], run.config.get("demo_noise", 0.0)
            folder = expert_folder(run.path, env, spec.image_size[0], spec.cameras, seed, noise)
        else:
            root = Path(given).expanduser()
            folder = next(
                (root / name for name in (env, env.removesuffix("-v3")) if (root / name).exists()), root / env
            )
        windows = Windows(
            open_demos(folder, limit=2, cameras=spec.cameras),
            spec.cameras, n_obs=1, horizon=spec.horizon, image_size=spec.image_size,
        )  # fmt: skip
        rows = torch.linspace(0, len(windows) - 1, each).round().long()
        images.append(windows.images[rows][:, :, None])
        states.append(windows.state[rows][:, None])
        told.append(vla.for_task(task).instruction.expand(each, -1))
    return Observation(torch.cat(images), torch.cat(states), torch.cat(told))
