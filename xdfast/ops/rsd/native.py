"""Column standardisation by compiled code: the C++ extension on the CPU, Triton on CUDA.

Both return what :func:`xdfast.ops.rsd.fast.standardize_torch` returns. float64 stays with plain PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from xdfast.ops.rsd.fast import Standardized, standardize_torch

__all__ = ["cpp_available", "standardize_cpp", "standardize_triton", "triton_available"]


@lru_cache(maxsize=1)
def _load_extension() -> tuple[bool, str]:
    if importlib.util.find_spec("xdfast._C") is None:
        return False, "extension xdfast._C not built: pip install --no-build-isolation . (needs a C++ compiler)"
    try:
        importlib.import_module("xdfast._C")  # its static initialisers register xdfast_c::*
    except ImportError as error:
        return False, f"extension xdfast._C does not load ({error}); rebuild it for torch {torch.__version__}"
    return True, "compiled extension xdfast._C: fused column standardisation, then matrix-chain order"


def cpp_available(device: str) -> tuple[bool, str]:
    """Whether the C++ kernels can run on ``device``, and why (not)."""
    if device != "cpu":
        return False, "the C++ kernels are for CPU tensors"
    return _load_extension()


@lru_cache(maxsize=1)
def _load_triton() -> tuple[bool, str]:
    kernels = importlib.import_module("xdfast.kernels")
    return bool(kernels.HAS_TRITON), kernels.WHY_NOT or "Triton kernel for the column standardisation"


def triton_available(device: str) -> tuple[bool, str]:
    """Whether the Triton kernels can run on ``device``, and why (not)."""
    if device != "cuda":
        return False, "the Triton kernels are for CUDA tensors"
    ok, reason = _load_triton()
    return ok, f"{reason}; runs when forced, no measured figure on a GPU prefers it yet" if ok else reason


def standardize_cpp(x: Tensor, eps: float) -> Standardized:
    """:func:`standardize_torch` by ``xdfast_c::rsd_standardize`` (csrc/cpu/rsd.cpp)."""
    if x.dtype == torch.float64:
        return standardize_torch(x, eps)
    return torch.ops.xdfast_c.rsd_standardize(x, eps)


def standardize_triton(x: Tensor, eps: float) -> Standardized:
    """:func:`standardize_torch` by ``xdfast.kernels.rsd`` (kernels/rsd.py)."""
    if x.dtype == torch.float64:
        return standardize_torch(x, eps)
    from xdfast.kernels.rsd import column_standardize

    return column_standardize(x, eps)
