"""kill -9 at random moments, again and again until the verb is finished: the result is that of a run nobody disturbed.

Verbs whose kill tests stand beside their other tests are not repeated: ``distill`` (tests/pipeline/test_pipeline_resume.py, with a
teacher cache test_pipeline_teacher.py), policies (test_pipeline_policy.py), ``suite`` (test_pipeline_evaluate_policy.py), ``demos
collect`` and ``convert`` (tests/robot/test_robot_collect.py, test_demos_format.py).
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hardening_tally import LONG, SEED, count
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = 8 if LONG else 3
SMALL: dict[str, Any] = {
    "data": "sklearn:digits", "labels_per_class": 12, "student_size": 32, "epochs": 3, "batch_size": 16, "augment": "small",
    "optimizer": "adamw", "lr": 2e-3, "workers": 0, "progress": False, "device": "cpu", "checkpoint_seconds": 0.0,
}  # fmt: skip
CODE = """
import importlib, json, sys
module, function, settings = json.loads(sys.argv[1])
done = getattr(importlib.import_module(module), function)(**settings)
if hasattr(done, "close"):
    done.close()
"""


def _start(module: str, function: str, settings: dict[str, Any]) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    given = json.dumps([module, function, settings])
    return subprocess.Popen([sys.executable, "-c", CODE, given], env=env, stderr=subprocess.PIPE, text=True)


def _finish(process: subprocess.Popen[str]) -> None:
    _, told = process.communicate(timeout=1200)
    assert process.returncode == 0, told


def _killed_until_finished(
    verb: str,
    start: Callable[[], subprocess.Popen[str]],
    seconds: float,
    again: Callable[[], None],
    after_kill: Callable[[], None] = lambda: None,
) -> None:
    """``seconds``: what an undisturbed run took; kills fall anywhere in that time. A run that was finished before the first one
    (a first run is slow: nothing is in the machine's caches) is undone by ``again``, and the time halved."""
    draw, kills = random.Random(f"{SEED} {verb}"), 0
    while kills < KILLS:
        process = start()
        end = time.monotonic() + draw.uniform(0.1, 1.0) * seconds
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        if process.poll() is not None:
            assert process.returncode == 0, process.communicate()[1]
            if kills or seconds < 1:
                break
            again()
            seconds /= 2
            continue
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not psutil.wait_procs(children, timeout=120)[1], "its own processes outlive it"
        kills += 1
        after_kill()
    _finish(start())
    assert kills > 0
    for _ in range(kills):
        count("kills", verb, "continued")


def _forget(folder: Path) -> None:
    for path in folder.glob("broken*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _unbroken(start: Callable[[], subprocess.Popen[str]]) -> float:
    began = time.monotonic()
    _finish(start())
    return time.monotonic() - began


def _same_weights(a: Path, b: Path) -> None:
    one, two = load_file(a), load_file(b)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    import xdfast

    return xdfast.finetune(
        "test_resnet", out=str(tmp_path_factory.mktemp("kills") / "run"), **{**SMALL, "epochs": 1}
    ).path


def test_finetune(tmp_path) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        return _start("xdfast", "finetune", {"model": "test_resnet", "out": str(tmp_path / name), **SMALL})

    seconds = _unbroken(lambda: start("whole"))
    _killed_until_finished("finetune", lambda: start("broken"), seconds, lambda: _forget(tmp_path))
    _same_weights(*(tmp_path / name / "student" / "model.safetensors" for name in ("whole", "broken")))


def test_evaluate(run, tmp_path) -> None:
    def unevaluated() -> None:
        _forget(tmp_path)
        shutil.copytree(run, tmp_path / "broken")

    shutil.copytree(run, tmp_path / "whole")
    unevaluated()

    def start(name: str) -> subprocess.Popen[str]:
        return _start("xdfast", "evaluate", {"model": str(tmp_path / name), "progress": False, "device": "cpu"})

    def whole_or_absent() -> None:
        from xdfast.pipeline.evaluate import load_evaluation

        load_evaluation(tmp_path / "broken")

    seconds = _unbroken(lambda: start("whole"))
    _killed_until_finished("evaluate", lambda: start("broken"), seconds, unevaluated, whole_or_absent)
    told = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("whole", "broken")]
    assert [values.pop("path") for values in told] and told[0]["metrics"] == told[1]["metrics"]
    assert told[0]["confusion"] == told[1]["confusion"]
    with np.load(tmp_path / "whole" / "embedding.npz") as a, np.load(tmp_path / "broken" / "embedding.npz") as b:
        assert a.files == b.files and all(np.array_equal(a[key], b[key]) for key in a.files)


def test_report(run, tmp_path) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        return _start(
            "xdfast", "report", {"runs": [str(run)], "out": str(tmp_path / f"{name}.html"), "measure_speed": False}
        )

    def whole_or_absent() -> None:
        page, data = tmp_path / "broken.html", tmp_path / "broken.json"
        assert not page.exists() or page.read_text(encoding="utf-8").rstrip().endswith("</html>")
        assert not data.exists() or json.loads(data.read_text(encoding="utf-8"))

    seconds = _unbroken(lambda: start("whole"))
    _killed_until_finished("report", lambda: start("broken"), seconds, lambda: _forget(tmp_path), whole_or_absent)
    whole_or_absent()
    a, b = (json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("whole", "broken"))
    assert a.keys() == b.keys() and a["accuracy"] == b["accuracy"] and a["accuracy"]


def test_export(run, tmp_path) -> None:
    def start(name: str) -> subprocess.Popen[str]:
        given = {"model": str(run), "out": str(tmp_path / name), "formats": "pt2", "batches": [1, 2], "progress": False}
        return _start("xdfast.pipeline.export", "export", {**given, "latency_seconds": 0.1})

    def outputs(name: str) -> torch.Tensor:
        program = torch.export.load(tmp_path / name / "model.pt2").module()
        return torch.cat(
            program(torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)), dim=1
        )  # features and logits

    def whole_or_absent() -> None:
        if (tmp_path / "broken" / "model.pt2").exists():
            assert torch.equal(outputs("broken"), outputs("whole"))
        if (tmp_path / "broken" / "export.json").exists():
            assert (tmp_path / "broken" / "model.pt2").exists()
            assert json.loads((tmp_path / "broken" / "export.json").read_text(encoding="utf-8"))

    seconds = _unbroken(lambda: start("whole"))
    _killed_until_finished("export", lambda: start("broken"), seconds, lambda: _forget(tmp_path), whole_or_absent)
    assert torch.equal(outputs("broken"), outputs("whole"))


