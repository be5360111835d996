"""``xdfast doctor``: what is installed, what will run, and why not the rest.

:func:`collect` never raises for something missing or broken: that is what it is there to report.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xdfast._optional import apex_status
from xdfast._version import __version__

__all__ = ["collect", "main"]

#: Imported for real (a torchvision that does not match torch has a version and still does not work).
_CORE = ("torch", "torchvision", "timm")
_LISTED = (
    "numpy",
    "pillow",
    "safetensors",
    "huggingface_hub",
    "tyro",
    "rich",
    "pyyaml",
    "fvcore",
    "torchmetrics",
    "scikit-learn",
    "matplotlib",
    "jinja2",
)
#: What simulated robot tasks run on.
_SIMULATORS = ("mujoco", "metaworld", "gymnasium", "gymnasium-robotics", "av")
#: What `xdfast export --formats onnx` needs.
_EXPORTERS = ("onnx", "onnxscript", "onnxruntime")
_HERE = Path(__file__).resolve().parent


def collect() -> dict[str, Any]:
    """Everything the report shows, as plain JSON-able values. ``"warnings"`` holds what needs attention."""
    warnings: list[str] = []
    report: dict[str, Any] = {
        "xdfast": {"version": __version__, "path": str(_HERE)},
        "python": {"version": platform.python_version(), "executable": sys.executable, "system": platform.platform()},
        "packages": _packages(warnings),
        "cpu": _cpu(),
        "cuda": _cuda(warnings),
        "extension": _extension(warnings),
        "kernels": _kernels(),
        "packing": _packing(),
        "denoising": _denoising(),
        "apex": asdict(_apex(warnings)),
        "dali": _dali(warnings),
        "robot": _robot(warnings),
        "deploy": _deploy(warnings),
        "extras": _extras(),
        "ops": _ops(),
    }
    report["warnings"] = warnings
    return report


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _try_import(name: str) -> tuple[Any, str | None]:
    """(module, None) or (None, why not). A broken binary package raises anything from ImportError to OSError."""
    try:
        return importlib.import_module(name), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _packages(warnings: list[str]) -> dict[str, dict[str, Any]]:
    packages: dict[str, dict[str, Any]] = {}
    for name in _CORE:
        module, error = _try_import(name)
        version = str(getattr(module, "__version__", None) or _version(name) or "") or None
        packages[name] = {"version": version, "error": error}
        if error is not None:
            what = "is not installed" if version is None else f"{version} does not import ({error})"
            warnings.append(f"{name} {what}: pip install --upgrade {name}")
    _, error = _try_import("triton")
    packages["triton"] = {"version": _version("triton"), "error": error}  # reported with the kernels; CUDA only
    for name in _LISTED:
        version = _version(name)
        packages[name] = {"version": version, "error": None if version else "not installed"}
        if version is None:
            warnings.append(f"{name} is not installed: pip install {name}")
    return packages


def _cpu() -> dict[str, Any]:
    torch, _ = _try_import("torch")
    return {
        "model": _cpu_model(),
        "logical_cpus": os.cpu_count(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads() if torch else None,
        "capability": torch.backends.cpu.get_cpu_capability() if torch else None,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _cuda(warnings: list[str]) -> dict[str, Any]:
    torch, error = _try_import("torch")
    result: dict[str, Any] = {"available": False, "built": None, "driver": _driver(), "devices": [], "reason": ""}
    if torch is None:
        return result | {"reason": f"torch does not import ({error})"}
    result["built"] = torch.version.cuda
    if torch.version.cuda is None:
        return result | {"reason": "this torch is built without CUDA"}
    if not torch.cuda.is_available():
        if result["driver"]:
            warnings.append(
                f"NVIDIA driver {result['driver']} is there, but torch (CUDA {torch.version.cuda}) sees no device: the "
                "driver may be older than that CUDA, or CUDA_VISIBLE_DEVICES hides the device"
            )
        return result | {"reason": "torch sees no CUDA device"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        result["devices"].append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return result | {"available": True, "reason": f"{len(result['devices'])} device(s)"}


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = run.stdout.strip().splitlines()
    return lines[0] if lines and run.returncode == 0 else None


def _build_command() -> str:
    root = _HERE.parent
    pip = f"{sys.executable} -m pip install --no-build-isolation --no-deps"
    if (root / "setup.py").is_file() and (root / "csrc").is_dir():
        return f"cd {root} && {pip} -e ."
    return f"{pip} --force-reinstall .   (in a copy of xdfast's source)"


def _extension(warnings: list[str]) -> dict[str, Any]:
    """Whether xdfast._C loads; if not why, from the record of the build, and the exact command that builds it."""
    record_file = _HERE / "_build_info.json"
    build: dict[str, Any] = {}
    if record_file.is_file():
        try:
            build = json.loads(record_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as unreadable:
            warnings.append(f"{record_file} cannot be read ({unreadable}); reinstall xdfast")
    result: dict[str, Any] = {"loaded": False, "reason": "", "build": build, "how": _build_command(), "needs": []}
    if importlib.util.find_spec("setuptools") is None:
        result["needs"].append("setuptools>=77 in this environment: pip install 'setuptools>=77'")
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        result["needs"].append("a C++ compiler (g++ or clang++), e.g. the system package g++")
    if importlib.util.find_spec("torch") is None:
        return result | {"reason": "torch is not installed"}
    if importlib.util.find_spec("xdfast._C") is None:
        return result | {"reason": build.get("reason") or "it was not built when xdfast was installed"}
    torch, _ = _try_import("torch")
    _, error = _try_import("xdfast._C")
    made_for = str(build.get("torch", ""))
    if error is not None:
        why = f"the library does not load ({error})"
        if torch is not None and made_for and made_for != torch.__version__:
            why += f": it was built for torch {made_for}, and this is torch {torch.__version__}"
        warnings.append(f"compiled extension: {why}. Rebuild it: {result['how']}")
        return result | {"reason": why}
    reason = f"runs {torch.ops.xdfast_c.cpu_capability()} code" if torch is not None else ""
    if torch is not None and made_for and made_for.split("+")[0] != torch.__version__.split("+")[0]:
        warnings.append(
            f"the compiled extension was built for torch {made_for} and loads under torch {torch.__version__}; "
            f"rebuild it to be safe: {result['how']}"
        )
    return result | {"loaded": True, "reason": reason}


def _kernels() -> dict[str, Any]:
    kernels, error = _try_import("xdfast.kernels")
    if kernels is None:
        return {"has_triton": False, "reason": f"xdfast.kernels does not import ({error}); install xdfast with pip"}
    return {"has_triton": kernels.HAS_TRITON, "reason": kernels.WHY_NOT}


def _packing() -> dict[str, Any]:
    """Whether routed layers on the CPU multiply with prepared weights."""
    if importlib.util.find_spec("torch") is None:
        return {"available": False, "reason": "torch is not installed"}
    module, error = _try_import("xdfast.nn.packed")
    if module is None:
        return {"available": False, "reason": f"xdfast.nn does not import ({error})"}
    available, reason = module.packing_available()
    return {"available": available, "reason": reason}


def _denoising() -> dict[str, Any]:
    """Whether a diffusion policy's denoiser on the CPU runs in fused layers."""
    module, error = _try_import("xdfast.ops.conv_rows")
    if module is None:
        return {"available": False, "reason": f"xdfast.ops does not import ({error})"}
    available, reason = module.conv_rows_available()
    return {"available": available, "reason": reason}


