"""Builds xdfast: the packages, and the compiled extension ``xdfast._C`` where torch and a C++ compiler are at hand.

Metadata is in pyproject.toml. What is decided here:

* ``kernels/`` is installed as ``xdfast.kernels`` and ``bench/`` as ``xdfast.bench`` (``package_dir``), never as top-level
  packages of those names.
* The extension is optional. An isolated build (``pip install .``) sees no torch and builds without it;
  ``pip install --no-build-isolation .`` with torch installed builds it. ``XDFAST_BUILD_EXT=1`` turns a missing or
  failing toolchain into an error, ``XDFAST_BUILD_EXT=0`` skips the extension.
* What was built, or why not, is written to ``xdfast/_build_info.json``, so that ``xdfast doctor`` can explain a
  missing or mismatched extension without loading it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = [
    "csrc/ops.cpp",
    "csrc/cpu/attention.cpp",
    "csrc/cpu/conv_rows.cpp",
    "csrc/cpu/gemm.cpp",
    "csrc/cpu/panels.cpp",
    "csrc/cpu/passes.cpp",
    "csrc/cpu/routed.cpp",
    "csrc/cpu/rows.cpp",
    "csrc/cpu/rsd.cpp",
    "csrc/cpu/rsd_autograd.cpp",
    "csrc/cpu/rsd_streamed.cpp",
]
HEADERS = [
    "csrc/checks.h",
    "csrc/cpu/gemm.h",
    "csrc/cpu/panels.h",
    "csrc/cpu/passes.h",
    "csrc/cpu/rows.h",
    "csrc/cpu/rsd_parts.h",
    "csrc/cpu/rsd_streamed.h",
    "csrc/cpu/standardize.h",
    "csrc/cpu/vector.h",
]
#: Compiled too where nvcc and a torch with CUDA are at hand; they register themselves for CUDA tensors.
#: (Objects are named after their source without its ending, so a .cpp and a .cu may not share a name.)
CUDA_SOURCES = ["csrc/cuda/route_plan_op.cpp", "csrc/cuda/route_plan.cu"]
CUDA_HEADERS = ["csrc/cuda/route_plan.h"]
CUDA_ARCHITECTURES = (80, 90, 100)
INFO_NAME = "_build_info.json"
HOW_TO_BUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


def say(message: str) -> None:
    """One line on stderr; pip shows it with -v, and always when the build fails."""
    print(f"xdfast setup: {message}", file=sys.stderr, flush=True)


def requested() -> bool | None:
    """XDFAST_BUILD_EXT as True (must build), False (skip) or None (build if possible)."""
    value = os.environ.get("XDFAST_BUILD_EXT", "").strip().lower()
    known: dict[str, bool | None] = {"": None, "auto": None, "1": True, "true": True, "0": False, "false": False}
    if value not in known:
        raise SystemExit(
            f"XDFAST_BUILD_EXT must be 1 (build the extension or fail), 0 (skip it) or empty (build it if possible); "
            f"got {value!r}"
        )
    return known[value]


def write_info(folder: Path, info: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INFO_NAME).write_text(json.dumps(info, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class BuildPy(build_py):
    """Writes why there is no extension into the package, for a build that does not make one."""

    skipped_because: str | None = None

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if m[1] != "conftest"]  # bench/conftest.py is for pytest in the repository

    def run(self) -> None:
        super().run()
        if self.skipped_because is None:
            return
        info = {"built": False, "reason": self.skipped_because, "how": HOW_TO_BUILD}
        if not getattr(self, "editable_mode", False):
            write_info(Path(self.build_lib) / "xdfast", info)
        elif not any((ROOT / "xdfast").glob("_C.*")):
            # An editable install keeps the library of an earlier build, and then the record that belongs to it.
            write_info(ROOT / "xdfast", info)


def compiler_version(compiler: str) -> str:
    """First line of ``compiler --version``, or the command itself if it does not run."""
    try:
        run = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return f"{compiler} (does not run)"
    return (run.stdout.strip().splitlines() or [compiler])[0]


def cuda_toolkit(guess: str | None) -> str | None:
    """The toolkit's folder. torch takes the folder above nvcc's, which is wrong for a link to nvcc in /usr/local/bin."""
    found = [Path(guess), Path(guess, "bin", "nvcc").resolve().parent.parent] if guess else []
    for home in (*found, Path("/usr/local/cuda")):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return str(home)
    return None


def no_cuda(torch_cuda: str | None, home: str | None) -> str | None:
    """Why the CUDA kernels cannot be compiled, or None if they can: nvcc of the same major version as torch's CUDA."""
    if os.environ.get("XDFAST_BUILD_CUDA", "").strip().lower() in ("0", "false"):
        return "XDFAST_BUILD_CUDA=0 was set during the build"
    if torch_cuda is None:
        return "this torch was built without CUDA"
    if home is None:
        return "no CUDA toolkit with nvcc was found (install it, or set CUDA_HOME)"
    nvcc = str(Path(home, "bin", "nvcc"))
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{nvcc} does not run ({error})"
    release = said.partition("release ")[2].partition(",")[0]
    if release.partition(".")[0] != torch_cuda.partition(".")[0]:
        return f"{nvcc} is of CUDA {release or 'unknown'}, torch of CUDA {torch_cuda}; the major versions must agree"
    return None


