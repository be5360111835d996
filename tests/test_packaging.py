"""What is shipped, and that it imports from anywhere: the packaging traps of a folder mapped by package_dir."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import xdfast

ROOT = Path(__file__).resolve().parent.parent

#: What a user writes, for a type checker at its strictest.
PROGRAM = """
from __future__ import annotations

from torch import Tensor, nn

import xdfast as xd


def losses(student: Tensor, teacher: Tensor, logits: Tensor, teacher_logits: Tensor) -> Tensor:
    aad = xd.AAD(512, 768, expansion=2)
    loss: Tensor = xd.RSDLoss(kappa=0.01, weight=0.1)(aad(student), teacher)  # torch types a module's call as Any
    loss = loss + xd.KDLoss()(logits, teacher_logits)
    with xd.backend("reference"):
        loss = loss + xd.rsd_loss(student, teacher)
        parts = xd.rsd_loss(student, teacher, return_components=True)
    return loss + parts.invariance


def pipeline(model: nn.Module) -> str:
    config = xd.DistillConfig(teacher="vit_small_patch14_dinov2", student="resnet18", data="/photos", out="runs/x")
    run = xd.distill(teacher="vit_small_patch14_dinov2", student=model, data="/photos", loss="mse", out="runs/x")
    result = xd.evaluate(run, data="/photos")
    page = xd.report([run, result], out="report.html")
    print(config.lr, run.metrics["top1"], page, xd.__version__, *xd.list_losses())
    return str(run.path)


loss: str = xd.RSDLoss()  # a mistake: it has to be found
"""


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """A command with a clean environment for builds; PYTHONSAFEPATH is off unless asked for, as for most users."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "PYTHONPATH", "XDFAST_BUILD_EXT")}
    return subprocess.run(
        list(command), cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=1000
    )


