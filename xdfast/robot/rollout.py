"""Closed loop: a policy in the simulator, many episodes side by side, each with its own seed for world and noise."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xdfast.robot.runner import PolicyRunner
from xdfast.robot.sim.names import task_spec

if TYPE_CHECKING:
    from xdfast.robot.policy import DiffusionPolicy
    from xdfast.robot.vla import CompactVLA, InstructedVLA

__all__ = ["EpisodeResult", "check_task", "default_envs", "film", "rollout"]

log = logging.getLogger("xdfast")


@dataclass
class EpisodeResult:
    """How an episode went.

    Attributes:
        seed: of the world and of the policy's noise.
        success: whether any step solved the task.
        steps: until success or the limit.
        actions: float32 ``[steps, A]`` as executed; played again they give the same episode.
    """

    seed: int
    success: bool
    steps: int
    actions: np.ndarray


def default_envs(episodes: int) -> int:
    """Episodes side by side where nothing is asked for: two per core (while one is simulated the other is decided for)."""
    return max(1, min(episodes, 10, 2 * (os.cpu_count() or 1)))


def check_task(policy: DiffusionPolicy | CompactVLA | InstructedVLA, task: str) -> None:
    """Whether the policy fits the task.

    Raises:
        ValueError: unknown task, or another size of action or proprioception, or a camera it does not have.
    """
    spec, mine = task_spec(task), policy.spec
    problems = []
    if mine.action_dim != spec.action_dim:
        problems.append(f"actions of {mine.action_dim} numbers, the task takes {spec.action_dim}")
    if mine.state_dim != spec.state_dim:
        problems.append(f"proprioception of {mine.state_dim} numbers, the task gives {spec.state_dim}")
    problems += [f"camera {c!r}, the task has {', '.join(spec.cameras)}" for c in mine.cameras if c not in spec.cameras]
    if mine.cameras and mine.image_size[0] != mine.image_size[1]:
        problems.append(f"pictures of {mine.image_size}, the simulator's are square")
    if problems:
        trained = f" (it was trained on {mine.task})" if mine.task else ""
        raise ValueError(f"the policy does not fit {spec.name}{trained}: it has {'; '.join(problems)}")


def rollout(
    policy: DiffusionPolicy | CompactVLA | InstructedVLA,
    task: str,
    seeds: Sequence[int],
    *,
    envs: int | None = None,
    max_steps: int | None = None,
    device: torch.device | str = "cpu",
    on_episode: Callable[[EpisodeResult], None] | None = None,
    on_decision: Callable[[Sequence[int], Sequence[int]], None] | None = None,
) -> list[EpisodeResult]:
    """Runs one episode per seed and returns them in the order of the seeds.

    The world of an episode is a function of its seed, and so is the noise of its decisions: what runs beside it changes
    nothing but rounding (batches always have the same size).

    Args:
        policy: decides. A VLA gets the usual instruction of the task, unless it has one (``vla.instructed(text)``).
        task: name.
        seeds: of the episodes.
        envs: side by side; default: :func:`default_envs`.
        max_steps: longest episode; default: the task's.
        device: of the policy.
        on_episode: called with each as it ends, in order of ending.
        on_decision: called after each pass of the policy, before the world moves on, with the seeds of the episodes it decided
            for and the number of the decision in each, from 0. They are the first rows of the policy's batch, in this order;
            rows after them only fill it up. Such as a :class:`xdfast.robot.vla.paths.PathRecorder`.

    Raises:
        ValueError: the policy does not fit the task; it gave a number that is not finite.
        NoRendererError, WorkerError: of the simulator.
    """
    check_task(policy, task)
    told = _told(policy, task)
    seeds = list(seeds)
    if not seeds:
        return []
    count = min(envs or default_envs(len(seeds)), len(seeds))
    runner = PolicyRunner(told, count, device=device)
    found: dict[int, EpisodeResult] = {}
    with closing(_vector(policy, task, count, max_steps)) as vector:
        waiting = list(range(len(seeds)))  # numbers of episodes
        running: list[int | None] = [waiting.pop(0) for _ in range(count)]
        executed: list[list[np.ndarray]] = [[] for _ in range(count)]
        decisions = [0] * count
        observation, _ = vector.reset(seed=[seeds[number] for number in running if number is not None])
        while any(number is not None for number in running):
            live = [slot for slot, number in enumerate(running) if number is not None]
            noise = torch.cat([_noise(told, seeds[running[s]], decisions[s]) for s in live], dim=1)  # type: ignore[index]
            images = observation["images"][live] if policy.spec.cameras else None
            actions = np.zeros(vector.action_space.shape, np.float32)
            actions[live] = runner.act(images, observation["state"][live], noise)
            if on_decision is not None:
                on_decision([seeds[running[s]] for s in live], [decisions[s] for s in live])  # type: ignore[index]
            observation, _, solved, late, info = vector.step(actions)
            restart = np.zeros(count, dtype=bool)
            next_seeds: list[int | None] = [None] * count
            for slot in live:
                decisions[slot] += 1
                executed[slot].append(actions[slot, : info["executed"][slot]])
                if not (solved[slot] or late[slot]):
                    continue
                number = running[slot]
                assert number is not None
                result = EpisodeResult(
                    seeds[number], bool(solved[slot]), int(info["steps"][slot]), np.concatenate(executed[slot])
                )
                found[number] = result
                if on_episode is not None:
                    on_episode(result)
                executed[slot], decisions[slot] = [], 0
                running[slot] = waiting.pop(0) if waiting else None
                if running[slot] is not None:
                    restart[slot], next_seeds[slot] = True, seeds[running[slot]]  # type: ignore[index]
            if restart.any():
                observation, _ = vector.reset(seed=next_seeds, options={"reset_mask": restart})
    return [found[number] for number in range(len(seeds))]


def film(
    policy: DiffusionPolicy | CompactVLA | InstructedVLA,
    task: str,
    episodes: Sequence[EpisodeResult],
    paths: Sequence[str | Path],
    *,
    max_steps: int | None = None,
) -> list[list[dict[str, np.ndarray]]]:
    """Plays episodes again from their actions, writes them as mp4, and returns what the policy saw at each decision.

    Args:
        policy: whose episodes they are (for its cameras and sizes); it decides nothing here.
        task: as in :func:`rollout`.
        episodes: to film.
        paths: of the videos, ending in ``.mp4``.
        max_steps: as in :func:`rollout`.

    Returns:
        for each episode its observations ``{"images": uint8 [K, T, H, W, 3], "state": [T, P]}``.
    """
    if not episodes:
        return []
    chunk, dim = policy.spec.n_action, policy.spec.action_dim
    seen: list[list[dict[str, np.ndarray]]] = []
    with closing(_vector(policy, task, 1, max_steps)) as vector:
        for episode, path in zip(episodes, paths, strict=True):
            observation, _ = vector.reset(seed=[episode.seed], options={"record": [str(path)]})
            observations = []
            for start in range(0, len(episode.actions), chunk):
                observations.append({key: value[0].copy() for key, value in observation.items()})
                actions = np.zeros((1, chunk, dim), np.float32)
                part = episode.actions[start : start + chunk]
                actions[0, : len(part)] = part
                observation, _, solved, late, info = vector.step(actions)
            if (
                bool(solved[0]) != episode.success
                or int(info["steps"][0]) != episode.steps
                or not (solved[0] or late[0])
            ):
                log.warning("%s: episode %d went another way when it was played again", task, episode.seed)
            seen.append(observations)
    return seen


def _told(policy: DiffusionPolicy | CompactVLA | InstructedVLA, task: str) -> DiffusionPolicy | InstructedVLA:
    """The policy with the task's instruction, where it takes one and has none."""
    any_kind: Any = policy
    return any_kind.for_task(task) if hasattr(policy, "for_task") else any_kind


def _vector(policy: DiffusionPolicy | CompactVLA | InstructedVLA, task: str, count: int, max_steps: int | None) -> Any:
    from xdfast.robot.sim.vector import vector_env

    spec = policy.spec
    options: dict[str, Any] = {"cameras": spec.cameras, "image_size": spec.image_size[0]} if spec.cameras else {}
    return vector_env(task, count, n_obs=spec.n_obs, chunk=spec.n_action, max_steps=max_steps, **options)


def _noise(policy: DiffusionPolicy | InstructedVLA, seed: int, decision: int) -> torch.Tensor:
    mixed = np.random.SeedSequence((seed, decision)).generate_state(1, np.uint64)[0]
    return policy.noise(1, torch.Generator().manual_seed(int(mixed) >> 1))
