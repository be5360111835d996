"""``xdfast::rsd_loss``: schema, fake kernel, autograd and backends of the cross-correlation loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdfast.ops._backends import Backend, register_table, select
from xdfast.ops._define import define_op, is_one
from xdfast.ops.rsd import native
from xdfast.ops.rsd.fast import PRECISIONS, Outputs, compute_dtype, prepare_torch, rsd_forward
from xdfast.ops.rsd.reference import rsd_loss_reference

__all__ = ["fake_outputs", "reference_components", "resolve_precision", "rsd_parts", "rsd_prepare_op"]

_NAME = "rsd_loss"


def _rsd_loss(
    student: Tensor,
    teacher: Tensor,
    kappa: float,
    eps: float,
    eps_mode: str,
    precision: str,
    scale: float,
    need_student: bool,
    need_teacher: bool,
    statistics: Tensor | None,
    gram: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = select(_NAME, student.device.type).run
    return run(
        student, teacher, kappa, eps, eps_mode, precision, scale, need_student, need_teacher, statistics, gram
    )  # fmt: skip


def fake_outputs(student: Tensor, teacher: Tensor, need_student: bool, need_teacher: bool) -> Outputs:
    """What the op returns, in shapes and dtypes alone."""
    dtype = compute_dtype(student, teacher)
    loss, invariance, decorrelation, mean_diagonal = (student.new_empty((), dtype=dtype) for _ in range(4))
    grad_s = student.new_empty(student.shape if need_student else (0, 0))
    grad_t = teacher.new_empty(teacher.shape if need_teacher else (0, 0))
    return loss, invariance, decorrelation, mean_diagonal, grad_s, grad_t


def _fake(student: Tensor, teacher: Tensor, *options: Any) -> Outputs:
    return fake_outputs(student, teacher, *options[5:7])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, ctx.kappa, ctx.eps, ctx.eps_mode, _, ctx.scale, ctx.need_student, ctx.need_teacher, _, _ = inputs
    _, invariance, decorrelation, mean_diagonal, grad_s, grad_t = output
    # Only the loss carries a gradient; the components are for logging, the gradients are saved results.
    ctx.mark_non_differentiable(invariance, decorrelation, mean_diagonal, grad_s, grad_t)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(student, teacher, grad_s, grad_t)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    student, teacher, grad_s, grad_t = ctx.saved_tensors
    if grad is None:
        return (None,) * 11
    if torch.is_grad_enabled():
        # create_graph=True: the saved gradient is a number to autograd, its own derivative would be silently lost.
        # The reference equation is differentiable to any order.
        grad_s, grad_t = _differentiable_gradients(ctx, student, teacher)
    elif is_one(grad):
        return grad_s if ctx.need_student else None, grad_t if ctx.need_teacher else None, *(None,) * 9
    out_s = grad_s * grad.to(grad_s.dtype) if ctx.need_student else None
    out_t = grad_t * grad.to(grad_t.dtype) if ctx.need_teacher else None
    return out_s, out_t, *(None,) * 9


def _differentiable_gradients(ctx: Any, student: Tensor, teacher: Tensor) -> tuple[Tensor | None, Tensor | None]:
    wanted = [x for x, need in ((student, ctx.need_student), (teacher, ctx.need_teacher)) if need]
    loss = reference_components(student, teacher, ctx.kappa, ctx.eps, ctx.eps_mode, ctx.scale)[0]
    grads = list(torch.autograd.grad(loss, wanted, create_graph=True))
    return grads.pop(0) if ctx.need_student else None, grads.pop(0) if ctx.need_teacher else None


def reference_components(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, eps_mode: str, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, invariance, decorrelation, mean diagonal) by the equation, half inputs in float32; plain autograd."""
    dtype = compute_dtype(student, teacher)
    with torch.autocast(device_type=student.device.type, enabled=False):
        parts = rsd_loss_reference(student.to(dtype), teacher.to(dtype), eps, eps_mode)
        invariance, decorrelation, mean_diagonal = parts
        loss = (invariance + kappa * decorrelation) * scale
    return loss, invariance.detach(), decorrelation.detach(), mean_diagonal.detach()


def _run_reference(*_: Any) -> Outputs:
    raise RuntimeError("the reference backend is plain autograd and is called by rsd_loss() outside the op")


def _rsd_prepare(teacher: Tensor, eps: float, eps_mode: str, precision: str) -> tuple[Tensor, Tensor]:
    backend = select(_NAME, teacher.device.type).name
    prepare = {"cpp": native.prepare_cpp, "triton": native.prepare_triton}.get(backend, prepare_torch)
    return prepare(teacher, eps, eps_mode, precision)


def _fake_prepare(teacher: Tensor, eps: float, eps_mode: str, precision: str) -> tuple[Tensor, Tensor]:
    n, d = teacher.shape
    dtype = compute_dtype(teacher)
    return teacher.new_empty((4, d), dtype=dtype), teacher.new_empty((n, n) if n < d else (0, 0), dtype=dtype)


register_table(
    _NAME,
    [
        Backend("triton", native.triton_available, native.run_triton, automatic=False),
        Backend("cpp", native.cpp_available, native.run_cpp),
        Backend("torch", lambda device: (True, "plain PyTorch, matrix-chain order, any device"), rsd_forward),
        Backend(
            "reference",
            lambda device: (True, "the equation with its D×D matrix; for tests and baselines"),
            _run_reference,
            automatic=False,
        ),
    ],
)

rsd_loss_op = define_op(_NAME, _rsd_loss, fake=_fake, setup_context=_setup_context, backward=_backward)
rsd_prepare_op = define_op("rsd_prepare", _rsd_prepare, fake=_fake_prepare)


def rsd_parts(
    student: Tensor, teacher: Tensor, kappa: float, eps: float, eps_mode: str, precision: str, scale: float,
    statistics: Tensor | None, gram: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, invariance, decorrelation, mean diagonal); the loss carries gradients for what requires one."""
    options = (kappa, eps, eps_mode, precision, scale)
    if native.direct(student, teacher) and select(_NAME, "cpu").name == "cpp":
        return native.loss_cpp(student, teacher, *options, statistics, gram)
    grads = torch.is_grad_enabled()
    need = (grads and student.requires_grad, grads and teacher.requires_grad)
    return rsd_loss_op(student, teacher, *options, *need, statistics, gram)[:4]


def resolve_precision(precision: str, device: str) -> str:
    """``"auto"`` → what matrix products would use here: autocast's dtype, else ``torch.get_float32_matmul_precision()``."""
    if precision != "auto":
        return precision
    if torch.is_autocast_enabled(device):
        name = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        return name if name in PRECISIONS else "float32"
    return {"highest": "float32", "high": "tf32", "medium": "bfloat16"}[_matmul_precision()]


def _matmul_precision() -> str:
    return torch.get_float32_matmul_precision()


# The compiler cannot trace a call that returns a string. `torch.compiler.assume_constant_result` sets this mark and
# nothing else, but imports all of torch._dynamo for it: 3 s of every process that only wants a loss.
_matmul_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]
