"""Many copies of a task at once, each in a process of its own."""

from __future__ import annotations

import functools
import multiprocessing
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from xdfast.robot.sim.env import SimEnv, check_actions  # first: says so where the robot extra is missing
from xdfast.robot.sim.names import task_spec
from xdfast.robot.sim.processes import WorkerError, become_worker, cause_of_death, spawning
from xdfast.robot.sim.task import TaskSpec

import gymnasium  # isort: skip
from gymnasium.vector import AsyncVectorEnv, AutoresetMode  # isort: skip
from gymnasium.vector.async_vector_env import _async_worker  # isort: skip

__all__ = ["SimVectorEnv", "WorkerError", "vector_env"]


def _worker(index: int, env_fn: Callable[[], gymnasium.Env], *rest: Any) -> None:
    """Gymnasium's worker in a process that behaves: see :func:`become_worker`."""
    become_worker()
    _async_worker(index, env_fn, *rest)


class SimVectorEnv(AsyncVectorEnv):
    """Gymnasium's AsyncVectorEnv of :class:`SimEnv`, with errors one can act on.

    What AsyncVectorEnv does and this does not: it waits without end for a worker that hangs, reports one that died as a
    bare ``EOFError`` and one that raised without saying where, hangs in ``close`` after either, and gives all
    sub-environments the same reset options. Here every wait has an end, every failure closes the vector, and
    ``options={"record": [path or None, …]}`` films each episode to a file of its own.

    Sub-environments are not reset by themselves: one that is done waits (its steps execute nothing) until ``reset`` with
    ``options={"reset_mask": bool [count]}`` starts a new episode in it.
    """

    def __init__(self, env_fns: Sequence[Callable[[], SimEnv]], *, task: str, timeout: float) -> None:
        self.task_spec: TaskSpec = task_spec(task)
        self._task_name, self._timeout = task, timeout
        self.processes: list[Any] = []
        with self._guard("start"), spawning():
            super().__init__(
                env_fns,
                shared_memory=True,
                context="spawn",
                worker=_worker,
                autoreset_mode=AutoresetMode.DISABLED,
            )

    def __enter__(self) -> SimVectorEnv:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(terminate=kind is not None)

    def reset_async(self, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None) -> None:
        """As in AsyncVectorEnv; ``options["record"]`` is a list with a path or None for every sub-environment."""
        options = dict(options or {})
        records = options.pop("record", None)
        if records is None:
            with self._guard("reset"):
                super().reset_async(seed=seed, options=options)
            return
        if isinstance(records, (str, Path)) or len(records) != self.num_envs:
            raise ValueError(f"record={records!r} must be a list of {self.num_envs} paths or None, one an environment")
        # AsyncVectorEnv sends one options dict to all; each pipe's send is given its own for this call.
        with self._guard("reset"), self._own_options(records):
            super().reset_async(seed=seed, options=options)

    @contextmanager
    def _own_options(self, records: Sequence[str | Path | None]) -> Iterator[None]:
        class Sender:
            """A pipe that adds a recording to the reset that goes through it."""

            def __init__(self, pipe: Any, record: str | Path | None) -> None:
                self._pipe, self._record = pipe, None if record is None else str(record)

            def send(self, message: tuple[str, Any]) -> None:
                command, data = message
                if command == "reset" and self._record is not None:
                    data = {**data, "options": {**(data["options"] or {}), "record": self._record}}
                self._pipe.send((command, data))

        pipes = self.parent_pipes
        self.parent_pipes = [Sender(pipe, record) for pipe, record in zip(pipes, records, strict=True)]  # type: ignore[misc]
        try:
            yield
        finally:
            self.parent_pipes = pipes

    def reset_wait(self, timeout: float | None = None) -> tuple[Any, dict[str, Any]]:
        """As in AsyncVectorEnv, with this vector's time limit."""
        with self._guard("reset"):
            return super().reset_wait(self._timeout if timeout is None else timeout)

    def step_async(self, actions: np.ndarray) -> None:
        """Sends actions float ``[count, chunk, A]``.

        Raises:
            ValueError: another shape, or NaN or infinite numbers; the workers go on living.
        """
        actions = check_actions(self.task_spec, actions, self.action_space.shape or ())
        with self._guard("step"):
            super().step_async(actions)

    def step_wait(self, timeout: float | None = None) -> Any:
        """As in AsyncVectorEnv, with this vector's time limit."""
        with self._guard("step"):
            return super().step_wait(self._timeout if timeout is None else timeout)

    def call_wait(self, timeout: float | None = None) -> tuple[Any, ...]:
        """As in AsyncVectorEnv, with this vector's time limit."""
        with self._guard("call"):
            return super().call_wait(self._timeout if timeout is None else timeout)

    @contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """Turns what a lost worker does to the pipes into a WorkerError; whatever goes wrong, no process is left."""
        try:
            yield
        except WorkerError:
            self.close(terminate=True)
            raise
        except (EOFError, ConnectionError) as error:
            message = self._who_died(doing)
            self.close(terminate=True)
            raise WorkerError(message) from error
        except multiprocessing.TimeoutError as error:
            message = self._who_is_late(doing)
            self.close(terminate=True)
            raise WorkerError(message) from error
        except KeyboardInterrupt:
            self.close(terminate=True)
            raise

    def _who_died(self, doing: str) -> str:
        deadline = time.monotonic() + 5  # the pipe closes a little before the process has ended
        while time.monotonic() < deadline:
            for index, process in enumerate(self.processes):
                if not process.is_alive():
                    how = cause_of_death(process.exitcode)
                    return f"{self._task_name}: worker {index} of {len(self.processes)} {how} during {doing}"
            time.sleep(0.02)
        return f"{self._task_name}: a worker closed its connection during {doing}"

    def _who_is_late(self, doing: str) -> str:
        late = [i for i, pipe in enumerate(self.parent_pipes) if pipe is not None and not pipe.poll(0)]
        return f"{self._task_name}: worker {', '.join(map(str, late))} did not finish {doing} in {self._timeout:g} s"

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        failed = [index for index, success in enumerate(successes) if not success]
        if not failed:
            return
        try:
            index, kind, value, trace = self.error_queue.get(timeout=30)
        except queue.Empty:
            raise WorkerError(f"{self._task_name}: worker {failed[0]} failed without a message") from None
        raise WorkerError(f"{self._task_name}: worker {index}: {kind.__name__}: {value}\n{trace}")

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """Ends the workers: asked first (unless ``terminate``), made to after ``timeout`` (5 s)."""
        if not terminate:
            for pipe in getattr(self, "parent_pipes", ()):
                try:
                    pipe.send(("close", None))
                except (OSError, ValueError, AttributeError):  # it is gone already
                    continue
            deadline = time.monotonic() + (5.0 if timeout is None else timeout)
            for process in self.processes:
                process.join(max(0.0, deadline - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                process.terminate()
        for process in self.processes:
            process.join(1)
            if process.is_alive():  # a simulator in the middle of C code does not hear SIGTERM at once
                process.kill()
                process.join()
        for pipe in getattr(self, "parent_pipes", ()):
            if pipe is not None:
                pipe.close()


def vector_env(task: str, count: int, *, timeout: float = 120.0, **env: Any) -> SimVectorEnv:
    """Starts ``count`` copies of a task, each in a process of its own (spawned; they import neither torch nor the script).

    Works from an unguarded script and from a notebook. Use it as a context manager, or call ``close``; the processes end
    with this one in any case, also when it is killed.

    Args:
        task: name, see :func:`xdfast.robot.sim.names.task_spec`.
        count: number of sub-environments. More than there are cores are of use only to batch a policy's decisions.
        timeout: seconds that a reset or a step may take; the first reset imports the simulator (2-4 s).
        env: keyword arguments of :class:`SimEnv`: image_size, cameras, n_obs, chunk, max_steps.

    Returns:
        A vector environment with autoreset disabled: observations ``{"images": uint8 [count, C, n_obs, H, W, 3],
        "state": float32 [count, n_obs, P]}``, actions float32 ``[count, chunk, A]``.

    Raises:
        ValueError: arguments out of range, an unknown task or camera.
        NoRendererError: nothing can render here; the message says what to install.
        ImportError: the robot extra is not installed.
        WorkerError: a worker failed, died or took too long.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count={count!r} must be an integer of at least 1")
    if not timeout > 0:
        raise ValueError(f"timeout={timeout!r} must be above 0 seconds")
    name = SimEnv(task, **env).task_spec.name  # checks the arguments before a process is started
    return SimVectorEnv([functools.partial(SimEnv, name, **env)] * count, task=name, timeout=timeout)
