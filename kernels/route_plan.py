"""Gates → plan of the routed layers in one launch: which units each layer's branches run, how many, and with what weight.

For every layer l and branch s, over the units u in ascending order:

    listed(u)  = gate > threshold, or forced
    gate[u]    = 1 (hard) or the gate (scaled) where gate > threshold; a forced unit has the value of that rule too: 0
                 (hard) or its gate (scaled); 0 for a unit that is not listed
    index      = the listed units, compacted by a running prefix sum;  count = how many
    offsets[b] = rows of the listed units of the samples before b: cu_seqlens of the compact rows
    invalid    = gates that are NaN or outside [0, 1]

One program per (layer, branch) walks over the units in chunks: no atomics, no memset, no host synchronisation; nothing
that depends on the gates is needed to launch it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["route_plan", "route_plan_kernel"]

#: Units a program looks at together. The loop over chunks is sequential, so the long chunk has the more warps (with 8 one variant
#: spills on A100 under Triton 3.8).
CHUNKS = {128: 1, 1024: 16}


@triton.jit(do_not_specialize=["units", "branches", "samples", "units_per_sample", "rows_per_unit"])
def route_plan_kernel(
    gates_ptr,  # [U, L, S] floating
    force_ptr,  # [U, L, S] bool, as bytes; unused unless FORCE
    gate_ptr,  # [L, S, U] fp32
    index_ptr,  # [L, S, U] int32
    count_ptr,  # [L, S] int32
    offsets_ptr,  # [L, S, samples + 1] int32
    invalid_ptr,  # [L, S] int32
    units,
    branches,
    samples,
    units_per_sample,
    rows_per_unit,
    gates_u,
    gates_l,
    gates_s,
    force_u,
    force_l,
    force_s,
    threshold,
    HARD: tl.constexpr,
    FORCE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: (L · S,)."""
    here = tl.program_id(0).to(tl.int64)
    layer, branch = here // branches, here % branches
    gates_ptr += layer * gates_l + branch * gates_s
    force_ptr += layer * force_l + branch * force_s
    gate_ptr += here * units
    index_ptr += here * units
    offsets_ptr += here * (samples + 1)
    tl.store(offsets_ptr, 0)
    before = tl.zeros([], tl.int32)  # listed units of the earlier chunks
    invalid = tl.zeros([], tl.int32)
    for first in range(0, units, CHUNK):
        u = first + tl.arange(0, CHUNK)
        inside = u < units
        g = tl.load(gates_ptr + u.to(tl.int64) * gates_u, mask=inside, other=0.0).to(tl.float32)
        active = inside & (g > threshold)  # false for NaN
        listed = active
        if FORCE:
            forced = tl.load(force_ptr + u.to(tl.int64) * force_u, mask=inside, other=0) != 0
            listed = active | forced
        if HARD:
            multiplier = tl.where(active, 1.0, 0.0)
        else:
            multiplier = tl.where(listed, g, 0.0)
        tl.store(gate_ptr + u, multiplier, mask=inside)
        one = listed.to(tl.int32)
        through = before + tl.cumsum(one, 0)
        tl.store(index_ptr + (through - one), u, mask=listed)
        last = inside & ((u + 1) % units_per_sample == 0)
        tl.store(offsets_ptr + (u + 1) // units_per_sample, through * rows_per_unit, mask=last)
        before += tl.sum(one, 0)
        invalid += tl.sum((inside & ~((g >= 0.0) & (g <= 1.0))).to(tl.int32), 0)
    tl.store(count_ptr + here, before)
    tl.store(invalid_ptr + here, invalid)


def route_plan(
    gates: Tensor,  # [U, L, S]
    force: Tensor | None,  # [U, L, S]
    threshold: float,
    hard: bool,
    rows_per_unit: int,
    samples: int,
    gate: Tensor,  # [L, S, U]
    index: Tensor,  # [L, S, U]
    count: Tensor,  # [L, S]
    offsets: Tensor,  # [L, S, samples + 1]
    invalid: Tensor,  # [L, S]
) -> None:
    """Fills a plan from gates, one launch.

    Args:
        gates: [U, L, S], float32, bfloat16 or float16, any strides; compared and stored in float32.
        force: bool [U, L, S], any strides: units that are listed whatever their gate; None for none.
        threshold: a unit is active where its gate is above it, strictly.
        hard: multiplier 1 for active units, otherwise the gate itself.
        rows_per_unit: rows of x per unit.
        samples: B; U is divisible by it.
        gate: float32 [L, S, U], written everywhere. The outputs are contiguous and need no initialisation.
        index: int32 [L, S, U]; entries from count on are not written.
        count: int32 [L, S].
        offsets: int32 [L, S, B + 1].
        invalid: int32 [L, S].
    """
    units, layers, branches = gates.shape
    flags = gates if force is None else force.view(torch.uint8)
    chunk = next((c for c in CHUNKS if units <= c), max(CHUNKS))
    strides = (*gates.stride(), *((0, 0, 0) if force is None else flags.stride()))
    with torch.cuda.device_of(gates):
        route_plan_kernel[(layers * branches,)](
            gates, flags, gate, index, count, offsets, invalid, units, branches, samples, units // samples,
            rows_per_unit, *strides, threshold,
            HARD=hard, FORCE=force is not None, CHUNK=chunk, num_warps=CHUNKS[chunk], num_stages=1,
        )  # fmt: skip
