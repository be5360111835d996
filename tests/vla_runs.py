"""Finished runs of VLAs as ``finetune``, ``distill`` and ``evaluate`` leave them: real weights, made-up episodes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vla_parts import TASKS, make_vla

from xdfast.pipeline.config import save_yaml
from xdfast.pipeline.evaluate_policy import PolicyEvaluation
from xdfast.pipeline.folder import RunResult, load_run
from xdfast.reporting.intervals import wilson_interval
from xdfast.robot.vla import save_vla
from xdfast.robot.vla.students import derive_student


def write_teacher(
    folder: Path, *, seed: int = 0, tasks=TASKS, layers: int = 4, steps: int = 40, **spec: Any
) -> RunResult:
    """A dense VLA, not trained."""
    torch.manual_seed(seed)
    vla = make_vla(layers=layers, tasks=tuple(tasks), **spec)
    config = {"tasks": list(tasks), "model": "test_resnet", "steps": steps, "seed": seed}
    return _write(folder, vla, config, history(steps, ["loss"], seed=seed))


def write_student(
    folder: Path, teacher: RunResult, *, routing: str = "learned", target: float = 0.5, seed: int = 0, steps: int = 40
) -> RunResult:
    """Routed layers of a teacher's weights."""
    base = teacher.policy
    states = [torch.randn(2, base.num_tokens, base.dim) * (i + 1) for i in range(base.num_layers + 1)]
    vla = derive_student(base, target, routing=routing, states=states, seed=seed)
    config = {
        "teacher": str(teacher.path), "target_flops": target, "routing": routing, "steps": steps, "seed": seed,
        "tasks": list(base.spec.tasks),
    }  # fmt: skip
    terms = ["loss", "policy", "cosine", "relation", "to_target", "to_teacher", "to_previous", "budget", "fraction"]
    return _write(folder, vla, config, history(steps, terms if routing == "learned" else ["loss"], target, seed=seed))


def history(steps: int, terms: list[str], target: float = 0.5, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; ``fraction`` goes from 1 to the target."""
    rng, rows = np.random.default_rng(seed), []
    for step in range(2, steps + 1, 2):
        done = step / steps
        row: dict[str, Any] = {"kind": "train", "epoch": 0, "step": step}
        for number, term in enumerate(terms):
            value = (1.5 - 0.1 * number) * np.exp(-3 * done) + 0.05 + 0.02 * rng.random()
            if term == "fraction":
                value = target + (1 - target) * np.exp(-8 * done)
            if term == "budget":
                value = max(0.0, (1 - 2 * done)) ** 2
            row["loss" if term == "loss" else f"loss_{term}"] = float(value)
        rows.append(row | {"lr": 1e-3, "images_per_s": 50.0, "time": float(step)})
    return rows


def evaluated(
    run: RunResult,
    solved: dict[str, int],
    of: int = 10,
    *,
    routing: bool | None = None,
    videos: int = 0,
    first: int = 0,
) -> RunResult:
    """Leaves in the folder what ``evaluate`` writes: the first ``solved`` episodes of each task, moved by ``first``, succeed."""
    routed = run.config.get("routing") is not None if routing is None else routing
    for number, (task, count) in enumerate(solved.items()):
        env = task.rpartition("/")[2]
        folder = run.path / "tasks" / env
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        episodes = [
            {"seed": 100 + i, "success": (i - first) % of < count, "steps": 40 + i if (i - first) % of < count else 200}
            for i in range(of)
        ]
        low, high = wilson_interval(count, of)
        metrics = {
            "success": count / of,
            "success_low": low,
            "success_high": high,
            "episodes": float(of),
            "solved": float(count),
        }
        files = {}
        for episode in episodes[:videos]:
            name = f"{'success' if episode['success'] else 'failure'}-{episode['seed']}"
            files[name] = f"videos/{name}.mp4"
            (folder / files[name]).write_bytes(b"video")
        told = PolicyEvaluation(
            run.path.name, folder, task, metrics, episodes, files, settings={"which": "last", "max_steps": None}
        ).to_dict()
        told["routing"] = routing_of(run, number) if routed else {}
        (folder / "evaluation.json").write_text(json.dumps(told), encoding="utf-8")
    return run


def routing_of(run: RunResult, number: int, decisions: int = 400) -> dict[str, Any]:
    """Which layers ran: made up, but the figures agree with each other."""
    vla = run.policy
    layers, kind = vla.num_layers, run.config["routing"]
    costs = vla.layers.costs(vla.num_tokens).sum(1).numpy()
    rng = np.random.default_rng(10 * run.config["seed"] + number)
    share = float(run.config["target_flops"])
    inner = (share * layers - 2) / max(layers - 2, 1)
    when = np.arange(decisions) / decisions
    if kind == "static":
        chance = np.tile([float(layer % 2 == 0) for layer in range(layers)], (decisions, 1))
    elif kind == "random":
        chance = np.full((decisions, layers), inner)
    else:  # early layers while it approaches, late ones at the object; a little other in each task
        slope = np.linspace(1, -1, layers) * (1 + 0.2 * number)
        chance = np.clip(
            inner + 0.9 * slope * (0.5 - when[:, None]) + 0.4 * np.sin(3 * np.arange(layers) + number), 0, 1
        )
        chance = np.round(3 * chance) / 3
    on = rng.random((decisions, layers)) < chance
    on[:, [0, -1]] = True
    bins = (10 * when).astype(int)
    counted = Counter("".join("1" if x else "0" for x in row) for row in on)
    executed = float((on * costs).sum(1).mean())
    return {
        "layers": layers,
        "decisions": decisions,
        "dense": float(costs.sum()),
        "nominal": executed,
        "executed": executed,
        "fraction": executed / float(costs.sum()),
        "use": on.mean(0).tolist(),
        "use_over_time": [on[bins == b].mean(0).tolist() for b in range(10)],
        "paths": [[path, count] for path, count in counted.most_common(20)],
        "distinct": len(counted),
    }


def _write(folder: Path, vla: Any, config: dict[str, Any], rows: list[dict[str, Any]]) -> RunResult:
    folder.mkdir(parents=True)
    save_vla(vla, folder / "vla")
    save_yaml(folder / "config.yaml", {"kind": "vla", **config, "weights": {}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    metrics = {"steps": config["steps"], "seconds": 1.0}
    summary = {"kind": "vla", "metrics": metrics, "bad_images": {}}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return load_run(folder)
