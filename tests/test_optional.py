"""Optional packages: clear errors, and NVIDIA apex told from the unrelated package that owns its name on PyPI."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from xdfast._optional import apex_status, require, require_apex_optimizer


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """An empty folder in front of sys.path; packages written into it are really found and imported."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {"apex", "amp_C", "xd_broken", "xd_fine"}:
            del sys.modules[name]
    importlib.invalidate_caches()


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()


def make_impostor(site: Path) -> None:
    # The shape of the web toolkit: importable, no optimizers. Importing it would leave a trace.
    write(site / "apex" / "__init__.py", f"open({str(site / 'imported')!r}, 'w').close()\n")
    write(site / "apex" / "amp" / "__init__.py")
    write(site / "apex" / "lib" / "libapex.py")


def make_nvidia(site: Path, kernels: bool) -> None:
    write(site / "apex" / "__init__.py")
    write(site / "apex" / "optimizers" / "__init__.py", "class FusedLAMB: ...\nclass FusedAdam: ...\n")
    write(site / "apex" / "optimizers" / "fused_adam.py")
    if kernels:
        write(site / "amp_C.py")


def test_require_returns_the_module(site):
    write(site / "xd_fine" / "__init__.py")
    write(site / "xd_fine" / "part.py", "answer = 42\n")
    assert require("xd_fine.part", "data").answer == 42


def test_require_missing_names_the_pip_line():
    with pytest.raises(
        ImportError, match=r'xd_absent is needed for the tests .*pip install "xdfast\[robot\]"'
    ) as caught:
        require("xd_absent", "robot", purpose="the tests")
    assert caught.value.name == "xd_absent"
    with pytest.raises(ImportError, match="pip install xd_absent"):
        require("xd_absent.part")


def test_require_tells_broken_from_missing(site):
    write(site / "xd_broken" / "__init__.py", "import xd_absent_dependency\n")
    with pytest.raises(ImportError, match="installed, but it fails to import: 'xd_absent_dependency' is missing"):
        require("xd_broken", "data")
    write(site / "xd_broken" / "__init__.py", "raise ImportError('wrong ABI')\n")
    with pytest.raises(ImportError, match="fails to import: wrong ABI"):
        require("xd_broken", "data")


needs_no_apex = pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="a package named apex is here")


@needs_no_apex
def test_apex_missing():
    status = apex_status()
    assert (status.kind, status.usable, status.path) == ("missing", False, None)
    with pytest.raises(ImportError, match=r'optimizer="apex-fusedlamb" cannot be used: NVIDIA apex is not installed'):
        require_apex_optimizer("apex-fusedlamb")


def test_apex_impostor_is_refused_and_never_imported(site):
    make_impostor(site)
    status = apex_status()
    assert status.kind == "impostor" and not status.usable
    assert status.path == str(site / "apex")
    with pytest.raises(ImportError, match=r"not NVIDIA apex .*unrelated web toolkit.*pip uninstall apex.*NVIDIA/apex"):
        require_apex_optimizer("fusedlamb")
    assert not (site / "imported").exists(), "the impostor was imported"
    assert "apex" not in sys.modules


def test_source_folder_of_apex_in_the_working_directory_is_not_apex(site):
    # A clone of NVIDIA's repository: apex/apex/optimizers. Its outer folder is importable as a namespace package.
    write(site / "apex" / "apex" / "optimizers" / "fused_adam.py")
    assert apex_status().kind == "impostor"


def test_single_file_named_apex(site):
    write(site / "apex.py", "")
    status = apex_status()
    assert status.kind == "impostor" and status.path == str(site / "apex.py")


def test_apex_without_cuda_kernels(site):
    make_nvidia(site, kernels=False)
    status = apex_status()
    assert status.kind == "nvidia" and not status.usable
    with pytest.raises(ImportError, match=r"built without its CUDA kernels .*APEX_CUDA_EXT=1"):
        require_apex_optimizer("fusedadam")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_apex_without_a_cuda_device(site):
    make_nvidia(site, kernels=True)
    with pytest.raises(ImportError, match="needs a CUDA device, and torch"):
        require_apex_optimizer("fusedadam")


@pytest.mark.gpu
def test_apex_class_is_returned(site):
    make_nvidia(site, kernels=True)
    assert apex_status().usable
    assert require_apex_optimizer("apex-FusedLAMB").__name__ == "FusedLAMB"


@pytest.mark.parametrize("name", ["apex-fusedlam", "lamb", ""])
def test_unknown_apex_optimizer_offers_names(name):
    with pytest.raises(ValueError, match="unknown apex optimizer .*apex-fusedlamb"):
        require_apex_optimizer(name)


def test_nearest_name_is_offered():
    with pytest.raises(ValueError, match="Did you mean 'apex-fusedlamb'"):
        require_apex_optimizer("apex-fusedlam")


def test_nothing_of_ours_depends_on_the_name_apex():
    root = Path(__file__).resolve().parent.parent
    requirement = [
        line for line in (root / "pyproject.toml").read_text().splitlines() if line.strip().startswith('"apex')
    ]
    assert requirement == []
