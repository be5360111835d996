"""The RSD op by compiled code: the C++ extension on the CPU, Triton on CUDA. float64 stays with plain PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from xdfast.ops.rsd.fast import Outputs, compute_dtype, prepare_torch, rsd_forward, standardize

__all__ = ["cpp_available", "prepare_cpp", "prepare_triton", "run_cpp", "run_triton", "triton_available"]


@lru_cache(maxsize=1)
def _load_extension() -> tuple[bool, str]:
    if importlib.util.find_spec("xdfast._C") is None:
        return False, "extension xdfast._C not built: pip install --no-build-isolation . (needs a C++ compiler)"
    try:
        importlib.import_module("xdfast._C")  # its static initialisers register xdfast_c::*
    except ImportError as error:
        return False, f"extension xdfast._C does not load ({error}); rebuild it for torch {torch.__version__}"
    ops = torch.ops.xdfast_c
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
    return bool(kernels.HAS_TRITON), kernels.WHY_NOT or "Triton kernels: loss and gradient in three launches"


def triton_available(device: str) -> tuple[bool, str]:
    """Whether the Triton kernels can run on ``device``, and why (not)."""
    if device != "cuda":
        return False, "the Triton kernels are for CUDA tensors"
    ok, reason = _load_triton()
    return ok, f"{reason}; runs when forced, no measured figure on a GPU prefers it yet" if ok else reason


@lru_cache(maxsize=1)
def _bf16_gemm() -> bool:
    return bool(torch.ops.xdfast_c.cpu_has_bf16_gemm())


def run_cpp(student: Tensor, teacher: Tensor, *options: Any) -> Outputs:
    """:func:`xdfast.ops.rsd.fast.rsd_forward` by ``xdfast_c::rsd_loss`` (csrc/cpu/rsd.cpp); same arguments."""
    if compute_dtype(student, teacher) == torch.float64:
        return rsd_forward(student, teacher, *options)
    kappa, eps, eps_mode, precision, *rest = options  # scale, which gradients, the prepared teacher's tensors
    bf16 = precision == "bfloat16" and _bf16_gemm()
    return torch.ops.xdfast_c.rsd_loss.default(student, teacher, kappa, eps, eps_mode == "var", bf16, *rest)


def prepare_cpp(teacher: Tensor, eps: float, eps_mode: str, precision: str) -> tuple[Tensor, Tensor]:
    """:func:`xdfast.ops.rsd.fast.prepare_torch` by ``xdfast_c::rsd_prepare`` (csrc/cpu/rsd.cpp)."""
    if teacher.dtype == torch.float64:
        return prepare_torch(teacher, eps, eps_mode, precision)
    bf16 = precision == "bfloat16" and _bf16_gemm()
    return torch.ops.xdfast_c.rsd_prepare.default(teacher, eps, eps_mode == "var", bf16)


def run_triton(student: Tensor, teacher: Tensor, *options: Any) -> Outputs:
    """:func:`xdfast.ops.rsd.fast.rsd_forward` by ``xdfast.kernels.rsd`` (kernels/rsd.py); same arguments."""
    if compute_dtype(student, teacher) == torch.float64:
        return rsd_forward(student, teacher, *options)
    from xdfast.kernels.rsd import rsd_loss_and_gradients

    # The teacher's statistics cost nothing beside reading it, which the kernel has to do anyway; its Gram matrix does.
    *first, _, gram = options
    return rsd_loss_and_gradients(student, teacher, *first, gram)


def prepare_triton(teacher: Tensor, eps: float, eps_mode: str, precision: str) -> tuple[Tensor, Tensor]:
    """:func:`xdfast.ops.rsd.fast.prepare_torch` by ``xdfast.kernels.rsd`` (kernels/rsd.py)."""
    if teacher.dtype == torch.float64:
        return prepare_torch(teacher, eps, eps_mode, precision)
    from xdfast.kernels.rsd import teacher_gram

    n, d = teacher.shape
    _, statistics = standardize(teacher.float(), eps, eps_mode)
    if n >= d:
        return statistics, statistics.new_empty(0, 0)
    return statistics, teacher_gram(teacher, eps, eps_mode, precision).float()
