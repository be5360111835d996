"""What the tests of the routed kernels share: plans with poison in them, and the equations in fp64."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-5
NAN = float("nan")


def randn(*shape: int, seed: int, dtype: str = "float32", scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return (torch.randn(shape, generator=generator) * scale + shift).to(getattr(torch, dtype))


def plan(units: int, rows_per_unit: int, fill: str = "some", seed: int = 0) -> SimpleNamespace:
    """One layer's lists: garbage from count on, gates of inactive units NaN."""
    active = (
        torch.rand(units, generator=torch.Generator().manual_seed(seed)) < {"some": 0.6, "none": -1, "all": 2}[fill]
    )
    listed = active.nonzero().flatten()
    index = torch.full((units,), 123456789, dtype=torch.int32)
    index[: len(listed)] = listed.int()
    gate = torch.rand(units, generator=torch.Generator().manual_seed(seed + 1)) + 0.1
    rows = (listed[:, None] * rows_per_unit + torch.arange(rows_per_unit)).flatten()
    used = gate.clone()
    used[~active] = NAN
    inactive = torch.ones(units * rows_per_unit, dtype=torch.bool)
    inactive[rows] = False
    count = torch.tensor([len(listed)], dtype=torch.int32)
    return SimpleNamespace(
        where=(index, count, rows_per_unit), gate=used, rows=rows, unit=listed.repeat_interleave(rows_per_unit),
        listed=listed, inactive=inactive, n=len(rows), capacity=units * rows_per_unit,
    )  # fmt: skip


def compact(p: SimpleNamespace, columns: int, dtype: str, filled: Tensor | None = None) -> Tensor:
    """A buffer of NaN, or with the active rows filled."""
    out = torch.full((p.capacity, columns), NAN, dtype=getattr(torch, dtype))
    if filled is not None:
        out[: p.n] = filled
    return out


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str) -> Tensor:
    d = x.shape[-1:]
    if norm == "none":
        return x
    return functional.layer_norm(x, d, weight, bias, EPS) if norm == "layer" else functional.rms_norm(x, d, weight, EPS)


def activate(x: Tensor, act: str) -> Tensor:
    if act == "swiglu":
        a, b = x.chunk(2, -1)
        return functional.silu(a) * b
    if act == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    return x if act == "none" else getattr(functional, act)(x)


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def close(got: Tensor, want: Tensor, limit: float) -> None:
    assert got.shape == want.shape and got.isfinite().all()
    if want.numel():
        assert (got.double() - want).norm() <= limit * want.norm() + 1e-12, (got.double() - want).norm() / want.norm()
