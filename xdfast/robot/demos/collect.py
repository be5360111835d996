"""Demonstrations of scripted experts, rendered in parallel; interrupted at any time, continued by the same call."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import multiprocessing.connection
import os
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xdfast.progress import ProgressLine, clock
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.format import DemoWriter
from xdfast.robot.demos.scripted import Attempt, Plan, open_writer, run_worker
from xdfast.robot.sim.make import check_cameras, check_image_size
from xdfast.robot.sim.names import task_spec
from xdfast.robot.sim.processes import WorkerError, cause_of_death, spawning

__all__ = ["Collected", "collect"]


@dataclass(frozen=True)
class Collected:
    """What a collection came to.

    Attributes:
        folder: of the demonstrations.
        episodes: solved ones in it, earlier sessions' included.
        failed: seeds the expert did not solve.
        frames: drawn in this session.
        seconds: this session took, the start of the workers included.
        workers: processes of this session.
    """

    folder: Path
    episodes: int
    failed: tuple[int, ...]
    frames: int
    seconds: float
    workers: int


def collect(
    task: str,
    episodes: int,
    out: str | Path,
    *,
    image_size: int = 96,
    cameras: tuple[str, ...] | None = None,
    seed: int = 0,
    workers: int | str = "auto",
    tail: int = 20,
    noise: float = 0.0,
    max_steps: int | None = None,
    give_up: int = 20,
    max_attempts: int | None = None,
    timeout: float = 300.0,
    progress: bool = True,
) -> Collected:
    """Lets a task's scripted expert solve it ``episodes`` times and keeps what was seen and done.

    Kept are the first ``episodes`` seeds from ``seed`` upward that the expert solves: the same set, bit for bit, for any
    number of workers and any number of interruptions. Every episode is on the disk as soon as it is done; the same call
    again goes on where an interrupted one stopped, and with more ``episodes`` it adds to them.

    Args:
        task: name, see :func:`xdfast.robot.sim.names.task_spec`.
        episodes: to have in the folder at the end.
        out: folder; docs/demonstrations.md describes what is written.
        image_size: height and width of the frames, in pixels.
        cameras: names; None is the task's default camera.
        seed: of the first episode.
        workers: processes, or "auto": one a usable core.
        tail: steps recorded after the first success.
        noise: standard deviation added to the actions that are executed (not to those recorded); actions span [-1, 1].
        max_steps: an episode not solved by then is dropped; None is the task's own limit.
        give_up: consecutive seeds without success after which the collection ends in an error.
        max_attempts: seeds tried at most; None is ten times ``episodes``, and at least 100.
        timeout: seconds an episode may take.
        progress: a bar with the time left on a terminal, plain lines elsewhere.

    Raises:
        ValueError: an unknown task or camera, a number out of range, or a task without an expert.
        DemoError: the folder holds demonstrations of other settings, is being written by another collection or cannot be
            written; or the expert fails too often.
        WorkerError: a worker died or failed; what was collected stays.
        NoRendererError: nothing can render here.
    """
    plan = _plan(task, out, image_size, cameras, seed, tail, noise, max_steps)
    for name, value in (("episodes", episodes), ("give_up", give_up), ("max_attempts", max_attempts)):
        if value is not None:
            _at_least(name, value, 1)
    limit = max(10 * episodes, 100) if max_attempts is None else max_attempts
    count = _worker_count(workers, episodes)
    began = time.monotonic()
    writer: DemoWriter = open_writer(plan, DemoWriter)
    with _alone(plan.folder):
        todo = _Todo(seed, episodes, give_up, limit, {index + seed for index in writer.done}, set(writer.failed))
        frames = 0
        if todo.wanted:
            title = f"collect {plan.spec.name}"
            line = ProgressLine(title, episodes, todo.collected, enabled=progress)
            try:
                attempts = _attempts(plan, todo, min(count, len(todo.wanted)), timeout)
                with contextlib.closing(attempts):  # Ctrl-C here ends the workers now, not when memory is tidied up
                    for attempt in attempts:
                        frames += attempt.frames
                        rate = frames / (time.monotonic() - began)
                        failures = f", {len(todo.failed)} seeds failed" if todo.failed else ""
                        line.update(todo.collected, f"{rate:.0f} frames/s{failures}")
            finally:
                seconds = time.monotonic() - began
                line.close(f"{todo.collected}/{episodes} episodes, {frames} frames in {clock(seconds)}: {plan.folder}")
    failed = tuple(sorted(todo.failed))
    return Collected(plan.folder, todo.collected, failed, frames, time.monotonic() - began, count)


def _plan(
    task: str,
    out: str | Path,
    image_size: int,
    cameras: tuple[str, ...] | None,
    seed: int,
    tail: int,
    noise: float,
    max_steps: int | None,
) -> Plan:
    spec = task_spec(task)
    if not spec.has_expert:
        raise ValueError(
            f"{spec.name} has no scripted expert to collect from: bring demonstrations (xdfast.robot.demos reads LeRobot, "
            "diffusion_policy and robomimic datasets)"
        )
    check_image_size(image_size)
    names = check_cameras(spec, cameras)
    _at_least("seed", seed, 0)
    _at_least("tail", tail, 0)
    if not 0 <= noise <= 1:
        raise ValueError(f"noise={noise!r} must be from 0 to 1: actions span [-1, 1]")
    steps = spec.max_steps if max_steps is None else _at_least("max_steps", max_steps, 1)
    packages = ("mujoco", "metaworld")
    facts: dict[str, Any] = {
        "expert": "scripted",
        "first_seed": seed,
        "tail": tail,
        "noise": float(noise),
        "max_steps": steps,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
    return Plan(spec, Path(out).expanduser(), names, image_size, seed, tail, float(noise), steps, facts)


def _at_least(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
    return value


def _worker_count(workers: int | str, episodes: int) -> int:
    if workers == "auto":
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(usable, episodes)
    if isinstance(workers, str):
        raise ValueError(f'workers={workers!r} must be "auto" or a number of processes')
    return _at_least("workers", workers, 1)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two collections into one folder would do the same work twice."""
    with open(folder / ".collecting", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DemoError(
                f"another collection into {folder} is running; wait for it or choose another folder"
            ) from None
        yield


class _Todo:
    """Which seed is next.

    Given out are only the first ``episodes`` seeds that are not known to have failed. Whatever the others come to, each of
    them is among the first ``episodes`` that succeed, so nothing is collected that is not kept.
    """

    def __init__(
        self, first: int, episodes: int, give_up: int, max_attempts: int, solved: set[int], failed: set[int]
    ) -> None:
        self.first, self.episodes, self.give_up, self.max_attempts = first, episodes, give_up, max_attempts
        self.solved, self.failed = solved, failed
        self._given: set[int] = set()

    @property
    def collected(self) -> int:
        return len(self.solved)

    @property
    def wanted(self) -> list[int]:
        """Seeds still to be solved among the first that have not failed, in order."""
        seeds: list[int] = []
        seed = self.first
        while len(seeds) < self.episodes:
            if seed not in self.failed:
                seeds.append(seed)
            seed += 1
        return [seed for seed in seeds if seed not in self.solved]

    def take(self) -> int | None:
        """The next seed for a free worker; None while there is none to give."""
        for seed in self.wanted:
            if seed not in self._given:
                self._check(seed)
                self._given.add(seed)
                return seed
        return None

    def done(self, attempt: Attempt) -> None:
        """Takes in what came of a seed."""
        (self.solved if attempt.solved else self.failed).add(attempt.seed)

    def _check(self, seed: int) -> None:
        """Raises DemoError when the expert fails so often that going on makes no sense."""
        before = range(max(self.first, seed - self.give_up), seed)
        said = f"; solved so far: {len(self.solved)} of {len(self.solved) + len(self.failed)} seeds"
        if len(before) == self.give_up and all(s in self.failed for s in before):
            raise DemoError(
                f"the expert failed on {self.give_up} seeds in a row ({before[0]}-{before[-1]}){said}. Less noise or more "
                "max_steps may help; give_up= allows more"
            )
        if seed - self.first >= self.max_attempts:
            raise DemoError(
                f"{self.max_attempts} seeds were tried and the expert solved too few for {self.episodes} episodes{said}. "
                "max_attempts= allows more"
            )


def _attempts(plan: Plan, todo: _Todo, count: int, timeout: float) -> Generator[Attempt, None, None]:
    """Runs the seeds of ``todo`` in ``count`` workers and yields what comes of each, in the order they finish."""
    pipes: list[Any] = []
    processes: list[Any] = []
    with spawning() as context:
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=run_worker, args=(plan, theirs), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
    working = {pipe: time.monotonic() for pipe in pipes}  # since when; a worker says None once it is ready
    seeds: dict[Any, int | None] = dict.fromkeys(pipes)
    try:
        while working:
            ready: list[Any] = multiprocessing.connection.wait(list(working), timeout=1.0)
            for pipe in ready:
                worker = pipes.index(pipe)
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionError):
                    processes[worker].join(5)
                    how = cause_of_death(processes[worker].exitcode)
                    raise WorkerError(_lost(plan, worker, seeds[pipe], how)) from None
                if isinstance(message, str):
                    raise WorkerError(_lost(plan, worker, seeds[pipe], f"failed: {message}"))
                del working[pipe]
                if message is not None:
                    todo.done(message)
                    yield message
            for pipe in pipes:  # a failure opens a new seed, so those that had none to do may have one now
                if pipe not in working and (seed := todo.take()) is not None:
                    pipe.send(seed)
                    working[pipe], seeds[pipe] = time.monotonic(), seed
            late = [pipe for pipe, since in working.items() if time.monotonic() - since > timeout]
            if late:
                worker = pipes.index(late[0])
                raise WorkerError(_lost(plan, worker, seeds[late[0]], f"did not finish in {timeout:g} s"))
    finally:
        _end(pipes, processes)


def _lost(plan: Plan, worker: int, seed: int | None, how: str) -> str:
    doing = "at its start" if seed is None else f"with seed {seed}"
    return f"{plan.spec.name}: worker {worker} {how} ({doing}). What was collected is in {plan.folder}: the same call goes on"


def _end(pipes: list[Any], processes: list[Any]) -> None:
    for pipe in pipes:
        with contextlib.suppress(OSError):
            pipe.send(None)
    for process in processes:
        # One in the middle of an episode is not waited for: what it writes is whole or not there.
        process.join(0.5)
        if process.is_alive():
            process.terminate()
            process.join()
    for pipe in pipes:
        pipe.close()
