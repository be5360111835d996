"""The RSD op by compiled code: the C++ extension on the CPU, Triton on CUDA. float64 stays with plain PyTorch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from xdfast.ops._define import watched
from xdfast.ops._extension import cpp_available, triton_state
from xdfast.ops.rsd.fast import Outputs, compute_dtype, prepare_torch, rsd_forward, standardize

__all__ = [
    "cpp_available",
    "direct",
    "loss_cpp",
    "prepare_cpp",
    "prepare_triton",
    "run_cpp",
    "run_triton",
    "triton_available",
]


def triton_available(device: str) -> tuple[bool, str]:
    """Whether the Triton kernels can run on ``device``, and why (not)."""
    if device != "cuda":
        return False, "the Triton kernels are for CUDA tensors"
    ok, reason = triton_state("loss and gradient in three launches")
    return ok, f"{reason}; runs when forced, no measured figure on a GPU prefers it yet" if ok else reason


@lru_cache(maxsize=1)
def _bf16_gemm() -> bool:
    return bool(torch.ops.xdfast_c.cpu_has_bf16_gemm())


def direct(student: Tensor, teacher: Tensor) -> bool:
    """Whether :func:`loss_cpp` may stand for the op where the C++ backend is chosen: on the CPU, seen by nobody."""
    return (
        student.device.type == "cpu"
        and student.dtype != torch.float64
        and teacher.dtype != torch.float64
        and not watched((student, teacher))
    )


def loss_cpp(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, eps_mode: str, precision: str, scale: float,
    statistics: Tensor | None, gram: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, invariance, decorrelation, mean diagonal), differentiable, by ``xdfast_c::rsd_loss_autograd``
    (csrc/cpu/rsd_autograd.cpp): the kernels of :func:`run_cpp` under a gradient rule in C++, which costs a small loss
    less than one in Python."""
    bf16 = precision == "bfloat16" and _bf16_gemm()
    return torch.ops.xdfast_c.rsd_loss_autograd.default(
        student, teacher, kappa, eps, eps_mode == "var", bf16, scale, statistics, gram
    )


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
