"""Routed layers on CUDA, the host side: what a residual branch of a transformer does for the rows of its listed units.

    norm_linear → (attention) → linear_residual,   norm_linear → linear_residual

and ``norm`` and ``residual`` for any other branch. No launch depends on the plan's values: nothing is synchronised and all
can be captured in a CUDA graph. The maths stands at the top of each device file (``routed_forward.py``,
``routed_norm.py``; ``routed_backward.py`` with its host side in ``routed_gradients.py``), the tiles in ``routed_configs.py``.

Everywhere: ``index`` int32 [U] and ``count`` int32 [1] are a plan's (``route_plan.py``) for one layer's branch, contiguous;
x [R, D] and the compact buffers [capacity, ·] are float32, bfloat16 or float16 with contiguous rows (any row stride) and
capacity ≥ count · rows_per_unit; weights are contiguous, in any of these dtypes (best that of the product), biases and the
norm's weights contiguous. ``precision`` is that of the factors of the products, "float32" (IEEE), "tf32", "bfloat16",
"float16"; sums are float32. Compact rows from count · rows_per_unit on are neither read nor written.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, routed_configs
from .routed_forward import linear_residual_kernel, norm_linear_kernel
from .routed_norm import moments_kernel, norm_rows_kernel, residual_kernel

__all__ = [
    "fold_norm",
    "linear_residual",
    "moments",
    "norm",
    "norm_linear",
    "residual",
    "statistics_parts",
]

#: precision → (dtype of the factors, name in the tile table, input_precision of tl.dot)
PRECISIONS = {
    "float32": (tl.float32, "fp32", "ieee"),
    "tf32": (tl.float32, "tf32", "tf32"),
    "bfloat16": (tl.bfloat16, "bf16", "ieee"),
    "float16": (tl.float16, "fp16", "ieee"),
}


@cache
def device_facts(device: torch.device) -> tuple[int, int]:
    """(architecture, SMs); a CPU, Triton's interpreter, has the newest architecture and three."""
    if device.type != "cuda":
        return configs.ARCHITECTURES[-1], 3
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def options(tile: configs.Tile, **constants: Any) -> dict[str, Any]:
    """Constexprs and launch options of a pass."""
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns}
    return constants | sizes | {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


def product_options(tile: configs.Tile, precision: str, depth: int | None, **constants: Any) -> dict[str, Any]:
    """Likewise, of a product; ``depth``: its contraction length, None where the device knows it."""
    factors, _, dot = PRECISIONS[precision]
    constants |= {"PRODUCT": factors, "PRECISION": dot, "GROUP": routed_configs.GROUP, "DEPTH": tile.depth}
    if depth is not None:
        constants["EVEN"] = depth % tile.depth == 0
    return options(tile, **constants)


def product_tile(
    kernel: str, x: Tensor, precision: str, rows: int, columns: int, depth: int, *others: int
) -> tuple[routed_configs.RoutedTile, int]:
    """(tile, programs) of a persistent product; ``others``: the row strides."""
    arch, processors = device_facts(x.device)
    product = PRECISIONS[precision][1]
    if any(size % 16 for size in (columns, depth, *others)):
        tile = routed_configs.ragged_tile(kernel, product)
    else:
        tile = routed_configs.lookup(kernel, arch, product, rows, columns, depth, processors)
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    return tile, max(1, min(processors * tile.programs, tiles))


def pass_tile(kernel: str, x: Tensor, rows: int, columns: int) -> tuple[routed_configs.RoutedTile, int]:
    """(tile, programs) of a persistent pass over rows."""
    tile = routed_configs.row_tile(kernel, columns)
    return tile, max(1, min(device_facts(x.device)[1] * tile.programs, triton.cdiv(rows, tile.rows)))


def statistics_parts(columns: int) -> int:
    """``parts`` of the statistics [R, parts, 2] that travel with x [R, columns]."""
    return routed_configs.parts(columns)


def fold_norm(
    weight: Tensor,  # [F, D]
    bias: Tensor | None,  # [F]
    norm_weight: Tensor | None,  # [D]
    norm_bias: Tensor | None,  # [D]
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(W γ in ``dtype`` [F, D], its row sums as rounded [F] float32, W β + b [F] float32): what :func:`norm_linear` takes
    with carried statistics. Plain PyTorch; to be kept and made again when a weight changes."""
    wide = weight.float()
    folded = (wide if norm_weight is None else wide * norm_weight.float()).to(dtype).contiguous()
    shift = wide.new_zeros(len(weight)) if bias is None else bias.float()
    if norm_bias is not None:
        shift = shift + wide @ norm_bias.float()
    return folded, folded.float().sum(1), shift.contiguous()


def moments(
    x: Tensor,  # [R, D]
    statistics: Tensor,  # [R, parts, 2]
) -> None:
    """Σ x and Σ x² of every row of a fresh x, for the first :func:`norm_linear` that carries statistics.

    Args:
        x: [R, D].
        statistics: float32 [R, ⌈D / 64⌉, 2] contiguous, written everywhere.
    """
    rows, columns = x.shape
    tile, programs = pass_tile("moments", x, rows, columns)
    with torch.cuda.device_of(x):
        moments_kernel[(programs,)](
            x, statistics, rows, columns, statistics.shape[1], x.stride(0), **options(tile)
        )  # fmt: skip


def norm(
    x: Tensor,  # [R, D]
    norm_weight: Tensor | None,  # [D]
    norm_bias: Tensor | None,  # [D]
    index: Tensor,
    count: Tensor,
    rows_per_unit: int,
    out: Tensor | None,  # [capacity, D]
    *,
    norm: str,
    eps: float,
    row_statistics: Tensor | None = None,  # [capacity, 2]
) -> None:
    """out[m] = norm(x[row(m)]), one launch.

    Args:
        x: [R, D].
        norm_weight: γ, or None for 1.
        norm_bias: β, or None for 0.
        index: see the module.
        count: see the module.
        rows_per_unit: rows of x per unit.
        out: [capacity, D]; None where the statistics alone are wanted.
        norm: "layer", "rms", or "none" for a gather.
        eps: ε.
        row_statistics: float32 [capacity, 2] contiguous; (mean, 1/std) are written into it, (0, 1/rms) of "rms".
    """
    wanted = out if out is not None else row_statistics
    tile, programs = pass_tile("norm_rows", x, wanted.shape[0], x.shape[1])
    with torch.cuda.device_of(x):
        norm_rows_kernel[(programs,)](
            x, x if norm_weight is None else norm_weight, x if norm_bias is None else norm_bias, index, count,
            x if out is None else out, x if row_statistics is None else row_statistics, rows_per_unit, x.shape[1],
            x.stride(0), 0 if out is None else out.stride(0), eps,
            **options(
                tile, NORM=norm != "none", RMS=norm == "rms", SCALE=norm_weight is not None,
                SHIFT=norm_bias is not None, STORE=out is not None, STATISTICS=row_statistics is not None,
            ),
        )  # fmt: skip


def norm_linear(
    x: Tensor,  # [R, D]
    weight: Tensor,  # [F or 2F, D]
    bias: Tensor | None,  # [F or 2F]
    norm_weight: Tensor | None,  # [D]
    norm_bias: Tensor | None,  # [D]
    index: Tensor,
    count: Tensor,
    rows_per_unit: int,
    out: Tensor,  # [capacity, F]
    *,
    norm: str,
    eps: float,
    act: str = "none",
    pre: Tensor | None = None,  # [capacity, F or 2F]
    statistics: Tensor | None = None,  # [R, parts, 2]
    weight_sums: Tensor | None = None,  # [F or 2F]
    row_statistics: Tensor | None = None,  # [capacity, 2]
    precision: str = "float32",
) -> None:
    """out[m] = act(norm(x[row(m)]) Wᵀ + b).

    With ``statistics`` in one launch (inference): ``weight``, ``weight_sums`` and ``bias`` as :func:`fold_norm` gives them,
    ``norm_weight`` and ``norm_bias`` None. Otherwise two (one for "none"): the statistics of the listed rows come first.

    Args:
        x: [R, D].
        weight: [F, D]; "swiglu": [2F, D], the gate's rows, then the up-projection's.
        bias: [F] or [2F], or None.
        norm_weight: γ, or None for 1.
        norm_bias: β, or None for 0.
        index: see the module.
        count: see the module.
        rows_per_unit: rows of x per unit.
        out: [capacity, F].
        norm: "layer", "rms" or "none".
        eps: ε.
        act: "none", "gelu", "gelu_tanh", "silu", "relu", "swiglu".
        pre: [capacity, F or 2F]: where the pre-activation is written; None if nobody wants it.
        statistics: float32 [R, parts, 2] contiguous, of the listed rows as :func:`moments` and :func:`linear_residual`
            write them, any number of parts.
        weight_sums: float32 row sums of the folded weight; for "layer" with statistics.
        row_statistics: float32 [capacity, 2] contiguous: where (mean, 1/std) are written without ``statistics``, for the
            backward; None: scratch memory.
        precision: of the factors of the product.
    """
    depth = x.shape[1]
    capacity, columns = out.shape
    how = "none" if norm == "none" else "load" if statistics is None else "fold"
    if how == "load":
        if row_statistics is None:
            row_statistics = torch.empty((capacity, 2), dtype=torch.float32, device=x.device)
        _norm(x, None, None, index, count, rows_per_unit, None, norm=norm, eps=eps, row_statistics=row_statistics)
    used = {"none": x, "load": row_statistics, "fold": statistics}[how]
    kernel = "norm_linear" + "_pair" * (act == "swiglu") + "_load" * (how == "load")
    tile, programs = product_tile(
        kernel, x, precision, capacity, columns, depth, x.stride(0), out.stride(0), 0 if pre is None else pre.stride(0)
    )
    with torch.cuda.device_of(x):
        norm_linear_kernel[(programs,)](
            x, weight, x if bias is None else bias, x if weight_sums is None else weight_sums,
            x if norm_weight is None else norm_weight, x if norm_bias is None else norm_bias, used, index, count, out,
            out if pre is None else pre, rows_per_unit, depth, columns, used.shape[1], x.stride(0), out.stride(0),
            0 if pre is None else pre.stride(0), eps,
            **product_options(
                tile, precision, depth, NORM=how, RMS=norm == "rms", SCALE=how == "load" and norm_weight is not None,
                SHIFT=how == "load" and norm_bias is not None, BIAS=bias is not None, ACT=act, PRE=pre is not None,
            ),
        )  # fmt: skip


_norm = norm  # norm_linear has a parameter of the same name


def linear_residual(
    x: Tensor,  # [R, F]
    h: Tensor,  # [capacity, K]
    weight: Tensor,  # [F, K]
    bias: Tensor | None,  # [F]
    gate: Tensor | None,  # [U]
    index: Tensor,
    count: Tensor,
    rows_per_unit: int,
    *,
    statistics: Tensor | None = None,  # [R, parts, 2]
    precision: str = "float32",
) -> None:
    """x[row(m)] += g · (h[m] Wᵀ + b), in place, one launch; other rows are not touched.

    Args:
        x: [R, F].
        h: [capacity, K].
        weight: [F, K].
        bias: [F], or None.
        gate: float32 [U] contiguous, or None for 1.
        index: see the module.
        count: see the module.
        rows_per_unit: rows of x per unit.
        statistics: float32 [R, ⌈F / 64⌉, 2] contiguous; those of the changed rows are written.
        precision: of the factors of the product.
    """
    capacity, depth = h.shape
    columns = x.shape[1]
    tile, programs = product_tile("linear_residual", x, precision, capacity, columns, depth, x.stride(0), h.stride(0))
    with torch.cuda.device_of(x):
        linear_residual_kernel[(programs,)](
            x, h, weight, x if bias is None else bias, x if gate is None else gate,
            x if statistics is None else statistics, index, count, rows_per_unit, depth, columns,
            0 if statistics is None else statistics.shape[1], x.stride(0), h.stride(0),
            **product_options(
                tile, precision, depth, GATE=gate is not None, BIAS=bias is not None, EMIT=statistics is not None,
                PART=routed_configs.PART,
            ),
        )  # fmt: skip


def residual(
    x: Tensor,  # [R, D]
    y: Tensor,  # [capacity, D]
    gate: Tensor | None,  # [U]
    index: Tensor,
    count: Tensor,
    rows_per_unit: int,
) -> None:
    """x[row(m)] += g · y[m], in place, one launch; arguments as in :func:`linear_residual`."""
    tile, programs = pass_tile("residual", x, y.shape[0], x.shape[1])
    with torch.cuda.device_of(x):
        residual_kernel[(programs,)](
            x, y, x if gate is None else gate, index, count, rows_per_unit, x.shape[1], x.stride(0), y.stride(0),
            **options(tile, GATE=gate is not None),
        )  # fmt: skip
