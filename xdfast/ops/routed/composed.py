"""Routed linear maps composed of row passes and library products: forward and backward, for any :class:`RowPasses`.

The number of active rows is read from the device; on the CPU that costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from xdfast.ops.routed.rows import RowPasses

__all__ = ["ComposedRouted"]

_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


class ComposedRouted:
    """The implementation behind the backends ``cpp`` and ``torch``; the maths is in :mod:`xdfast.ops.routed`."""

    def __init__(self, rows: RowPasses) -> None:
        self.rows = rows

    def ln_linear(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm_weight: Tensor | None,
        norm_bias: Tensor | None, index: Tensor, count: Tensor, units: int, rows_per_unit: int, norm: str, eps: float,
        act: str, save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(out, pre-activation, statistics); the last two [0, …] where not saved."""
        capacity = (units if units >= 0 else index.numel()) * rows_per_unit
        units = _units(count, units)
        save_statistics = save and norm != "none"
        y, statistics = self.rows.gather_norm(
            x, norm_weight, norm_bias, index, units, rows_per_unit, norm, eps, save_statistics
        )
        pre = x.new_empty(0, 0)
        if weight is not None:
            y = functional.linear(y.to(weight.dtype), weight, bias)
            if act != "none":
                pre = y if save else pre
                y = self._activate(y, act, in_place=not save)
        pre = pre if pre.shape[1] == 0 else _padded(pre, capacity)
        return _padded(y, capacity), pre, _padded(statistics, capacity) if save_statistics else statistics

    def ln_linear_backward(
        self, dout: Tensor, x: Tensor, pre: Tensor, statistics: Tensor, weight: Tensor | None,
        norm_weight: Tensor | None, norm_bias: Tensor | None, index: Tensor, count: Tensor, units: int, rows_per_unit: int,
        norm: str, eps: float, act: str, wanted: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of (x, weight, bias, norm_weight, norm_bias); [0] where not wanted."""
        units = _units(count, units)
        n = units * rows_per_unit
        dweight, dbias = dout.new_empty(0), dout.new_empty(0)  # outputs of an op may not be one tensor
        dy = dout[:n]
        if weight is not None:
            if act != "none":
                dy = _activation_backward(dy, pre[:n], act)
            if wanted[1]:
                y, _ = self.rows.gather_norm(
                    x, norm_weight, norm_bias, index, units, rows_per_unit, norm, eps, False
                )  # fmt: skip
                dweight = dy.T @ y.to(dy.dtype)
            if wanted[2]:
                dbias = dy.sum(0)
            dy = dy @ weight if wanted[0] or wanted[3] or wanted[4] else dy
        if not (wanted[0] or wanted[3] or wanted[4]):
            return dout.new_empty(0), dweight, dbias, dout.new_empty(0), dout.new_empty(0)
        dx, dnorm_weight, dnorm_bias = self.rows.norm_backward(
            dy, x, norm_weight, statistics[:n], index, units, rows_per_unit, norm, (wanted[3], wanted[4])
        )
        return dx, dweight, dbias, dnorm_weight, dnorm_bias

    def linear_residual_(
        self, x: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, index: Tensor,
        count: Tensor, units: int, rows_per_unit: int,
    ) -> None:  # fmt: skip
        """x[row] += gate[unit] · (h Wᵀ + b)."""
        units = _units(count, units)
        y = h[: units * rows_per_unit]
        if weight is not None:
            y = functional.linear(y, weight, bias)
        self.rows.scatter_add_(x, y, gate, index, units, rows_per_unit)

    def linear_residual_backward(
        self, dout: Tensor, h: Tensor, weight: Tensor | None, bias: Tensor | None, gate: Tensor | None, index: Tensor,
        count: Tensor, units: int, rows_per_unit: int, wanted: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of (h, weight, bias, gate); [0] where not wanted. That of x is ``dout`` itself."""
        units = _units(count, units)
        n = units * rows_per_unit
        taken = h[:n]
        d = self.rows.gather(dout, None, index, units, rows_per_unit).to(h.dtype)
        listed = index[:units].long()
        per_row = None if gate is None else gate[listed].to(h.dtype).repeat_interleave(rows_per_unit)[:, None]
        dh, dweight, dbias, dgate = (dout.new_empty(0) for _ in range(4))  # outputs of an op may not be one tensor
        back = d @ weight if weight is not None and (wanted[0] or wanted[3]) else d
        if wanted[3]:
            dots = self.rows.row_dots(taken, back)
            if bias is not None:
                dots = dots + d.to(dots.dtype) @ bias.to(dots.dtype)
            assert gate is not None
            dgate = torch.zeros_like(gate, dtype=dots.dtype)
            dgate.index_copy_(0, listed, dots.unflatten(0, (units, rows_per_unit)).sum(-1))
        if wanted[1] or wanted[2]:
            gated = d if per_row is None else d * per_row
            dweight = gated.T @ taken if wanted[1] else dweight
            dbias = gated.sum(0) if wanted[2] else dbias
        if wanted[0]:
            # rows beyond the listed ones do not enter the result: whatever made h must not learn from what lies there
            dh = functional.pad(back if per_row is None else back * per_row, (0, 0, 0, h.shape[0] - n))
        return dh, dweight, dbias, dgate

    def _activate(self, y: Tensor, act: str, *, in_place: bool) -> Tensor:
        if act == "swiglu":
            return self.rows.swiglu(y)
        if act in _GELU:
            gelu = torch.ops.aten.gelu_ if in_place else torch.ops.aten.gelu
            return gelu(y, approximate=_GELU[act])
        return (functional.silu if act == "silu" else functional.relu)(y, inplace=in_place)


def _units(count: Tensor, units: int) -> int:
    """The number of active units: as the host knows it, else read from the device."""
    return units if units >= 0 else int(count)


def _padded(t: Tensor, capacity: int) -> Tensor:
    """``t`` with room for ``capacity`` rows; what is in the room means nothing."""
    if t.shape[0] == capacity:
        return t
    out = t.new_empty(capacity, *t.shape[1:])
    out[: t.shape[0]] = t
    return out


def _activation_backward(d: Tensor, pre: Tensor, act: str) -> Tensor:
    if act in _GELU:
        return torch.ops.aten.gelu_backward(d, pre, approximate=_GELU[act])
    if act == "silu":
        return torch.ops.aten.silu_backward(d, pre)
    if act == "relu":
        return torch.ops.aten.threshold_backward(d, pre, 0)
    gate, up = pre.chunk(2, -1)
    return torch.cat((torch.ops.aten.silu_backward(d * up, gate), d * functional.silu(gate)), -1)
