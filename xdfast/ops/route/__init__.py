"""The plan of routed layers: which rows each layer computes, as compact lists on the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xdfast.ops.route.op import route_plan_op

__all__ = ["RouteList", "RoutePlan", "make_plan"]


@dataclass(frozen=True)
class RouteList:
    """The active units of one branch of one layer.

    Attributes:
        gate: multipliers [U] float32; they carry a gradient if the gates did. None: 1 for every active unit.
        index: active unit ids [U] int32, ascending; entries from ``count`` on mean nothing.
        count: their number, a tensor [1] int32 on the device.
        offsets: active rows per sample, cumulative [B + 1] int32 (``cu_seqlens``).
        rows_per_unit: rows of a unit.
        units: the number of active units where the host knows it, else None.
    """

    gate: Tensor | None
    index: Tensor
    count: Tensor
    offsets: Tensor
    rows_per_unit: int
    units: int | None

    @property
    def capacity(self) -> int:
        """Rows that a compact matrix needs: the exact number where the host knows it, else all."""
        return (self.index.numel() if self.units is None else self.units) * self.rows_per_unit


@dataclass(frozen=True)
class RoutePlan:
    """Which units each layer computes. L layers, S branches of a layer, U units, B samples.

    All tensors are on the gates' device and sized for the worst case: their addresses stay, whatever the gates, and no
    value has to be known to the host (CUDA graphs).

    Attributes:
        gate: multipliers [L, S, U] float32; 0 for inactive units.
        index: active unit ids [L, S, U] int32, ascending, the first ``count`` of them valid.
        count: [L, S] int32.
        offsets: active rows per sample, cumulative [L, S, B + 1] int32.
        invalid: number of gates that are NaN or outside [0, 1], [L, S] int32.
        rows_per_unit: rows of a unit: T (samples), G (blocks of tokens) or 1 (tokens).
        samples: B.
        plain: every listed unit has multiplier 1, so that nobody has to look it up.
        host_counts: ``count`` as numbers, [L][S], where it has been read (:meth:`to_host`).
    """

    gate: Tensor
    index: Tensor
    count: Tensor
    offsets: Tensor
    invalid: Tensor
    rows_per_unit: int
    samples: int
    plain: bool
    host_counts: tuple[tuple[int, ...], ...] | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return self.index.shape[0]

    @property
    def branches(self) -> int:
        """S."""
        return self.index.shape[1]

    @property
    def units(self) -> int:
        """U."""
        return self.index.shape[2]

    @property
    def rows(self) -> int:
        """Rows of the residual stream that the plan is for: U · rows_per_unit."""
        return self.units * self.rows_per_unit

    def of(self, layer: int, branch: int = 0) -> RouteList:
        """The list of one branch; a plan with one branch per layer answers for all of them."""
        branch = min(branch, self.branches - 1)
        units = None if self.host_counts is None else self.host_counts[layer][branch]
        return RouteList(
            None if self.plain else self.gate[layer, branch],
            self.index[layer, branch],
            self.count[layer, branch : branch + 1],
            self.offsets[layer, branch],
            self.rows_per_unit,
            units,
        )

    def to_host(self) -> RoutePlan:
        """The plan with ``host_counts``: one read of L · S numbers, one wait on a GPU, none on the CPU.

        Raises:
            ValueError: gates are NaN or outside [0, 1]; names the layer.
        """
        if self.host_counts is not None:
            return self
        both = torch.stack((self.count, self.invalid))
        if both.is_cuda:
            pinned = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            pinned.copy_(both, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            event.synchronize()
            both = pinned
        counts, invalid = both.tolist()
        for layer, numbers in enumerate(invalid):
            if any(numbers):
                raise ValueError(
                    f"{sum(numbers)} gates of layer {layer} are NaN or outside [0, 1]; gates are probabilities or 0 and 1 "
                    "(apply a sigmoid to a router's logits)"
                )
        return replace(self, host_counts=tuple(tuple(row) for row in counts))

    def active_fraction(self) -> Tensor:
        """Fraction of active units [L, S] float32, on the device."""
        return self.count / self.units


def make_plan(
    gates: Tensor,
    *,
    rows_per_unit: int,
    samples: int | None = None,
    threshold: float = 0.5,
    hard: bool = True,
    force: Tensor | None = None,
    out: RoutePlan | None = None,
) -> RoutePlan:
    r"""Compact lists of the active units of every layer, in one kernel and without a synchronisation.

    A unit is active in a layer if its gate is above ``threshold``. Units are whole samples (``rows_per_unit`` = T), blocks
    of G consecutive tokens, or single tokens (1); unit u holds rows u · rows_per_unit … of the residual stream [B·T, D].

    Args:
        gates: probabilities, or 0 and 1: [U, L], or [U, L, S] for S branches with gates of their own.
        rows_per_unit: rows of a unit.
        samples: B; default U (every unit is a sample).
        threshold: active above it, not at it.
        hard: active units count fully (multiplier 1), else with their gate.
        force: bool like ``gates``: units that are listed whatever their gate, with multiplier 0 if hard (exploration).
        out: a plan of the same shape whose tensors are overwritten, for CUDA graphs.

    Returns:
        :class:`RoutePlan`. Where ``gates`` require a gradient, ``plan.gate`` is differentiable: its value is the gate's own,
        so pass straight-through gates (exactly 0 and 1) for hard decisions.

    Raises:
        TypeError: gates are no floating-point tensor.
        ValueError: shapes that do not fit; on the CPU also gates that are NaN or outside [0, 1] (on a GPU looking would
            wait for the device: :meth:`RoutePlan.to_host` tells).

    Example:
        >>> import torch
        >>> from xdfast.ops import make_plan
        >>> make_plan(torch.tensor([[1.0, 0.0], [0.0, 0.9]]), rows_per_unit=4).count.tolist()
        [[1], [1]]
    """
    if not isinstance(gates, Tensor) or not gates.dtype.is_floating_point:
        raise TypeError(f"gates must be a floating-point tensor [U, L] or [U, L, S], got {_kind(gates)}")
    if gates.dim() == 2:
        gates = gates.unsqueeze(-1)
        force = force.unsqueeze(-1) if force is not None and force.dim() == 2 else force
    if gates.dim() != 3 or 0 in gates.shape:
        raise ValueError(f"gates must be [units, layers] or [units, layers, branches], got {list(gates.shape)}")
    units, layers, branches = gates.shape
    samples = units if samples is None else samples
    if rows_per_unit < 1 or samples < 1 or units % samples:
        raise ValueError(
            f"{units} units of {rows_per_unit} rows cannot be dealt out to {samples} samples: the number of units must be "
            "a multiple of samples, and both at least 1"
        )
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold!r}: a gate is active above it")
    if force is not None and (force.dtype != torch.bool or force.shape != gates.shape):
        raise ValueError(
            f"force must be bool {list(gates.shape)} like the gates, got {force.dtype} {list(force.shape)}"
        )
    learning = gates.requires_grad and torch.is_grad_enabled()
    plain = hard and force is None and not learning
    if out is None:
        lists = (layers, branches)
        out = RoutePlan(
            gate=gates.new_empty((*lists, units), dtype=torch.float32),
            index=gates.new_empty((*lists, units), dtype=torch.int32),
            count=gates.new_empty(lists, dtype=torch.int32),
            offsets=gates.new_empty((*lists, samples + 1), dtype=torch.int32),
            invalid=gates.new_empty(lists, dtype=torch.int32),
            rows_per_unit=rows_per_unit,
            samples=samples,
            plain=plain,
        )
    else:
        _check_same(out, (layers, branches, units), rows_per_unit, samples, gates.device)
        out = replace(out, plain=plain, host_counts=None)
    buffers = (out.gate, out.index, out.count, out.offsets, out.invalid)
    route_plan_op(gates.detach(), force, float(threshold), hard, rows_per_unit, samples, *buffers)
    if learning:
        # Inactive units never contribute, whatever their value, so the gates themselves are the multipliers.
        out = replace(out, gate=gates.permute(1, 2, 0).to(torch.promote_types(gates.dtype, torch.float32)).contiguous())
    if gates.device.type == "cpu" and not torch.compiler.is_compiling():
        out = out.to_host()  # free here, and bad gates are told at once
    return out


def _check_same(plan: RoutePlan, shape: tuple[int, int, int], rows: int, samples: int, device: torch.device) -> None:
    have = (*plan.index.shape, plan.rows_per_unit, plan.samples, plan.index.device)
    want = (*shape, rows, samples, device)
    if have != want:
        names = ("layers", "branches", "units", "rows_per_unit", "samples", "device")
        differing = ", ".join(f"{n} {h} there, {w} given" for n, h, w in zip(names, have, want, strict=True) if h != w)
        raise ValueError(f"out is a plan of another batch ({differing}); make a new plan")


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
