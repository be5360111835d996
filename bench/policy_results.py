"""Finished and evaluated policy runs as one JSON: ``python -m xdfast.bench.policy_results RUN … > results.json``.

What is kept of a run is what a reader needs to check a success rate: its settings, seconds of training, every episode.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdfast.bench.harness import machine
from xdfast.pipeline import load_run
from xdfast.pipeline.evaluate_policy import load_policy_evaluation
from xdfast.reporting.intervals import wilson_interval
from xdfast.reporting.tables import summarize

__all__ = ["collect"]

_LEFT_OUT = ("out", "device", "workers", "progress", "tensorboard", "overwrite")


def collect(folders: Sequence[str | Path]) -> dict[str, Any]:
    """Runs, and one row for each (task, encoder): mean over training seeds and Wilson's interval of all episodes.

    Raises:
        ValueError: a run that was not evaluated.
    """
    runs: list[dict[str, Any]] = []
    for folder in folders:
        run, found = load_run(folder), load_policy_evaluation(Path(folder))
        if found is None:
            raise ValueError(f"{folder} was not evaluated: xdfast evaluate --model {folder}")
        settings = {k: v for k, v in run.config.items() if k not in _LEFT_OUT}
        runs.append(
            {
                "name": run.path.name,
                "task": found.task,
                "encoder": run.path.name.partition("-")[0],
                "seed": run.config["seed"],
                "success": found.metrics["success"],
                "solved": int(found.metrics["solved"]),
                "episodes": int(found.metrics["episodes"]),
                "train_seconds": run.metrics["seconds"],
                "settings": settings,
                "steps_of_episodes": [[e["seed"], e["success"], e["steps"]] for e in found.episodes],
            }
        )
    rows = []
    for task, encoder in dict.fromkeys((run["task"], run["encoder"]) for run in runs):
        mine = [run for run in runs if (run["task"], run["encoder"]) == (task, encoder)]
        solved, episodes = sum(run["solved"] for run in mine), sum(run["episodes"] for run in mine)
        told = summarize(run["success"] for run in mine)
        rows.append(
            {
                "task": task,
                "encoder": encoder,
                "runs": len(mine),
                "success": told.mean,
                "half_width": told.half_width,
                "solved": solved,
                "episodes": episodes,
                "wilson": wilson_interval(solved, episodes),
                "train_seconds": summarize(run["train_seconds"] for run in mine).mean,
            }
        )
    return {"machine": machine(), "rows": rows, "runs": runs}


if __name__ == "__main__":
    print(json.dumps(collect(sys.argv[1:]), indent=1))
