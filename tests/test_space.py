"""``.ci/space.py``, which ``make install`` asks before the first download: refuses what cannot fit, and nothing else."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / ".ci" / "space.py"
GB = 10**9

_spec = importlib.util.spec_from_file_location("xdfast_space", SCRIPT)
assert _spec is not None and _spec.loader is not None
space = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = space  # dataclasses look their module up
_spec.loader.exec_module(space)

# Round numbers, so that every sum below can be done in the head.
ROUND = space.Figures(
    torch_installed=60 * GB, torch_downloads=30 * GB, rest_installed=20 * GB, rest_downloads=8 * GB
)  # fmt: skip


def place(what: str, device: int, free: int, needed: int = 0):
    return space.Place(what, Path("/somewhere") / what, needed, device, free)


@pytest.mark.parametrize(
    ("torch", "used", "expected"),
    [
        (False, 0, (80, 30, 90)),  # torch's wheels and what they unpack to: the peak is before the rest comes
        (True, 60 * GB, (20, 8, 28)),
        (True, 75 * GB, (5, 5, 10)),  # no more is downloaded than is missing
        (True, 80 * GB, (0, 0, 0)),
        (True, 99 * GB, (0, 0, 0)),
        (False, 3 * GB, (77, 30, 87)),
    ],
)
def test_what_is_there_already_is_not_asked_for_again(torch, used, expected):
    assert space.needs(ROUND, torch=torch, used=used) == tuple(n * GB for n in expected)


def test_the_rest_is_the_peak_where_it_is_larger_than_torch():
    small = space.Figures(
        torch_installed=10 * GB, torch_downloads=1 * GB, rest_installed=20 * GB, rest_downloads=8 * GB
    )
    assert space.needs(small, torch=False, used=0) == (30 * GB, 8 * GB, 38 * GB)


def test_one_file_system_has_to_hold_both():
    venv, temporary = place("environment", 1, 90 * GB, 80 * GB), place("temporary", 1, 90 * GB, 30 * GB)
    assert space.shortfalls(venv, temporary, 90 * GB) == []  # exactly enough is enough
    (problem,) = space.shortfalls(venv, temporary, 90 * GB + GB // 10)
    assert "90.0 GB free" in problem and "90.1 GB are needed" in problem and "/somewhere/environment" in problem


def test_two_file_systems_are_looked_at_one_by_one():
    venv, temporary = place("environment", 1, 80 * GB, 80 * GB), place("temporary", 2, 30 * GB, 30 * GB)
    assert space.shortfalls(venv, temporary, 90 * GB) == []
    full = place("temporary", 2, 29 * GB, 30 * GB)
    (problem,) = space.shortfalls(venv, full, 90 * GB)
    assert problem == "temporary /somewhere/temporary needs 30.0 GB; its file system has 29.0 GB free"
    assert len(space.shortfalls(place("environment", 1, 0, 80 * GB), full, 90 * GB)) == 2


@pytest.mark.parametrize(
    ("devices", "free", "fits"),
    [
        ((1, 1, 1), 128, True),  # 90 for both and 38 for the cache
        ((1, 1, 1), 127, False),
        ((1, 2, 2), 68, True),
        ((1, 2, 2), 67, False),
        ((1, 2, 1), 118, True),
        ((1, 2, 1), 117, False),
        ((1, 2, 3), 38, True),
        ((1, 2, 3), 37, False),
    ],
)
def test_the_cache_is_given_up_before_the_installation(devices, free, fits):
    venv, temporary, cache = (
        place(name, device, free * GB, needed * GB)
        for name, device, needed in zip(("environment", "temporary", "cache"), devices, (80, 30, 38))
    )
    assert space.cache_fits(cache, venv, temporary, 90 * GB) is fits


def test_a_torch_for_cpus_needs_less(monkeypatch):
    monkeypatch.setattr(space.platform, "system", lambda: "Linux")
    monkeypatch.setattr(space.platform, "machine", lambda: "x86_64")
    assert space.figures(None, {}) is space.CUDA
    assert space.figures("2.14.1+cpu", {}) is space.CPU
    assert space.figures("2.14.1+cu130", {"PIP_INDEX_URL": "https://host/whl/cpu"}) is space.CUDA  # it is there already
    assert space.figures(None, {"PIP_EXTRA_INDEX_URL": "https://host/whl/cpu"}) is space.CPU
    monkeypatch.setattr(space.platform, "system", lambda: "Darwin")
    assert space.figures(None, {}) is space.CPU
    assert space.needs(space.CPU, torch=False, used=0)[2] < space.needs(space.CUDA, torch=False, used=0)[2]


def test_size_counts_blocks_and_a_missing_folder_is_asked_for_through_its_parent(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x" * 100_000)
    assert 100_000 <= space.size(tmp_path) < 200_000
    assert space.size(tmp_path / "none") == 0
    assert space.existing(tmp_path / "none" / "deeper") == tmp_path


def ask(venv: Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = {k: v for k, v in os.environ.items() if k not in ("XDFAST_CHECK_SPACE", "PIP_NO_CACHE_DIR")}
    command = [sys.executable, str(SCRIPT), str(venv)]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=200)


def test_this_environment_passes():
    """What is installed already is no reason to refuse: a second `make install` needs next to nothing."""
    result = ask(Path(sys.prefix))
    assert result.returncode == 0, result.stderr
    assert re.match(r"space needed: \d+\.\d GB of \d+\.\d GB", result.stderr)
    assert result.stdout.strip() in ("", "--no-cache-dir")


def test_without_pips_cache_there_is_nothing_to_give_up():
    assert ask(Path(sys.prefix), PIP_NO_CACHE_DIR="1").stdout == ""


def full(tmp_path: Path) -> Path:
    """The script, asking for more than any disk has."""
    text, count = re.subn(
        r"^(CUDA|CPU) = Figures\(.*\)$", r"\1 = Figures(*[10**18] * 4)", SCRIPT.read_text(), flags=re.M
    )
    assert count == 2
    script = tmp_path / ".ci" / "space.py"
    script.parent.mkdir()
    script.write_text(text)
    return script


def test_make_stops_before_the_first_download(tmp_path):
    """The real rule of the real Makefile, in a folder with the script that finds no room."""
    full(tmp_path)
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "csrc").mkdir()
    command = ["make", "install", f"PYTHON={sys.executable}"]
    inherited = {k: v for k, v in os.environ.items() if k not in ("XDFAST_CHECK_SPACE", "MAKEFLAGS", "VENV")}
    result = subprocess.run(command, cwd=tmp_path, env=inherited, capture_output=True, text=True, timeout=200)
    assert result.returncode != 0
    assert "not enough space to install xdfast and what it needs:" in result.stderr
    assert "GB free" in result.stderr and "XDFAST_CHECK_SPACE=0 skips this check" in result.stderr
    assert "TMPDIR=" in result.stderr and "VENV=" in result.stderr
    assert "installing torch" not in result.stdout
    assert not list((tmp_path / ".venv").glob("lib/python*/site-packages/torch"))
    assert not (tmp_path / ".venv" / ".xdfast-installed").exists()


def test_the_check_can_be_skipped(tmp_path):
    command = [sys.executable, str(full(tmp_path)), str(tmp_path)]
    skipping = {**os.environ, "XDFAST_CHECK_SPACE": "0"}
    result = subprocess.run(command, env=skipping, capture_output=True, text=True, timeout=200)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
