"""Runs in processes of their own, several at a time: what ``suite`` and ``compare`` are made of.

Killed at any moment, the runs save themselves and the same call goes on: what is finished is skipped, the rest continued. A run
that fails leaves its log in its folder and does not stop the others.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

from xdfast.progress import ProgressLine

__all__ = ["Job", "default_jobs", "run_all"]

log = logging.getLogger("xdfast")

_PLAN = "XDFAST_JOB"


class Job(Protocol):
    """One run.

    Attributes:
        name: for people, unique.
        folder: its own; ``log.txt`` there holds what it prints.
        entry: ``module:function`` that does it, given :meth:`plan`.
    """

    entry: ClassVar[str]

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    def plan(self) -> dict[str, Any]:
        """Arguments of ``entry``; JSON-able."""
        ...

    def finished(self) -> bool:
        """Whether all of it is there already."""
        ...

    def told(self) -> str:
        """What came of it, in a word, for the progress line."""
        ...


def run_all(jobs: Sequence[Job], *, title: str, at_once: int, progress: bool = True) -> dict[str, str]:
    """Runs what is not finished, in order, ``at_once`` at a time.

    Returns:
        Name → why, of the runs that failed.
    """
    waiting = [job for job in jobs if not job.finished()]
    done = len(jobs) - len(waiting)
    line = ProgressLine(title, len(jobs), done, enabled=progress)
    line.update(done, f"{done} finished before")
    running: dict[_Process, Job] = {}
    failed: dict[str, str] = {}
    with _ending_in_order():
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    running[_Process(job, at_once)] = job
                time.sleep(0.2)
                for process, job in list(running.items()):
                    if process.alive():
                        continue
                    del running[process]
                    done += 1
                    if process.failed() or not job.finished():
                        failed[job.name] = process.reason()
                        log.warning("%s failed: %s", job.name, failed[job.name])
                    line.update(done, f"{job.name} {'failed' if job.name in failed else job.told()}")
        finally:
            for process in running:
                process.stop()
            line.close(f"{done} of {len(jobs)} runs, {len(failed)} failed")
    return failed


def default_jobs(device: str) -> int:
    """Runs side by side: one per GPU, or one per two cores."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.device_count()
    return max(1, (os.cpu_count() or 1) // 2)


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM becomes an exception, so that the runs are told to save themselves."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread alone
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Process:
    """One run in a process, its output in the run's log.txt."""

    def __init__(self, job: Job, at_once: int) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        self._log = job.folder / "log.txt"
        plan = {"entry": job.entry, "parent": os.getpid(), "plan": job.plan()}
        threads = max(1, (os.cpu_count() or 1) // at_once)
        # a run beside others must not take all cores, neither for its arithmetic nor for its simulators
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), _PLAN: json.dumps(plan)}
        env["PYTHONSAFEPATH"] = "1"  # the working directory is none of the run's business
        with open(self._log, "ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from xdfast.pipeline.side_by_side import _run; _run()"],
                env=env,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )

    def alive(self) -> bool:
        return self._process.poll() is None

    def failed(self) -> bool:
        return self._process.returncode != 0

    def reason(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'no output'} (exit status {self._process.returncode}; {self._log})"

    def stop(self) -> None:
        """Lets the run save itself, and waits."""
        if self.alive():
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _run() -> None:
    """The body of a run's process."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    told = json.loads(os.environ.pop(_PLAN))
    _end_with_parent(told["parent"])
    module, _, function = told["entry"].partition(":")
    getattr(importlib.import_module(module), function)(told["plan"])


def _end_with_parent(parent: int) -> None:
    """Whoever is killed outright cannot stop its runs: they look whether it is still there, and save themselves."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
