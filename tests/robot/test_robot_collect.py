"""Collected demonstrations: the same set however it came about, nothing lost, an end when the expert fails."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from sim_process import needs_renderer

from xdfast.robot.demos.collect import _Todo, collect
from xdfast.robot.demos.errors import DemoError
from xdfast.robot.demos.format import DemoFolder, failed_seeds
from xdfast.robot.demos.scripted import Attempt

# coffee-button's expert is quick: 30-40 steps.
_QUICK = {"image_size": 24, "tail": 2, "progress": False}


def _hash(folder: Path, count: int) -> str:
    return DemoFolder(folder).content_hash(count)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """Six episodes, without interruption, by two workers."""
    folder = tmp_path_factory.mktemp("straight")
    found = collect("coffee-button", 6, folder, workers=2, **_QUICK)
    assert (found.episodes, found.failed, found.workers) == (6, (), 2) and found.frames > 6 * 20
    return folder


@needs_renderer
def test_the_same_set_for_any_number_of_workers_and_in_two_goes(tmp_path: Path, straight: Path):
    collect("coffee-button", 2, tmp_path, workers=1, **_QUICK)
    more = collect("metaworld/coffee-button-v3", 4, tmp_path, workers=1, **_QUICK)
    assert more.episodes == 4
    assert _hash(tmp_path, 4) == _hash(straight, 4)


@needs_renderer
def test_what_is_collected(straight: Path):
    again = collect("coffee-button", 6, straight, workers=2, **_QUICK)
    assert again.frames == 0 and again.seconds < 5  # nothing to do, no worker started
    folder = DemoFolder(straight)
    episode = folder.read(1)
    assert episode.seed == 1 and folder.task == "metaworld/coffee-button-v3" and folder.fps == 80
    assert episode.images["dp3"].shape == (len(episode), 24, 24, 3) and episode.state.shape == (len(episode), 9)
    assert episode.success is not None
    first = int(np.argmax(episode.success))
    assert episode.success.any() and len(episode) == first + 1 + 2  # two steps of tail
    assert np.abs(episode.actions).max() <= 1 and set(episode.info) >= {"near_object", "obj_to_target"}
    assert folder.facts["first_seed"] == 0 and folder.facts["versions"]["metaworld"]

    with pytest.raises(DemoError, match=r"facts\['noise'\]"):
        collect("coffee-button", 6, straight, workers=2, noise=0.1, **_QUICK)


_FOREVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
from xdfast.robot.demos.collect import collect
collect("coffee-button", 12, sys.argv[1], workers=2, image_size=24, tail=2)
"""


@needs_renderer
@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_nothing_is_lost_when_it_is_stopped(tmp_path: Path, straight: Path, how: signal.Signals):
    folder = tmp_path / "demos"
    command = [sys.executable, "-c", _FOREVER, str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        end = time.monotonic() + 60
        while len(list(folder.glob("episodes/*.safetensors"))) < 2 and time.monotonic() < end:
            time.sleep(0.02)
        if how == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, how)  # Ctrl-C reaches the workers as well
        _, errors = process.communicate(timeout=30)
    kept = len(DemoFolder(folder).lengths)
    assert 2 <= kept < 12, errors
    if how == signal.SIGINT:
        assert errors.count("Traceback") == 1, errors
    if kept < 6:
        collect("coffee-button", 6, folder, workers=2, **_QUICK)
    assert _hash(folder, 6) == _hash(straight, 6)


@needs_renderer
def test_an_expert_that_fails_ends_the_collection(tmp_path: Path):
    with pytest.raises(DemoError, match=r"failed on 3 seeds in a row \(0-2\); solved so far: 0 of 3"):
        collect("drawer-open", 2, tmp_path, workers=1, give_up=3, max_steps=4, **_QUICK)
    assert failed_seeds(tmp_path) == [0, 1, 2]  # not tried again


def test_bad_arguments_start_nothing(tmp_path: Path):
    out = tmp_path / "demos"
    for settings, message in [
        ({"task": "adroit/pen"}, "no scripted expert"),
        ({"task": "draw-open"}, "Did you mean 'drawer-open'"),
        ({"episodes": 0}, "episodes=0"),
        ({"image_size": 0}, "image_size=0"),
        ({"cameras": ("dp4",)}, "Did you mean 'dp3'"),
        ({"workers": "all"}, "workers='all'"),
        ({"workers": 0}, "workers=0"),
        ({"noise": 2.0}, "noise=2.0"),
        ({"tail": -1}, "tail=-1"),
        ({"seed": -1}, "seed=-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            collect(**{"task": "drawer-open", "episodes": 1, "out": out, **settings})
    assert not out.exists()


def _play(fails: set[int], episodes: int, workers: int, order: int) -> tuple[set[int], set[int]]:
    """A collection without simulators: workers finish in an order of their own."""
    random = np.random.default_rng(order)
    todo = _Todo(0, episodes, give_up=50, max_attempts=1000, solved=set(), failed=set())
    running: list[int] = []
    while todo.wanted:
        while len(running) < workers and (seed := todo.take()) is not None:
            running.append(seed)
        seed = running.pop(int(random.integers(len(running))))
        todo.done(Attempt(seed, seed not in fails, 1))
    assert not running  # nothing that is not needed was begun
    return todo.solved, todo.failed


def test_which_seeds_are_kept_does_not_depend_on_who_is_first():
    random = np.random.default_rng(0)
    for _ in range(50):
        fails = set(random.integers(0, 40, 15).tolist())
        kept = set(itertools.islice((s for s in itertools.count() if s not in fails), 12))
        for workers, order in itertools.product((1, 3, 8), range(3)):
            solved, failed = _play(fails, 12, workers, order)
            assert solved == kept and failed == {s for s in fails if s < max(kept)}


def test_limits_of_a_failing_expert():
    todo = _Todo(5, 2, give_up=50, max_attempts=3, solved={5}, failed={6, 7})
    with pytest.raises(DemoError, match=r"3 seeds were tried.*1 of 3 seeds.*max_attempts="):
        todo.take()
