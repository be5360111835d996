"""What tests of routed layers share: plans, inputs and the dense equation with masks in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import xdfast
from xdfast.ops import make_plan
from xdfast.ops.route import RouteList


def routed_backends() -> list:
    """Backends of the routed linear maps that run on this CPU, as pytest parameters."""
    import pytest

    report = next(r for r in xdfast.ops.explain(["cpu"]) if r.op == "routed_linear")
    return [
        pytest.param(rung.backend, marks=() if rung.available else pytest.mark.skip(reason=rung.reason))
        for rung in report.rungs
        if rung.backend in ("cpp", "torch")
    ]


def route_of(active: list[bool], rows_per_unit: int, *, gate: Tensor | None = None, known: bool = True) -> RouteList:
    """The list of units that are on, with garbage where nobody may look; multipliers ``gate`` [U] if given."""
    on = torch.tensor(active)
    gates = on.float() if gate is None else torch.where(on, gate.detach().float().clamp(0.51, 1), 0.0)
    plan = make_plan(gates[:, None], rows_per_unit=rows_per_unit, hard=gate is None)
    route = plan.of(0)
    count = int(on.sum())
    index = route.index.clone()
    index[count:] = 2**30
    return RouteList(
        route.gate if gate is None else gate,
        index,
        route.count,
        route.offsets,
        rows_per_unit,
        count if known else None,
    )


def row_mask(route: RouteList) -> Tensor:
    """Which rows are listed, [R] bool."""
    mask = torch.zeros(route.index.numel(), dtype=torch.bool)
    mask[route.index[: int(route.count)].long()] = True
    return mask.repeat_interleave(route.rows_per_unit)


def normalised(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    """By torch's own functions."""
    if norm == "layer":
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return x if norm == "none" else functional.rms_norm(x, x.shape[-1:], weight, eps)


def activated(x: Tensor, act: str) -> Tensor:
    if act == "swiglu":
        a, b = x.chunk(2, -1)
        return functional.silu(a) * b
    if act.startswith("gelu"):
        return functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")
    return x if act == "none" else getattr(functional, act)(x)
