"""``xdfast doctor`` reports what is there and what is not, and never fails because something is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xdfast import doctor


@pytest.fixture(scope="module")
def report() -> dict:
    return doctor.collect()


def test_report_is_json_and_complete(report):
    again = json.loads(json.dumps(report))
    assert again == report
    parts = (
        "xdfast python packages cpu cuda extension kernels packing denoising apex dali robot deploy extras ops warnings"
    )
    assert set(report) == set(parts.split())


def test_versions_and_devices(report):
    import timm
    import torchvision

    assert report["packages"]["torch"] == {"version": torch.__version__, "error": None}
    assert report["packages"]["torchvision"]["version"] == torchvision.__version__
    assert report["packages"]["timm"]["version"] == timm.__version__
    assert report["cuda"]["built"] == torch.version.cuda
    assert report["cuda"]["available"] == torch.cuda.is_available()
    assert len(report["cuda"]["devices"]) == torch.cuda.device_count()
    assert report["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()


def test_ops_show_one_chosen_backend_each_with_reasons(report):
    assert any(op["op"] == "rsd_loss" and op["device"] == "cpu" for op in report["ops"])
    for op in report["ops"]:
        assert [r["chosen"] for r in op["rungs"]].count(True) == 1, op
        assert all(r["reason"] for r in op["rungs"]), op


def test_extension_state_agrees_with_an_import(report):
    try:
        import xdfast._C  # noqa: F401

        loads = True
    except ImportError:
        loads = False
    extension = report["extension"]
    assert extension["loaded"] is loads
    assert extension["reason"]
    assert "--no-build-isolation" in extension["how"]
    if loads:
        assert extension["build"]["built"] is True and extension["build"]["torch"]


def test_extras_come_from_the_metadata(report):
    assert {"data", "robot", "vla", "analysis", "deploy", "tensorboard", "dev"} <= set(report["extras"])
    assert "pytest" in report["extras"]["dev"]["packages"]
    assert report["extras"]["dev"]["packages"]["pytest"] == pytest.__version__
    assert not any("apex" in e["packages"] for e in report["extras"].values())


def test_deploy_says_whether_onnx_files_can_be_written(report, monkeypatch):
    import onnxruntime

    deploy = report["deploy"]
    assert deploy["onnx"] is True and deploy["packages"]["onnxruntime"] == onnxruntime.__version__
    assert "CPU" in deploy["providers"] and "onnxruntime runs on" in deploy["reason"]
    monkeypatch.setattr(doctor, "_version", lambda name: None)  # as where nothing is installed
    without = doctor._deploy([])
    assert without["onnx"] is False
    assert 'onnx, onnxscript, onnxruntime not installed: pip install "xdfast[deploy]"' in without["reason"]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    warnings: list[str] = []
    assert doctor._deploy(warnings)["onnx"] is False and "does not import" in warnings[0]


def test_robot_says_what_renders_or_why_nothing_does(report):
    robot = report["robot"]
    assert {"mujoco", "metaworld", "gymnasium", "gymnasium-robotics", "av"} == set(robot["packages"])
    assert robot["reason"]
    if robot["renderer"] is None and all(robot["packages"].values()):
        assert robot["reason"] in report["warnings"]
    assert "mujoco" not in sys.modules  # its OpenGL and Triton must not meet in this process


def test_robot_without_a_renderer_is_a_warning_with_the_fix(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "disable")
    warnings: list[str] = []
    robot = doctor._robot(warnings)
    if all(robot["packages"].values()):
        assert robot["renderer"] is None and warnings == [robot["reason"]] and "unset MUJOCO_GL" in robot["reason"]


def test_table_and_json_output(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    for word in (
        "torch",
        "timm",
        "extension xdfast._C",
        "NVIDIA apex",
        "NVIDIA DALI",
        "simulated robot tasks",
        "rsd_loss",
    ):
        assert word in text
    assert doctor.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["xdfast"]["version"]


def test_unknown_option_is_an_error(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--jsn"])
    assert "--jsn" in capsys.readouterr().err


def _install_metadata(site: Path, name: str, version: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
def test_dali_for_another_cuda_is_a_warning(tmp_path, monkeypatch):
    major = int(torch.version.cuda.split(".")[0])
    monkeypatch.syspath_prepend(tmp_path)
    _install_metadata(tmp_path, f"nvidia-dali-cuda{major}0", "2.4.0")
    warnings: list[str] = []
    assert doctor._dali(warnings)["matches"] is True and warnings == []
    _install_metadata(tmp_path, f"nvidia-dali-cuda{major - 1}0", "2.4.0")
    found = doctor._dali(warnings)
    assert found["matches"] is False
    assert f"pip uninstall nvidia-dali-cuda{major - 1}0" in warnings[0]
    assert f"pip install nvidia-dali-cuda{major}0" in warnings[0]


def test_impostor_apex_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise SystemExit('the impostor was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    warnings: list[str] = []
    assert doctor._apex(warnings).kind == "impostor"
    assert "pip uninstall apex" in warnings[0]


# Hides packages for real: the import system of the child cannot find them.
_WITHOUT = """
import sys
hidden = set(sys.argv[1].split(","))
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name in hidden or name.split(".")[0] in hidden:
            return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
from xdfast import doctor
sys.exit(doctor.main(sys.argv[2:]))
"""


def _run_without(hidden: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONSAFEPATH": "1", "COLUMNS": "200"}
    command = [sys.executable, "-c", _WITHOUT, hidden, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200)


def test_works_without_the_optional_parts(tmp_path):
    run = _run_without("triton,rich,tensorboard,xdfast._C", tmp_path, "--json")
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["kernels"]["has_triton"] is False and "triton" in report["kernels"]["reason"]
    assert report["extension"]["loaded"] is False
    cpu = next(op for op in report["ops"] if op["op"] == "rsd_loss" and op["device"] == "cpu")
    assert next(r for r in cpu["rungs"] if r["chosen"])["backend"] == "torch"


def test_works_and_fails_the_check_without_timm(tmp_path):
    run = _run_without("timm,torchvision", tmp_path)
    assert run.returncode == 1, run.stderr
    assert "warning" in run.stdout and "timm" in run.stdout


def test_works_without_torch(tmp_path):
    run = _run_without("torch,torchvision,timm,triton", tmp_path, "--json")
    assert run.returncode == 1, run.stderr
    report = json.loads(run.stdout)
    assert report["packages"]["torch"]["error"]
    assert report["extension"]["loaded"] is False
    assert report["ops"][0]["error"]
