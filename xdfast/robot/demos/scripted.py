"""One episode of a scripted expert, and the worker process that runs many of them."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xdfast.robot.demos.episode import Episode
from xdfast.robot.sim.task import Task, TaskSpec

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

__all__ = ["Attempt", "Plan", "expert_episode", "run_worker"]


@dataclass(frozen=True)
class Plan:
    """What a worker is to collect; pickled to it.

    Attributes:
        spec: the task.
        folder: where episodes go.
        cameras: names.
        image_size: height and width in pixels.
        seed: the first; the episode of seed s has index ``s - seed``.
        tail: steps recorded after the first success.
        noise: standard deviation added to the executed actions.
        max_steps: an episode is given up after so many.
        facts: kept with the demonstrations.
    """

    spec: TaskSpec
    folder: Path
    cameras: tuple[str, ...]
    image_size: int
    seed: int
    tail: int
    noise: float
    max_steps: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """What came of a seed: whether it was solved (then the episode is on the disk), and how many frames were drawn."""

    seed: int
    solved: bool
    frames: int


def expert_episode(
    task: Task, seed: int, *, cameras: Sequence[str], tail: int, noise: float, max_steps: int
) -> Episode | None:
    """Lets the scripted expert solve the episode of ``seed``.

    Args:
        task: started.
        seed: decides the episode and the noise.
        cameras: to record.
        tail: steps to go on after the first success, so that a policy learns to stay there.
        noise: standard deviation of what is added to the expert's actions when they are executed. Recorded is what the
            expert wanted: a policy sees how to come back from small errors.
        max_steps: the episode ends then at the latest.

    Returns:
        The episode, or None if it was not solved within ``max_steps``.
    """
    task.reset(seed)
    random = np.random.default_rng((seed, 1))
    images: dict[str, list[np.ndarray]] = {camera: [] for camera in cameras}
    states: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    successes: list[bool] = []
    info: dict[str, list[float]] = {}
    end = max_steps
    while len(actions) < end:
        for camera, frames in images.items():
            frames.append(task.frame(camera))
        states.append(task.state())
        action = task.expert()
        actions.append(action)
        executed = action + noise * random.standard_normal(action.shape) if noise else action
        result = task.step(executed)
        if result.success and not any(successes):
            end = min(max_steps, len(actions) + tail)
        successes.append(result.success)
        for name, value in result.info.items():
            if name != "success":
                info.setdefault(name, []).append(value)
    if not any(successes):
        return None
    return Episode(
        images={camera: np.stack(frames) for camera, frames in images.items()},
        state=np.stack(states).astype(np.float32),
        actions=np.stack(actions).astype(np.float32),
        success=np.array(successes, dtype=bool),
        info={name: np.array(values, dtype=np.float32) for name, values in info.items()},
        seed=seed,
    )


def run_worker(plan: Plan, pipe: Connection) -> None:
    """The body of a worker process: seeds come through ``pipe``, an :class:`Attempt` goes back for each; None ends it.

    What is solved is on the disk before it is reported. An exception goes back as its text, and the worker ends.
    """
    from xdfast.robot.demos.format import DemoWriter
    from xdfast.robot.sim.make import make_task
    from xdfast.robot.sim.processes import become_worker

    become_worker()
    try:
        task = make_task(plan.spec, plan.image_size)
        writer = open_writer(plan, DemoWriter)
        pipe.send(None)  # ready
        while (seed := pipe.recv()) is not None:
            episode = expert_episode(
                task, seed, cameras=plan.cameras, tail=plan.tail, noise=plan.noise, max_steps=plan.max_steps
            )
            if episode is None:
                writer.record_failure(seed)
            else:
                writer.write(episode, index=seed - plan.seed)
            steps = plan.max_steps if episode is None else len(episode)
            pipe.send(Attempt(seed, episode is not None, steps * len(plan.cameras)))
        task.close()
    except (EOFError, ConnectionError):  # nobody listens any more
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")


def open_writer(plan: Plan, writer: type) -> Any:
    """The DemoWriter of a plan; every process of a collection opens the same."""
    return writer(
        plan.folder,
        task=plan.spec.name,
        cameras={camera: (plan.image_size, plan.image_size) for camera in plan.cameras},
        fps=plan.spec.fps,
        action_dim=plan.spec.action_dim,
        state_dim=plan.spec.state_dim,
        facts=plan.facts,
    )
