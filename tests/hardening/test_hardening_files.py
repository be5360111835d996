"""Damaged images and demonstrations: an image or a bad file that is named; episodes or an error that names the file.

In a process of its own, since a decoder that crashes has to be seen as one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hardening_tally import LONG, SEED, count

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "robot" / "fixtures"
PACKAGES = {"lerobot": ("av", "pyarrow"), "pusht": ("zarr",), "real": ("zarr",), "robomimic": ("h5py",)}


def _read(part: str, name: str, *arguments: object) -> None:
    command = [sys.executable, str(HERE / "hardening_readers.py"), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(HERE)}  # PYTHONSAFEPATH keeps a script's own folder off the path
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600, errors="replace")
    lines = done.stdout.splitlines()
    last = next((line for line in reversed(lines) if line.startswith("try")), "none")
    assert done.returncode == 0 and lines[-1:] == ["end"], (
        f"the process ended with {done.returncode}; it was at: {last}\n{done.stderr[-2000:]}"
    )
    wrong = [line for line in lines if line.startswith("wrong")]
    assert not wrong, "\n".join(wrong)
    found = [line[5:].split("|") for line in lines if line.startswith("done")]
    assert found
    for what, outcome in found:
        count(part, f"{name}: {what}", outcome)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("decoder", ["pillow", pytest.param("dali", marks=[] if LONG else [pytest.mark.slow])])
def test_images(tmp_path, decoder) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    _read("images", decoder, decoder, SEED, 600 if LONG else 24, tmp_path)


@pytest.mark.slow  # tests/robot damages some of these in make test
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "name", ["lerobot_h264", "lerobot_images", "pusht_like.zarr", "real_like.zarr.zip", "robomimic.hdf5", "xdfast"]
)
def test_demonstrations(tmp_path, name) -> None:
    for start, packages in PACKAGES.items():
        for package in packages if name.startswith(start) else ():
            pytest.importorskip(package)
    source = FIXTURES / name
    if name == "xdfast":
        source = tmp_path / "whole" / "xdfast"
        _write_ours(source)
    _read("demonstrations", name, "demonstrations", SEED, 80, tmp_path / "damaged", source)


def _write_ours(folder: Path) -> None:
    import numpy as np

    from xdfast.robot.demos.episode import Episode
    from xdfast.robot.demos.format import DemoWriter

    rng = np.random.default_rng(0)
    writer = DemoWriter(folder, task="a/b", cameras={"top": (6, 8)}, fps=10, action_dim=4, state_dim=3)
    for index in range(3):
        length = 5 + index
        writer.write(
            Episode(
                images={"top": rng.integers(0, 256, (length, 6, 8, 3), dtype=np.uint8)},
                state=rng.normal(size=(length, 3)).astype(np.float32),
                actions=rng.uniform(-1, 1, (length, 4)).astype(np.float32),
            ),
            index=index,
        )  # fmt: skip
