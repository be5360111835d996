"""FLOP formulas that an older torch lacks."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["missing_formulas"]


def missing_formulas() -> dict[Any, Any]:
    """The CPU's fused attention, which torch's counter knows only from 2.10 on."""
    from torch.utils.flop_counter import flop_registry

    op = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if op is None or op in flop_registry:
        return {}

    def attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        batch, heads, queries, width = query  # keys and values may have fewer heads, shared by groups of queries
        return 2 * batch * heads * queries * key[-2] * (width + value[-1])

    return {op: attention}