def built(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


def pip_wheel(source: Path, out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "-w", str(out)]
    return run(*pip, *options, str(source), cwd=out.parent, **environment)


def install(archive: Path, target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    built(run(*pip, "--target", str(target), str(archive), cwd=target.parent))


@pytest.fixture(scope="module")
def held() -> set[str]:
    """Files of the repository, committed or about to be; of an unpacked source archive, all but what builds and tests leave."""
    if (ROOT / ".git").exists():
        listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
        return {name for name in built(listed).stdout.split("\0") if (ROOT / name).is_file()}
    left = re.compile(
        r"(^|/)(build|dist|__pycache__|\.venv[^/]*|\.[a-z_]+_cache|[^/]+\.egg-info)/|\.(so|pyc)$|_build_info\.json$"
    )
    names = {p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file()}
    return {name for name in names if not left.search(name) and name not in ("PKG-INFO", "setup.cfg")}


@pytest.fixture(scope="module")
def source(held, tmp_path_factory) -> Path:
    """A copy of the repository's files: builds leave others behind, and must not find the ones of the editable install."""
    folder = tmp_path_factory.mktemp("packaging") / "source"
    for name in held:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel") / "dist"
    built(pip_wheel(source, out, "--no-build-isolation", XDFAST_BUILD_EXT="0"))
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_without_the_extension_runs_anywhere(wheel):
    assert wheel.name == f"xdfast-{xdfast.__version__}-py3-none-any.whl"


def test_wheel_holds_every_module_and_its_data(names):
    expected = {f"xdfast/{p.relative_to(ROOT / 'xdfast').as_posix()}" for p in (ROOT / "xdfast").rglob("*.py")}
    expected |= {f"xdfast/{room}/{p.name}" for room in ("kernels", "bench") for p in (ROOT / room).glob("*.py")}
    expected.remove("xdfast/bench/conftest.py")
    expected |= {f"xdfast/recipes/{p.name}" for p in (ROOT / "xdfast/recipes").glob("*.yaml")}
    expected.add("xdfast/recipes/results.json")
    for room in ("reporting", "deploy"):
        expected |= {f"xdfast/{room}/{p.name}" for p in (ROOT / "xdfast" / room).glob("*.j2")}
    assert expected - names == set()
    assert "xdfast/py.typed" in names


def test_wheel_holds_nothing_else(names):
    top = {name.split("/")[0] for name in names}
    assert top == {"xdfast", f"xdfast-{xdfast.__version__}.dist-info"}
    assert not [n for n in names if n.endswith((".so", ".cpp", ".pyc"))]
    assert not [n for n in names if "test" in Path(n).name and n.endswith(".py")]


def test_wheel_metadata(wheel, names):
    info = f"xdfast-{xdfast.__version__}.dist-info"
    assert f"{info}/licenses/LICENSE" in names
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        build_info = json.loads(archive.read("xdfast/_build_info.json"))
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "xdfast = xdfast.cli:main" in entry_points
    requirements = [line.split(":", 1)[1].strip() for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert "torch>=2.9" in requirements
    # `apex` on PyPI is an unrelated project, and torch brings the triton that matches it.
    assert not [r for r in requirements if r.lower().startswith(("apex", "triton"))]
    assert build_info["built"] is False and "XDFAST_BUILD_EXT=0" in build_info["reason"]


def test_installed_wheel_imports_from_another_folder(wheel, tmp_path):
    target = tmp_path / "site"
    install(wheel, target)
    code = "import xdfast, xdfast.kernels, xdfast.ops; print(xdfast.__file__); print(xdfast.kernels.__file__)"
    result = built(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target)))
    assert result.stdout.split() == [str(target / "xdfast/__init__.py"), str(target / "xdfast/kernels/__init__.py")]
    # Nothing named `kernels` or `bench` was installed beside it.
    assert not [name for name in ("kernels", "bench", "kernels.py", "bench.py") if (target / name).exists()]


@pytest.mark.slow
def test_type_checkers_see_the_public_api(wheel, tmp_path):
    """mypy --strict over a user's program, against the installed wheel: lazy names (PEP 562) have their types."""
    environment = tmp_path / "environment"
    built(run(sys.executable, "-m", "venv", "--without-pip", str(environment), cwd=tmp_path))
    site = next(environment.glob("lib/python*/site-packages"))
    install(wheel, site)
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch and the rest are borrowed
    shown = [name for name in xdfast.__all__ if name != "__version__"]
    program = PROGRAM + "".join(f"reveal_type(xd.{name})\n" for name in shown)
    (tmp_path / "program.py").write_text(program)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--python-executable"]
    result = run(*mypy, str(environment / "bin" / "python"), "program.py", cwd=tmp_path)
    lines = result.stdout.splitlines()
    errors = [line for line in lines if ": error:" in line]
    assert len(errors) == 1 and 'variable has type "str"' in errors[0], result.stdout + result.stderr
    types = dict(
        zip(shown, [line.split('Revealed type is "')[1].removesuffix('"') for line in lines if "Revealed" in line])
    )
    assert len(types) == len(shown), result.stdout
    for own_class in ("route", "load_routed"):  # the model that came in, with its own class and attributes
        assert types.pop(own_class).endswith("-> Any")
    untyped = {name: kind for name, kind in types.items() if re.search(r"^Any$|-> Any$|^def \(.*[(, ]\w+: Any$", kind)}
    untyped |= {name: kind for name, kind in types.items() if not kind.startswith("def ") and "Overload" not in kind}
    assert untyped == {}
    assert "xdfast.pipeline.folder.RunResult" in types["distill"]


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    built(run(sys.executable, "-c", code, str(out), cwd=source, XDFAST_BUILD_EXT="0"))
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def archived(sdist) -> set[str]:
    """Files of the source archive, without the folder of its name and version."""
    with tarfile.open(sdist) as archive:
        return {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}


def test_source_archive_can_build_everything(archived):
    shipped = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu")}
    shipped |= {p.relative_to(ROOT).as_posix() for room in ("kernels", "bench") for p in (ROOT / room).glob("*.py")}
    shipped |= {"bench/gpu.sh", "setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "xdfast/_version.py"}
    assert "csrc/checks.h" in shipped
    assert shipped - archived == set()
    assert not [n for n in archived if n.endswith((".so", ".pyc", "_build_info.json"))]


def test_source_archive_is_what_the_repository_holds(archived, held):
    """No test, page or figure is missing, and nothing that only lies about."""
    made = {name for name in archived if name in ("PKG-INFO", "setup.cfg") or name.startswith("xdfast.egg-info/")}
    assert held - archived == set()
    assert archived - made - held == set()
    assert {"PKG-INFO", "xdfast.egg-info/SOURCES.txt"} <= made


def test_citation_names_this_version_and_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert citation["version"] == xdfast.__version__
    assert citation["license"] == "Apache-2.0"
    papers = {reference["url"].removeprefix("https://arxiv.org/abs/") for reference in citation["references"]}
    assert papers == {"2507.21844", "2511.18082", "2601.11269"}
    assert all(r["authors"] and r["title"] and r["type"] and r["year"] for r in citation["references"])


@pytest.mark.parametrize("room", ["kernels", "bench"])
def test_this_environment_resolves_the_room_to_the_same_tree(room):
    here = Path(xdfast.__file__).resolve().parent
    expected = ROOT / room if here == ROOT / "xdfast" else here / room
    assert Path(importlib.import_module(f"xdfast.{room}").__file__).resolve().parent == expected


def test_repository_root_is_not_on_the_path_of_the_tests():
    on_path = [p for p in sys.path if Path(p or ".").resolve() == ROOT]
    assert not on_path, (
        f"{ROOT} is on sys.path, so the folder kernels/ shadows the package of that name. Run the `pytest` script with "
        "PYTHONSAFEPATH=1 (make test does), never `python -m pytest`"
    )


@pytest.mark.parametrize("room", ["kernels", "bench"])
def test_our_folder_does_not_take_the_name(room):
    """Neither an editable install nor a wheel may claim the import name of another project's package."""
    code = f"import importlib.util as u; s = u.find_spec('{room}'); print('' if s is None else s.origin or 'namespace')"
    origin = built(run(sys.executable, "-c", code, cwd=ROOT, PYTHONSAFEPATH="1")).stdout.strip()
    site = [Path(sysconfig.get_path(p)).resolve() for p in ("purelib", "platlib")]
    assert not origin or any(Path(origin).resolve().is_relative_to(s) for s in site), origin


@pytest.mark.parametrize("room", ["kernels", "bench"])
def test_the_room_refuses_to_be_a_top_level_package(room):
    result = run(sys.executable, "-c", f"import {room}", cwd=ROOT)
    assert result.returncode != 0
    assert f"ImportError: this folder is installed as xdfast.{room}" in result.stderr


@pytest.mark.slow
def test_isolated_build_needs_no_torch(source, tmp_path):
    """`pip install .` as a newcomer types it: the build environment holds setuptools and nothing else."""
    result = built(pip_wheel(source, tmp_path / "dist", "-v"))
    assert "torch could not be imported during the build" in result.stdout + result.stderr
    assert "Collecting torch" not in result.stdout + result.stderr
    archive = next((tmp_path / "dist").glob("*.whl"))
    assert archive.name.endswith("-py3-none-any.whl")
    info = json.loads(zipfile.ZipFile(archive).read("xdfast/_build_info.json"))
    assert info["built"] is False and "--no-build-isolation" in info["how"]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # compiles everything
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")
def test_build_with_the_extension(sdist, tmp_path):
    """From the source archive: its sources and headers are all there."""
    built(pip_wheel(sdist, tmp_path / "dist", "--no-build-isolation", XDFAST_BUILD_EXT="1"))
    archive = next((tmp_path / "dist").glob("*.whl"))
    assert "none-any" not in archive.name
    target = tmp_path / "site"
    install(archive, target)
    code = (
        "import torch, xdfast, xdfast._C; assert xdfast._C.__file__.startswith(r'%s'), xdfast._C.__file__; "
        "print(torch.ops.xdfast_c.rsd_prepare(torch.randn(4, 3), 1e-5, False, False)[0].shape)"
    )
    result = built(run(sys.executable, "-c", code % target, cwd=tmp_path, PYTHONPATH=str(target)))
    assert "[4, 3]" in result.stdout
    import torch

    info = json.loads((target / "xdfast/_build_info.json").read_text())
    assert info["built"] is True and info["torch"] == torch.__version__ and "-march=native" not in info["flags"]
    cuda = info["cuda_kernels"]
    assert cuda.startswith("built for sm_80") or cuda.removeprefix("not built: "), cuda
    code = "import torch, xdfast._C; print(torch._C._dispatch_has_kernel_for_dispatch_key('xdfast_c::route_plan_', 'CUDA'))"
    result = built(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target)))
    assert result.stdout.split() == [str(cuda.startswith("built for"))]