def _apex(warnings: list[str]) -> Any:
    status = apex_status()
    if status.kind == "impostor":
        warnings.append(status.message)
    return status


def _dali(warnings: list[str]) -> dict[str, Any]:
    """NVIDIA DALI names its wheels after the CUDA major version; a wheel for another one than torch's fails late."""
    torch, _ = _try_import("torch")
    torch_cuda = torch.version.cuda if torch is not None else None
    installed: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if re.fullmatch(r"nvidia-dali-cuda\d{3,}", name):
            installed[name] = distribution.version
    right = f"nvidia-dali-cuda{int(torch_cuda.split('.')[0])}0" if torch_cuda else None
    result: dict[str, Any] = {"installed": installed, "torch_cuda": torch_cuda, "right_wheel": right, "matches": None}
    if not installed:
        reason = (
            f"not installed; the wheel for this torch is {right}" if right else "not installed; it needs a CUDA torch"
        )
        return result | {"reason": reason}
    if right is None:
        return result | {"reason": "installed, but this torch is built without CUDA"}
    result["matches"] = list(installed) == [right]
    if not result["matches"]:
        wrong = [name for name in installed if name != right]
        message = (
            f"{', '.join(wrong)} does not match torch, which is built for CUDA {torch_cuda}: "
            f"pip uninstall {' '.join(wrong)} && pip install {right}"
        )
        warnings.append(message)
        return result | {"reason": message}
    return result | {"reason": f"{right} matches torch's CUDA {torch_cuda}"}


