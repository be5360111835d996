"""What trainings of several tasks share: each task's demonstrations, and success in each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from xdfast import distributed
from xdfast.pipeline.finetune_policy import open_demonstrations
from xdfast.pipeline.policy_config import PolicyConfig
from xdfast.robot.demos.open import Demonstrations, open_demos
from xdfast.robot.rollout import rollout
from xdfast.robot.sim.names import task_spec

__all__ = ["evaluate_tasks", "task_demonstrations"]

log = logging.getLogger("xdfast")


def task_demonstrations(
    demos: str,
    task: str,
    cameras: tuple[str, ...],
    out: Path,
    *,
    demo_seed: int = 0,
    demo_noise: float = 0.0,
    image_size: int | None = None,
    workers: int | str = "auto",
    progress: bool = True,
) -> Demonstrations:
    """Of one task: of its expert, if ``demos`` is a number, or from the folder in ``demos`` that is named after the task.

    Raises:
        ValueError: no such folder.
        DemoError: of the files.
    """
    if not demos.isdigit():
        spec, root = task_spec(task), Path(demos).expanduser()
        found = [root / name for name in (spec.env, spec.env.removesuffix("-v3")) if (root / name).exists()]
        if not found:
            raise ValueError(f"{root} has no folder {spec.env} with the demonstrations of {task}")
        return open_demos(found[0], cameras=cameras)
    one = PolicyConfig(
        task=task, out=str(out), demos=demos, demo_seed=demo_seed, demo_noise=demo_noise, cameras=cameras,
        image_size=image_size, workers=workers, progress=progress,  # type: ignore[arg-type]
    )  # fmt: skip
    return open_demonstrations(one, out)


def evaluate_tasks(vla: Any, tasks: Sequence[str], config: Any, device: torch.device) -> dict[str, float]:
    """Success in each task and their mean, from the episodes of rank 0.

    Args:
        vla: with ``for_task``.
        tasks: names.
        config: has ``episodes``, ``eval_seed``, ``envs``, ``max_steps``.
        device: of the policy.
    """
    rates = [0.0] * len(tasks)
    if distributed.is_main():
        seeds = range(config.eval_seed, config.eval_seed + config.episodes)
        for number, task in enumerate(tasks):
            results = rollout(
                vla.for_task(task), task, seeds, envs=config.envs, max_steps=config.max_steps, device=device
            )
            rates[number] = sum(result.success for result in results) / len(results)
            log.info("%s: %d of %d episodes solved", task, sum(r.success for r in results), len(results))
    rates = distributed.sum_over_ranks(rates, device)
    by_task = {f"success_{task_spec(task).env}": rate for task, rate in zip(tasks, rates, strict=True)}
    return {"success": sum(rates) / len(rates), **by_task}