@pytest.mark.slow
def test_failing_compiler_is_survived_unless_the_extension_is_demanded(source, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'broken-c++: this compiler always fails' >&2\nexit 1\n")
    broken.chmod(0o755)
    shutil.rmtree(source / "build", ignore_errors=True)  # objects of an earlier build would be reused
    result = built(pip_wheel(source, tmp_path / "dist", "--no-build-isolation", "-v", CXX=str(broken)))
    assert "installing without the compiled extension" in result.stdout + result.stderr
    archive = next((tmp_path / "dist").glob("*.whl"))
    names = zipfile.ZipFile(archive).namelist()
    assert not [n for n in names if n.endswith(".so")]
    info = json.loads(zipfile.ZipFile(archive).read("xdfast/_build_info.json"))
    assert info["built"] is False and "compiler failed" in info["reason"]

    shutil.rmtree(source / "build", ignore_errors=True)
    demanded = pip_wheel(source, tmp_path / "again", "--no-build-isolation", CXX=str(broken), XDFAST_BUILD_EXT="1")
    assert demanded.returncode != 0
    nonsense = pip_wheel(source, tmp_path / "again", "--no-build-isolation", XDFAST_BUILD_EXT="maybe")
    assert nonsense.returncode != 0 and "XDFAST_BUILD_EXT must be 1" in nonsense.stdout + nonsense.stderr
