"""Whether the compiled extension and the Triton kernels are at hand, and why (not)."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache

import torch

__all__ = ["cpp_available", "triton_state"]


@lru_cache(maxsize=1)
def _load_extension() -> tuple[bool, str]:
    if importlib.util.find_spec("xdfast._C") is None:
        return False, "extension xdfast._C not built: pip install --no-build-isolation . (needs a C++ compiler)"
    try:
        importlib.import_module("xdfast._C")  # its static initialisers register xdfast_c::*
    except ImportError as error:
        return False, f"extension xdfast._C does not load ({error}); rebuild it for torch {torch.__version__}"
    ops = torch.ops.xdfast_c
    if not hasattr(ops, "route_plan_"):
        return False, "extension xdfast._C is of an older xdfast; rebuild it: pip install --no-build-isolation ."
    bf16 = "bfloat16" if ops.cpu_has_bf16_gemm() else "no bfloat16 (no AVX512-BF16 or AMX)"
    return True, f"compiled extension xdfast._C, {ops.cpu_capability()}; products: float32 by {ops.cpu_gemm()}, {bf16}"


def cpp_available(device: str) -> tuple[bool, str]:
    """Whether the C++ kernels can run on ``device``, and why (not)."""
    if device != "cpu":
        return False, "the C++ kernels are for CPU tensors"
    return _load_extension()


@lru_cache(maxsize=1)
def _load_triton() -> tuple[bool, str]:
    kernels = importlib.import_module("xdfast.kernels")
    return bool(kernels.HAS_TRITON), kernels.WHY_NOT


def triton_state(what: str) -> tuple[bool, str]:
    """(whether Triton can be imported, ``what`` its kernels do, or why not)."""
    ok, why_not = _load_triton()
    return ok, f"Triton kernels: {what}" if ok else why_not
