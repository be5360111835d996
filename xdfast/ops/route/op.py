"""``xdfast::route_plan_``: schema, fake kernel and backends of the planner. It has no gradient: lists are no numbers."""

from __future__ import annotations

import importlib
from functools import lru_cache

import torch
from torch import Tensor

from xdfast.ops._backends import Backend, register_table, select
from xdfast.ops._extension import cpp_available, triton_state
from xdfast.ops.route.reference import route_plan_reference

__all__ = ["route_plan_op"]

_NAME = "route_plan_"


def _run_cpp(*args: object) -> None:
    torch.ops.xdfast_c.route_plan_.default(*args)


def _run_triton(*args: object) -> None:
    importlib.import_module("xdfast.kernels.route_plan").route_plan(*args)


def _run_torch(
    gates: Tensor, force: Tensor | None, threshold: float, hard: bool, rows_per_unit: int, samples: int, *out: Tensor
) -> None:
    made = route_plan_reference(gates, force, threshold, hard, rows_per_unit, samples)
    for buffer, value in zip(out, made, strict=True):
        buffer.copy_(value)


@lru_cache(maxsize=1)
def _cuda_planner() -> bool:
    ok, _ = cpp_available("cpu")
    return ok and torch._C._dispatch_has_kernel_for_dispatch_key("xdfast_c::route_plan_", "CUDA")


def _triton_available(device: str) -> tuple[bool, str]:
    if device != "cuda":
        return False, "the Triton planner is for CUDA tensors"
    return triton_state("one launch, no synchronisation")


def _cuda_available(device: str) -> tuple[bool, str]:
    if device != "cuda":
        return False, "the CUDA planner is for CUDA tensors"
    if not _cuda_planner():
        return False, "the extension xdfast._C was built without CUDA"
    return True, "one launch, no synchronisation; runs when forced, no measured figure prefers it to Triton yet"


register_table(
    _NAME,
    [
        Backend("cuda", _cuda_available, _run_cpp, automatic=False),
        Backend("triton", _triton_available, _run_triton),
        Backend("cpp", cpp_available, _run_cpp),
        Backend("torch", lambda device: (True, "plain PyTorch (a sort), any device"), _run_torch),
        Backend("reference", lambda device: (True, "the definition, the same as torch's"), _run_torch, automatic=False),
    ],
)


@torch.library.custom_op(
    f"xdfast::{_NAME}", mutates_args=("gate", "index", "count", "offsets", "invalid"), device_types=("cpu", "cuda")
)
def route_plan_op(
    gates: Tensor,
    force: Tensor | None,
    threshold: float,
    hard: bool,
    rows_per_unit: int,
    samples: int,
    gate: Tensor,
    index: Tensor,
    count: Tensor,
    offsets: Tensor,
    invalid: Tensor,
) -> None:
    """Writes the plan of ``gates`` [U, L, S] into the buffers; see :class:`xdfast.ops.route.RoutePlan`."""
    select(_NAME, gates.device.type).run(
        gates, force, threshold, hard, rows_per_unit, samples, gate, index, count, offsets, invalid
    )


@route_plan_op.register_fake
def _(
    gates: Tensor, force: Tensor | None, threshold: float, hard: bool, rows_per_unit: int, samples: int, *out: Tensor
) -> None:
    return None