def _robot(warnings: list[str]) -> dict[str, Any]:
    """Whether simulated tasks run: their packages, and what would render. Nothing of it is imported here."""
    packages = {name: _version(name) for name in _SIMULATORS}
    result: dict[str, Any] = {"packages": packages, "renderer": None, "reason": ""}
    missing = [name for name, version in packages.items() if version is None]
    if missing:
        return result | {"reason": f'{", ".join(missing)} not installed: pip install "xdfast[robot]"'}
    gl, error = _try_import("xdfast.robot.sim.gl")
    if gl is None:
        return result | {"reason": f"xdfast.robot does not import ({error})"}
    try:
        found = gl.renderer()
    except Exception as problem:
        warnings.append(str(problem))
        return result | {"reason": str(problem)}
    return result | {"renderer": found.name, "reason": found.reason}


def _deploy(warnings: list[str]) -> dict[str, Any]:
    """Whether `xdfast export` can write ONNX files and check them, and what onnxruntime runs on; and AOTInductor's compiler."""
    packages = {name: _version(name) for name in _EXPORTERS}
    # the package for GPUs has another name and the same modules
    packages["onnxruntime"] = packages["onnxruntime"] or _version("onnxruntime-gpu")
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    result: dict[str, Any] = {"packages": packages, "providers": [], "compiler": compiler, "onnx": False}
    missing = [name for name, version in packages.items() if version is None]
    if missing:
        return result | {"reason": f'no ONNX files: {", ".join(missing)} not installed: pip install "xdfast[deploy]"'}
    onnxruntime, error = _try_import("onnxruntime")
    if onnxruntime is None:
        message = f"onnxruntime {packages['onnxruntime']} does not import ({error}): pip install --upgrade onnxruntime"
        warnings.append(message)
        return result | {"reason": message}
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return result | {"onnx": True, "providers": providers, "reason": f"onnxruntime runs on {', '.join(providers)}"}


def _extras() -> dict[str, dict[str, Any]]:
    """Extra → its packages with versions, read from the metadata of the installed xdfast."""
    try:
        requirements = importlib.metadata.requires("xdfast") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    extras: dict[str, dict[str, Any]] = {}
    for requirement in requirements:
        extra = re.search(r"""extra\s*==\s*['"]([\w.-]+)['"]""", requirement)
        name = re.match(r"[\w.-]+", requirement)
        if extra and name:
            entry = extras.setdefault(extra[1], {"packages": {}, "install": f'pip install "xdfast[{extra[1]}]"'})
            entry["packages"][name[0]] = _version(name[0])
    for entry in extras.values():
        entry["complete"] = all(entry["packages"].values())
    return extras