def test_cache_build(tmp_path) -> None:
    from xdfast.pipeline.cache import verify_store

    shared = {
        "teacher": "test_vit", "teacher_pretrained": False, "teacher_size": 32, "student": "test_resnet", "loss": "mse",
        "ce_weight": 0.0, "cache_views": 2, "cache_dtype": "float32", "image_size": 32, "augment": "imagenet-cnn",
    }  # fmt: skip
    given = {k: v for k, v in {**SMALL, **shared}.items() if k != "checkpoint_seconds"}

    def start(name: str) -> subprocess.Popen[str]:
        return _start("xdfast.pipeline.cache", "build_cache", {**given, "cache": str(tmp_path / name)})

    def nothing_is_damaged() -> None:
        if (tmp_path / "broken" / "manifest.json").is_file():
            assert not verify_store(tmp_path / "broken", progress=False).damaged

    seconds = _unbroken(lambda: start("whole"))
    _killed_until_finished(
        "cache build", lambda: start("broken"), seconds, lambda: _forget(tmp_path), nothing_is_damaged
    )
    assert all(verify_store(tmp_path / name, progress=False).complete for name in ("whole", "broken"))
    rows = [sorted((tmp_path / name).glob("rows-*.bin")) for name in ("whole", "broken")]
    assert [file.name for file in rows[0]] == [file.name for file in rows[1]] and rows[0]


def test_compare(tmp_path) -> None:
    pair = {"teacher": {"model": "test_vit", "student_options": {"patch_size": 8}}, "student": "test_resnet"}
    shared = {k: v for k, v in SMALL.items() if k not in ("data", "device", "progress")}
    given = {
        "data": "sklearn:digits", "pairs": {"vit-cnn": pair}, "methods": {"scratch": {}, "kd": {"loss": "kd"}},
        "settings": {**shared, "image_size": 32, "progress": False}, "device": "cpu", "seeds": 1, "jobs": 1,
        "progress": False, "pages": False,
    }  # fmt: skip

    def start(name: str) -> subprocess.Popen[str]:
        return _start("xdfast", "compare", {**given, "out": str(tmp_path / name)})

    seconds = _unbroken(lambda: start("whole"))
    _killed_until_finished("compare", lambda: start("broken"), seconds, lambda: _forget(tmp_path))
    a, b = (json.loads((tmp_path / name / "compare.json").read_text(encoding="utf-8")) for name in ("whole", "broken"))
    assert not a["failed"] and not b["failed"]
    assert [(r["method"], r["top1"]) for r in a["rows"]] == [(r["method"], r["top1"]) for r in b["rows"]]
    for cell in ("teacher", "scratch-seed0", "kd-seed0"):
        _same_weights(*(tmp_path / n / "vit-cnn" / cell / "student" / "model.safetensors" for n in ("whole", "broken")))
