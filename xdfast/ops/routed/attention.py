"""``xdfast::routed_attention``: attention inside each sample's active rows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from xdfast.ops._backends import Backend, register_table, select
from xdfast.ops._define import define_op
from xdfast.ops._extension import cpp_available

__all__ = ["attention_op"]

_NAME = "routed_attention"


class _SampleAttention:
    """Sample by sample through torch's scaled_dot_product_attention; samples of one length together."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor, offsets_k: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        _check_rise("offsets_q", offsets_q, q.shape[0])
        _check_rise("offsets_k", offsets_k, k.shape[0])
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
        for rows_q, rows_k, shape in _groups(offsets_q, offsets_k):
            one, log = _forward(*_batched(q, k, v, rows_q, rows_k, shape), scale, causal)
            out[rows_q] = one.transpose(1, 2).flatten(0, 1)
            lse[rows_q] = log.transpose(1, 2).flatten(0, 1)
        return out, lse

    @staticmethod
    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets_q: Tensor, offsets_k: Tensor,
        scale: float, causal: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        for rows_q, rows_k, shape in _groups(offsets_q, offsets_k):
            samples, tq, _ = shape
            qb, kb, vb = _batched(q, k, v, rows_q, rows_k, shape)
            d, o = (t[rows_q].unflatten(0, (samples, tq)).transpose(1, 2) for t in (dout, out))
            log = lse[rows_q].unflatten(0, (samples, tq)).transpose(1, 2).contiguous()
            one = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                d, qb, kb, vb, o, log, 0.0, causal, scale=scale
            )
            dq[rows_q] = one[0].transpose(1, 2).flatten(0, 1)
            for total, part in ((dk, one[1]), (dv, one[2])):
                part = part.transpose(1, 2).flatten(0, 1)  # [rows, H, d]; grouped heads add up
                total[rows_k] = part.unflatten(1, (total.shape[1], -1)).sum(2)
        return dq, dk, dv


def _check_rise(name: str, offsets: Tensor, rows: int) -> None:
    """As csrc/cpu/attention.cpp does: a plan of another batch is told before it cuts the rows wrong."""
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] > rows or ends != sorted(ends):
        raise ValueError(f"{name} must rise from 0 to at most {rows} rows, got {ends}")


def _groups(offsets_q: Tensor, offsets_k: Tensor) -> list[tuple[slice, slice, tuple[int, int, int]]]:
    """(query rows, key rows, (samples, queries, keys each)) of runs of samples with equal lengths, empty ones left out."""
    found: list[tuple[slice, slice, tuple[int, int, int]]] = []
    starts_q, starts_k = offsets_q.tolist(), offsets_k.tolist()
    for b in range(len(starts_q) - 1):
        tq, tk = starts_q[b + 1] - starts_q[b], starts_k[b + 1] - starts_k[b]
        if tq == 0:
            continue
        if found:
            rows_q, rows_k, (samples, last_q, last_k) = found[-1]
            if (tq, tk) == (last_q, last_k) and rows_k.stop == starts_k[b]:
                shape = (samples + 1, tq, tk)
                found[-1] = (slice(rows_q.start, starts_q[b + 1]), slice(rows_k.start, starts_k[b + 1]), shape)
                continue
        found.append((slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1]), (1, tq, tk)))
    return found


def _batched(
    q: Tensor, k: Tensor, v: Tensor, rows_q: slice, rows_k: slice, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    samples, tq, tk = shape
    qb = q[rows_q].unflatten(0, (samples, tq)).transpose(1, 2)
    kb, vb = (t[rows_k].unflatten(0, (samples, tk)).transpose(1, 2) for t in (k, v))
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        kb, vb = kb.repeat_interleave(groups, 1), vb.repeat_interleave(groups, 1)
    return qb, kb, vb


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


class _CppAttention(_SampleAttention):
    """Forward by ``xdfast_c::attention`` (csrc/cpu/attention.cpp), which leaves what torch's backward needs."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor, offsets_k: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        if q.dtype != torch.float32 and (q.dtype != torch.bfloat16 or not _bf16_products() or q.shape[2] % 2):
            return _SampleAttention.forward(q, k, v, offsets_q, offsets_k, scale, causal)
        # contiguous() leaves a tensor without rows as it is, whatever its strides
        q, k, v = (t if t.numel() else t.new_empty(t.shape) for t in (q, k, v))
        q, k, v = (t if t.stride(2) == 1 and t.stride(0) % 2 == 0 else t.contiguous() for t in (q, k, v))
        return torch.ops.xdfast_c.attention.default(q, k, v, offsets_q, offsets_k, scale, causal)


@lru_cache(maxsize=1)
def _bf16_products() -> bool:
    return bool(torch.ops.xdfast_c.cpu_has_bf16_gemm())


register_table(
    _NAME,
    [
        Backend("cpp", cpp_available, _CppAttention),
        Backend("torch", lambda device: (True, "torch's scaled_dot_product_attention by sample"), _SampleAttention),
        Backend("reference", lambda device: (True, "the same as torch's"), _SampleAttention, automatic=False),
    ],
)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor, offsets_k: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    run = _SampleAttention if q.dtype == torch.float64 else select(_NAME, q.device.type).run
    return run.forward(q, k, v, offsets_q, offsets_k, scale, causal)


def _fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:2], dtype=wide)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, offsets_q, offsets_k, ctx.scale, ctx.causal = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, offsets_q, offsets_k)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 7
    return *_backward_op(grad, *ctx.saved_tensors, ctx.scale, ctx.causal), *(None,) * 4


def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, offsets_q: Tensor, offsets_k: Tensor,
    scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _SampleAttention.backward(dout, q, k, v, out, lse, offsets_q, offsets_k, scale, causal)


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    return dq, dk, dv


_backward_op = define_op("routed_attention_backward", _attention_backward, fake=_fake_backward)
attention_op = define_op(_NAME, _attention, fake=_fake, setup_context=_setup_context, backward=_backward)
