"""``xdfast::rsd_loss``: schema, fake kernel, autograd and backends of the RSD loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from xdfast.ops._backends import Backend, register_table, select
from xdfast.ops._define import define_op
from xdfast.ops.rsd import native
from xdfast.ops.rsd.fast import rsd_forward, standardize_torch
from xdfast.ops.rsd.reference import rsd_loss_reference

__all__ = ["rsd_loss_op"]

_NAME = "rsd_loss"


def _rsd_loss(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = select(_NAME, student.device.type).run
    invariance, decorrelation, mean_diagonal, grad_s, grad_t = run(
        student, teacher, kappa, eps, need_student, need_teacher
    )
    return invariance + kappa * decorrelation, invariance, decorrelation, mean_diagonal, grad_s, grad_t


def _fake(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, need_student: bool, need_teacher: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    double = torch.float64 in (student.dtype, teacher.dtype)
    loss, invariance, decorrelation, mean_diagonal = (
        student.new_empty((), dtype=torch.float64 if double else torch.float32) for _ in range(4)
    )
    grad_s = student.new_empty(student.shape if need_student else (0,))
    grad_t = teacher.new_empty(teacher.shape if need_teacher else (0,))
    return loss, invariance, decorrelation, mean_diagonal, grad_s, grad_t


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, ctx.kappa, ctx.eps, ctx.need_student, ctx.need_teacher = inputs
    _, invariance, decorrelation, mean_diagonal, grad_s, grad_t = output
    # Only the loss carries a gradient; the components are for logging, the gradients are saved results.
    ctx.mark_non_differentiable(invariance, decorrelation, mean_diagonal, grad_s, grad_t)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, grad_s, grad_t)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    student, teacher, grad_s, grad_t = ctx.saved_tensors
    if grad is None:
        return None, None, None, None, None, None
    if torch.is_grad_enabled():
        # create_graph=True: the saved gradient is a number to autograd, its own derivative would be silently lost.
        # The reference equation is differentiable to any order.
        grad_s, grad_t = _differentiable_gradients(ctx, student, teacher)
    out_s = grad_s * grad.to(grad_s.dtype) if ctx.need_student else None
    out_t = grad_t * grad.to(grad_t.dtype) if ctx.need_teacher else None
    return out_s, out_t, None, None, None, None


def _differentiable_gradients(ctx: Any, student: Tensor, teacher: Tensor) -> tuple[Tensor | None, Tensor | None]:
    wanted = [x for x, need in ((student, ctx.need_student), (teacher, ctx.need_teacher)) if need]
    with torch.autocast(device_type=student.device.type, enabled=False):
        loss = reference_components(student, teacher, ctx.kappa, ctx.eps)[0]
        grads = list(torch.autograd.grad(loss, wanted, create_graph=True))
    return grads.pop(0) if ctx.need_student else None, grads.pop(0) if ctx.need_teacher else None


def reference_components(
    student: Tensor, teacher: Tensor, kappa: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, invariance, decorrelation, mean diagonal) by the equation, half inputs in float32; plain autograd."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    invariance, decorrelation, mean_diagonal = rsd_loss_reference(student.to(dtype), teacher.to(dtype), eps)
    return invariance + kappa * decorrelation, invariance.detach(), decorrelation.detach(), mean_diagonal.detach()


def _run_reference(*_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    raise RuntimeError("the reference backend is plain autograd and is called by rsd_loss() outside the op")


_run_torch = partial(rsd_forward, standardize=standardize_torch)
_run_cpp = partial(rsd_forward, standardize=native.standardize_cpp)
_run_triton = partial(rsd_forward, standardize=native.standardize_triton)


register_table(
    _NAME,
    [
        Backend("triton", native.triton_available, _run_triton, automatic=False),
        Backend("cpp", native.cpp_available, _run_cpp),
        Backend("torch", lambda device: (True, "plain PyTorch, matrix-chain order, any device"), _run_torch),
        Backend(
            "reference",
            lambda device: (True, "the equation with its D×D matrix; for tests and baselines"),
            _run_reference,
            automatic=False,
        ),
    ],
)

rsd_loss_op = define_op(
    _NAME,
    _rsd_loss,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
