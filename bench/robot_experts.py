"""How often MetaWorld's scripted experts solve their tasks, as the table of docs/robot-tasks.md.

    python -m xdfast.bench.robot_experts 50 > docs/robot-tasks.md

An episode counts as in a collection: solved at any step, within the task's limit. No pictures are drawn.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import sys
from typing import Any

from xdfast.robot.sim.make import make_task
from xdfast.robot.sim.names import SUITES, task_spec

__all__ = ["rate"]

_HEAD = """# Simulated tasks

What `xdfast.robot.sim` knows by name. `task_spec("drawer-open")` tells what a task is, `suite("metaworld-easy")` lists a
suite, `vector_env("drawer-open", 4)` starts four of them, `collect("drawer-open", 10, "demos")` has the scripted expert
solve it ten times.

Proprioception of MetaWorld is the end effector and both fingers (9 numbers, metres), of Adroit the hand's 24 joint angles
(radians). Neither tells where an object or the goal is. An action of MetaWorld is the end effector's shift (3 numbers, 1 is a
centimetre) and the gripper; of Adroit a target for every actuator (door 28, hammer 26, pen 24, relocate 30).
Adroit has no scripted experts: bring demonstrations.

## MetaWorld's experts

Solved of {count} episodes (seeds 0-{last}) within the limit of steps; {versions}. The difficulty classes are 3D Diffusion
Policy's. "to success": steps to the first success, median and 95 % quantile of the solved episodes.
Made by `python -m xdfast.bench.robot_experts {count}`.

| task | class | solved | to success | limit | instruction |
|---|---|---:|---:|---:|---|"""


def rate(name: str, count: int) -> tuple[list[int], list[int]]:
    """(steps to the first success of the episodes solved, seeds not solved) of seeds 0 to ``count - 1``."""
    task: Any = make_task(name, 8)
    steps, failed = [], []
    for seed in range(count):
        task.reset(seed)
        for step in range(1, task.spec.max_steps + 1):
            if task.step(task.expert()).success:
                steps.append(step)
                break
        else:
            failed.append(seed)
    task.close()
    return steps, failed


def main() -> None:
    """Prints the document; progress goes to stderr."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("metaworld", "mujoco"))
    print(_HEAD.format(count=count, last=count - 1, versions=versions))
    for suite in ("easy", "medium", "hard", "very-hard"):
        for name in SUITES[f"metaworld-{suite}"]:
            spec = task_spec(name)
            steps, failed = rate(name, count)
            late = sorted(steps)[min(len(steps) - 1, int(0.95 * len(steps)))] if steps else 0
            about = f"{statistics.median(steps):.0f}, {late}" if steps else "-"
            print(
                f"| {spec.env} | {suite} | {len(steps)}/{count} | {about} | {spec.max_steps} | {spec.instruction} |",
                flush=True,
            )
            print(f"{spec.env} {len(steps)}/{count}; not: {failed}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
