"""The scripts in examples/ run, and their losses fall."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_the_loss_falls(name) -> None:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    losses = torch.tensor(module.main(steps=16, batch=32))
    assert losses.isfinite().all()
    assert losses[-4:].mean() < 0.9 * losses[:4].mean()


@pytest.mark.slow
@pytest.mark.ddp
def test_the_loop_runs_under_torchrun_with_one_global_loss(tmp_path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    script = tmp_path / "run.py"
    # a file a rank: lines of two processes on one pipe can run into each other
    script.write_text(
        "import os, pathlib, runpy\n"
        f"losses = runpy.run_path({str(EXAMPLES / 'rsd_loop.py')!r})['main'](steps=6, batch=32)\n"
        f"(pathlib.Path({str(tmp_path)!r}) / ('fell-' + os.environ['RANK'])).write_text(str(losses[-1] < losses[0]))\n"
    )
    run = subprocess.run([*torchrun, str(script)], env=env, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert [(tmp_path / f"fell-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
