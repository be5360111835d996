"""Packages that xdfast can use but does not depend on: a clear error when one is missing, and NVIDIA apex found safely.

On PyPI the name ``apex`` belongs to an unrelated web toolkit. NVIDIA apex is built from source and never comes from
PyPI, so it is neither a dependency nor an extra; it is looked for on disk, without importing whatever is there.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from xdfast.errors import nearest

__all__ = ["APEX_OPTIMIZERS", "ApexStatus", "apex_status", "require", "require_apex_optimizer"]

#: What ``optimizer="apex-NAME"`` accepts → class in ``apex.optimizers``.
APEX_OPTIMIZERS = {
    "fusedadam": "FusedAdam",
    "fusedlamb": "FusedLAMB",
    "fusedsgd": "FusedSGD",
    "fusednovograd": "FusedNovoGrad",
    "fusedadagrad": "FusedAdagrad",
}

_BUILD_APEX = (
    "build NVIDIA apex from its source (github.com/NVIDIA/apex), on a machine with a CUDA compiler that matches torch: "
    "`APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation .` in its folder. Or use torch's own fused "
    'optimisers (optimizer="adamw", "sgd") or timm\'s (optimizer="lamb"), which need nothing else'
)


def require(package: str, extra: str | None = None, *, purpose: str = "") -> ModuleType:
    """Imports an optional package.

    Args:
        package: import name, e.g. ``"gymnasium"`` or ``"nvidia.dali"``.
        extra: the xdfast extra that installs it; None for a package that no extra holds.
        purpose: what needs it, for the message, e.g. ``"the MetaWorld tasks"``.

    Raises:
        ImportError: the package is not installed (the message has the pip line), or it is and fails to import (then
            the message says so, with the cause chained).
    """
    install = f'pip install "xdfast[{extra}]"' if extra else f"pip install {package.split('.')[0]}"
    needed = f"{package} is needed" + (f" for {purpose}" if purpose else "")
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if package == missing or package.startswith(f"{missing}."):
            raise ImportError(f"{needed} and is not installed: {install}", name=package) from error
        raise ImportError(
            f"{needed} and is installed, but it fails to import: {missing!r} is missing. Reinstall it: {install}",
            name=package,
        ) from error
    except ImportError as error:
        raise ImportError(
            f"{needed} and is installed, but it fails to import: {error}. Reinstall it: {install}", name=package
        ) from error


@dataclass(frozen=True)
class ApexStatus:
    """What the import name ``apex`` stands for here.

    Attributes:
        kind: ``"nvidia"``, ``"impostor"`` or ``"missing"``.
        usable: NVIDIA apex with its CUDA kernels, on a machine with a CUDA device.
        message: one sentence for people, with the fix where there is one.
        path: the folder found, or None.
    """

    kind: str
    usable: bool
    message: str
    path: str | None = None


def apex_status() -> ApexStatus:
    """Looks for NVIDIA apex without importing anything named ``apex``."""
    try:
        spec = importlib.util.find_spec("apex")
    except (ImportError, ValueError) as error:  # ValueError: a module put in sys.modules without a spec
        return ApexStatus("missing", False, f"apex cannot be looked up ({type(error).__name__}: {error})")
    if spec is None:
        return ApexStatus("missing", False, f"NVIDIA apex is not installed; to use its optimisers, {_BUILD_APEX}")
    folders = [Path(p) for p in spec.submodule_search_locations or ()]
    path = str(folders[0]) if folders else str(spec.origin)
    # What makes apex NVIDIA's apex for us: the package of fused optimisers.
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return ApexStatus(
            "impostor",
            False,
            f"the package named apex at {path} is not NVIDIA apex (it has no optimizers/fused_adam.py): on PyPI that "
            f"name is an unrelated web toolkit. Run `pip uninstall apex`, then {_BUILD_APEX}",
            path,
        )
    if importlib.util.find_spec("amp_C") is None:
        return ApexStatus(
            "nvidia",
            False,
            f"NVIDIA apex at {path} was built without its CUDA kernels (no amp_C module); {_BUILD_APEX}",
            path,
        )
    import torch

    if not torch.cuda.is_available():
        why = "torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA device"
        return ApexStatus("nvidia", False, f"NVIDIA apex at {path} needs a CUDA device, and {why}", path)
    return ApexStatus("nvidia", True, f"NVIDIA apex with CUDA kernels at {path}", path)


def require_apex_optimizer(name: str) -> type:
    """The fused optimiser class of NVIDIA apex.

    Args:
        name: ``"fusedlamb"``, ``"fusedadam"``, ``"fusedsgd"``, …; an ``"apex-"`` prefix is accepted.

    Raises:
        ValueError: apex has no such optimiser here.
        ImportError: apex is missing, is the PyPI impostor, has no CUDA kernels, or there is no CUDA device; the message
            says which, and what to do.
    """
    short = name.lower().removeprefix("apex-")
    if short not in APEX_OPTIMIZERS:
        known = [f"apex-{known}" for known in APEX_OPTIMIZERS]
        raise ValueError(
            f"unknown apex optimizer {name!r}; known: {', '.join(known)}.{nearest('apex-' + short, known)}"
        )
    status = apex_status()
    if not status.usable:
        raise ImportError(f'optimizer="apex-{short}" cannot be used: {status.message}', name="apex")
    module = require("apex.optimizers", purpose=f'optimizer="apex-{short}"')
    return getattr(module, APEX_OPTIMIZERS[short])