def _ops() -> list[dict[str, Any]]:
    backends, error = _try_import("xdfast.ops._backends")
    if backends is None:
        return [{"op": "(none)", "device": "", "rungs": [], "error": error}]
    try:
        return [{**asdict(r), "rungs": [asdict(rung) for rung in r.rungs]} for r in backends.explain()]
    except Exception as broken:  # a broken op must not hide the rest of the report
        return [{"op": "(none)", "device": "", "rungs": [], "error": f"{type(broken).__name__}: {broken}"}]


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(soft_wrap=False)

    def table(title: str, rows: Sequence[tuple[str, ...]], headers: Sequence[str] = ()) -> None:
        view = Table(title=title, title_justify="left", show_header=bool(headers), title_style="bold")
        for header in headers or ("",) * len(rows[0]):
            view.add_column(header, overflow="fold")
        for row in rows:
            view.add_row(*(escape(cell) for cell in row))
        console.print(view)

    cpu, cuda, extension = report["cpu"], report["cuda"], report["extension"]
    table(
        "xdfast doctor",
        [
            ("xdfast", f"{report['xdfast']['version']}  {report['xdfast']['path']}"),
            ("Python", f"{report['python']['version']}  {report['python']['executable']}"),
            ("system", report["python"]["system"]),
            (
                "CPU",
                f"{cpu['model']}, {cpu['usable_cpus']} of {cpu['logical_cpus']} CPUs, torch threads "
                f"{cpu['torch_threads']}, {cpu['capability']}",
            ),
            ("CUDA", f"torch built for {cuda['built']}, driver {cuda['driver']}: {cuda['reason']}"),
            *(
                (f"cuda:{i}", f"{d['name']}, capability {d['capability']}, {d['memory_gib']} GiB")
                for i, d in enumerate(cuda["devices"])
            ),
        ],
    )
    table(
        "packages",
        [(name, p["version"] or "-", p["error"] or "") for name, p in report["packages"].items()],
        ("package", "version", "problem"),
    )
    built = extension["build"]
    made = f"built for torch {built['torch']} by {built['compiler']}" if built.get("built") else ""
    rows = [
        ("extension xdfast._C", "loaded" if extension["loaded"] else "missing", f"{extension['reason']} {made}".strip())
    ]
    if not extension["loaded"]:
        rows.append(("", "to build it", extension["how"]))
        rows.extend(("", "needs", need) for need in extension["needs"])
    if built.get("built"):
        rows.append(("", "CUDA sources", str(built.get("cuda_kernels", "not built: by an older xdfast"))))
    kernels, apex, dali = report["kernels"], report["apex"], report["dali"]
    packing = report["packing"]
    rows.append(("routed layers on a CPU", "prepared" if packing["available"] else "plain linear", packing["reason"]))
    denoising = report["denoising"]
    rows.append(("decisions on a CPU", "fused" if denoising["available"] else "by modules", denoising["reason"]))
    rows.append(("Triton kernels", "yes" if kernels["has_triton"] else "no", kernels["reason"]))
    rows.append(("NVIDIA apex", "usable" if apex["usable"] else apex["kind"], apex["message"]))
    rows.append(("NVIDIA DALI", "installed" if dali["installed"] else "missing", dali["reason"]))
    robot = report["robot"]
    simulators = ", ".join(f"{name} {version}" for name, version in robot["packages"].items() if version)
    rows.append(
        ("simulated robot tasks", robot["renderer"] or "cannot run", f"{simulators}; {robot['reason']}".strip("; "))
    )
    deploy = report["deploy"]
    versions = ", ".join(f"{name} {version}" for name, version in deploy["packages"].items() if version)
    rows.append(("export to ONNX", "yes" if deploy["onnx"] else "no", f"{versions}; {deploy['reason']}".strip("; ")))
    found = deploy["compiler"] or "no C++ compiler on the PATH: install g++ or clang++, or set CXX"
    rows.append(("export by AOTInductor", "yes" if deploy["compiler"] else "no", found))
    table("compiled and optional parts", rows, ("part", "state", "why"))
    if report["extras"]:
        table(
            "extras",
            [
                (
                    extra,
                    "complete" if e["complete"] else e["install"],
                    ", ".join(f"{name} {version or '(missing)'}" for name, version in e["packages"].items()),
                )
                for extra, e in report["extras"].items()
            ],
            ("extra", "state", "packages"),
        )
    rungs = []
    for op in report["ops"]:
        if not op["rungs"]:
            rungs.append((op["op"], op["device"], "", op.get("error", "")))
        for rung in op["rungs"]:
            mark = "runs" if rung["chosen"] else ("can run" if rung["available"] else "cannot")
            rungs.append((f"{op['op']} on {op['device']}", rung["backend"], mark, rung["reason"]))
    table("which implementation runs", rungs or [("(no op)", "", "", "")], ("op", "backend", "", "why"))
    for warning in report["warnings"]:
        console.print(f"[bold yellow]warning:[/] {escape(warning)}", soft_wrap=True)
    if not report["warnings"]:
        console.print("nothing needs attention")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; ``--json`` prints :func:`collect` instead. 1 if a required package is missing or broken."""
    parser = argparse.ArgumentParser(prog="xdfast doctor", description="What is installed, what will run, and why not.")
    parser.add_argument("--json", action="store_true", help="machine-readable report")
    arguments = parser.parse_args(argv)
    report = collect()
    if arguments.json or importlib.util.find_spec("rich") is None:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    required = {name: p for name, p in report["packages"].items() if name != "triton"}
    return int(any(p["error"] for p in required.values()))


if __name__ == "__main__":
    sys.exit(main())
