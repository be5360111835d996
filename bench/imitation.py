"""How well policies of several tasks imitate demonstrations that they were not trained on.

    python -P -m xdfast.bench.imitation runs/vla runs/eighth … --out held_out.json

The expert's episodes of other seeds than the training's are collected beside each run, and kept. Next to success in closed loop
this says whether a policy that imitates better also acts better.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from xdfast.pipeline.actdistill_task import embedded
from xdfast.pipeline.vla_tasks import task_demonstrations
from xdfast.robot.vla import MultiTaskWindows, ViewLoader, load_vla

__all__ = ["held_out", "main", "measure", "options"]

#: Every so many samples: neighbours in time are nearly the same.
_STRIDE = 3


def held_out(run: str, *, demos: str, seed: int) -> tuple[Any, list[tuple[str, Iterator[Any]]]]:
    """A policy, and of each of its tasks the samples of demonstrations of other seeds, in batches, as the policy sees them.

    Args:
        run: folder of a VLA or of a student of one.
        demos: episodes of the expert for each task, a number; or a folder with a folder of demonstrations for each task.
        seed: of the first of the expert's.

    Returns:
        The policy in eval mode; task → every third sample, in batches with actions and the task's usual instruction.

    Raises:
        ValueError: no demonstrations of one of the policy's tasks.
        FileNotFoundError: no such run.
    """
    vla = load_vla(run).eval()
    spec, tasks = vla.spec, list(vla.spec.tasks)
    opened = [
        task_demonstrations(
            demos, task, spec.cameras, Path(run), demo_seed=seed, image_size=spec.image_size[0], progress=False
        )
        for task in tasks
    ]
    data = MultiTaskWindows(opened, spec.cameras, horizon=spec.horizon, image_size=spec.image_size, tasks=tasks)
    loader = ViewLoader(data, vla.tokenizer, spec.text_length, 64, 1, views=1, shift=0)

    def batches(first: int, end: int) -> Iterator[Any]:
        for ids in torch.arange(first, end, _STRIDE).split(64):
            yield loader.read(ids, torch.zeros_like(ids))

    return vla, [(task, batches(*span)) for task, span in zip(tasks, pairwise(data.starts.tolist()))]


@torch.no_grad()
def measure(run: str, *, demos: str = "6", seed: int = 5000) -> dict[str, Any]:
    """The policy's own loss of each task on demonstrations of other seeds, with their usual instruction and pictures as they are.

    Args:
        run, demos, seed: as of :func:`held_out`, which says what is raised.

    Returns:
        ``loss`` by task, their mean, and on how many samples.
    """
    vla, tasks = held_out(run, demos=demos, seed=seed)
    losses: dict[str, float] = {}
    count = 0
    for task, batches in tasks:
        total = samples = 0.0
        for batch in batches:
            total += float(vla.chunk_loss(vla.layers(embedded(vla, batch)), batch.actions)) * len(batch.actions)
            samples += len(batch.actions)
        losses[task] = total / samples
        count += int(samples)
    return {"run": Path(run).name, "loss": losses, "mean": sum(losses.values()) / len(losses), "samples": count}


def options(description: str) -> argparse.ArgumentParser:
    """The command line of a program that looks at runs through :func:`held_out`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--demos", default="6", help="of each task: a number of episodes, or a folder")
    parser.add_argument("--seed", type=int, default=5000)
    parser.add_argument("--out", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a row for each run, and writes all to ``--out``."""
    given = options(__doc__.splitlines()[0]).parse_args(argv)
    rows = []
    for run in given.runs:
        rows.append(measure(run, demos=given.demos, seed=given.seed))
        print(f"{rows[-1]['run']}: {rows[-1]['mean']:.4f} on {rows[-1]['samples']} samples")
    if given.out is not None:
        result = {"demos": given.demos, "seed": given.seed, "stride": _STRIDE, "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