def extension() -> tuple[list[Any], dict[str, Any], str | None]:
    """(ext_modules, cmdclass, why the extension is skipped or None)."""
    want = requested()
    if want is False:
        return [], {}, "XDFAST_BUILD_EXT=0 was set during the build"
    try:
        import torch
        from torch.utils import cpp_extension
    except Exception as error:  # a broken torch must not break a pure-Python install
        why = (
            f"torch could not be imported during the build ({type(error).__name__}: {error}); "
            "an isolated build never has torch"
        )
        if want:
            raise SystemExit(
                f"XDFAST_BUILD_EXT=1, but {why}. Install torch first, then run: pip install --no-build-isolation ."
            ) from error
        say(f"building without the compiled extension: {why}. To build it: {HOW_TO_BUILD}")
        return [], {}, why

    compiler = compiler_version(cpp_extension.get_cxx_compiler())
    compile_flags = ["-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    if sys.platform == "linux" and "clang" not in compiler.lower():
        # at::parallel_for is inline and runs on one thread without this. No -fopenmp for the linker on purpose: GCC's
        # calls then resolve to the OpenMP runtime torch itself loaded, not to a second pool of threads beside it.
        # (Clang's calls need its own runtime; there the extension runs on one thread.)
        compile_flags.append("-fopenmp")
    toolkit = cuda_toolkit(cpp_extension.CUDA_HOME)
    without_cuda = no_cuda(torch.version.cuda, toolkit)
    if without_cuda is None:
        cpp_extension.CUDA_HOME = toolkit
        # Explicit targets: torch would ask the GPU of this machine, and may find none. PTX of the newest for what comes.
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
        targets.append("-gencode=arch=compute_{0},code=compute_{0}".format(CUDA_ARCHITECTURES[-1]))
        ext = cpp_extension.CUDAExtension(
            "xdfast._C",
            [*SOURCES, *CUDA_SOURCES],
            depends=[*HEADERS, *CUDA_HEADERS],
            extra_compile_args={"cxx": compile_flags, "nvcc": ["-O3", *targets]},
        )
    else:
        ext = cpp_extension.CppExtension(
            "xdfast._C", SOURCES, depends=HEADERS, extra_compile_args={"cxx": compile_flags}
        )
    ext.optional = not want  # distutils then tolerates a library that was not produced

    class BuildExt(cpp_extension.BuildExtension):
        """torch's BuildExtension that may fail without failing the install, and records what it did."""

        def build_extensions(self) -> None:
            info: dict[str, Any] = {
                "torch": torch.__version__,
                "cuda": torch.version.cuda,
                "python": platform.python_version(),
                "platform": f"{sys.platform}-{platform.machine()}",
                "compiler": compiler,
                "flags": compile_flags,
            }
            try:
                info["cuda_kernels"] = self._build_with_cuda_or_without()
                info["built"] = True
            except Exception as error:
                if want:
                    raise
                reason = str(error).strip().splitlines() or [""]
                info |= {"built": False, "how": HOW_TO_BUILD}
                info["reason"] = f"the compiler failed: {type(error).__name__}: {reason[-1][:500]}"
                say(f"installing without the compiled extension: {info['reason']}. To build it: {HOW_TO_BUILD}")
                self._forget_stale_library()
            write_info(Path(self.build_lib) / "xdfast", info)
            if self._in_place:
                write_info(ROOT / "xdfast", info)

        def _build_with_cuda_or_without(self) -> str:
            """Builds; says what became of the CUDA kernels, without which the extension is as good for the CPU."""
            if without_cuda is not None:
                super().build_extensions()
                return f"not built: {without_cuda}"
            try:
                super().build_extensions()
                return "built for " + ", ".join(f"sm_{a}" for a in CUDA_ARCHITECTURES)
            except Exception as error:
                reason = (str(error).strip().splitlines() or [""])[-1][:500]
            say(f"the CUDA kernels do not compile ({reason}); building the extension without them")
            again = cpp_extension.CppExtension("xdfast._C", SOURCES, extra_compile_args={"cxx": compile_flags})
            for name in ("sources", "libraries", "library_dirs", "include_dirs"):
                setattr(ext, name, getattr(again, name))
            super().build_extensions()
            return f"not built: the compiler failed: {reason}"

        def run(self) -> None:
            # setuptools builds an editable install with inplace=1 but clears the flag while the compiler runs.
            self._in_place = bool(self.inplace)
            super().run()

        def _forget_stale_library(self) -> None:
            # Otherwise an in-place build would copy the library of an earlier, successful build as if it were new.
            for built in (Path(self.build_lib) / "xdfast").glob("_C.*"):
                built.unlink()

    # torch falls back to distutils by itself (and says so) where ninja is missing.
    return [ext], {"build_ext": BuildExt}, None


ext_modules, cmdclass, BuildPy.skipped_because = extension()

setup(
    packages=[*find_packages(include=["xdfast", "xdfast.*"]), "xdfast.kernels", "xdfast.bench"],
    package_dir={"xdfast": "xdfast", "xdfast.kernels": "kernels", "xdfast.bench": "bench"},
    package_data={
        "xdfast": ["py.typed", "recipes/*.yaml", "recipes/*.json"],
        "xdfast.reporting": ["*.j2"],
        "xdfast.deploy": ["*.j2"],
    },
    exclude_package_data={"xdfast": ["*.so", INFO_NAME]},  # built in place by an editable install; never shipped
    ext_modules=ext_modules,
    cmdclass={"build_py": BuildPy, **cmdclass},
    zip_safe=False,
)
