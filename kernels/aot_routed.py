"""The specialisations of the routed kernels that ``aot.py`` compiles: what the host side launches for transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from . import configs, route_plan, routed_backward, routed_configs, routed_forward, routed_norm
from .aot_compile import Compiled, Variant, compile_launch

__all__ = ["KERNELS", "compile_kernel", "launches", "tiles", "variants"]

#: Kernels of the table, and the planner.
KERNELS = (*routed_configs.KERNELS, "route_plan")

_MODULES = (route_plan, routed_forward, routed_norm, routed_backward)
_FUNCTIONS = {n.removesuffix("_kernel"): getattr(m, n) for m in _MODULES for n in m.__all__ if n.endswith("_kernel")}
_FACTORS = {"fp32": tl.float32, "tf32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}

# Argument → Triton type; "x" stands for the dtype of the residual stream, "z" for that of weights and compact rows.
_POINTERS = dict.fromkeys(("x_ptr", "dx_ptr", "dout_ptr", "gates_ptr"), "*x")
_POINTERS |= dict.fromkeys(("weight_ptr", "h_ptr", "y_ptr", "dy_ptr", "out_ptr", "pre_ptr", "dpre_ptr"), "*z")
_POINTERS |= dict.fromkeys(("a_ptr", "b_ptr", "scale_ptr", "shift_ptr"), "*z")
_POINTERS |= dict.fromkeys(("index_ptr", "count_ptr", "offsets_ptr", "invalid_ptr"), "*i32")
_POINTERS |= {"force_ptr": "*u8"}  # the other pointers are fp32
_FLOATS = ("eps", "threshold")
_ALIGNED_IF_SHAPE = ("depth", "columns", "rows", "size", "stride", "x_row", "y_row", "h_row", "a_row", "b_row")
_ALIGNED_IF_SHAPE += ("out_row", "pre_row", "dout_row", "dy_row", "dx_row", "dpre_row")

_PLAIN = {"SCALE": False, "SHIFT": False}
_AFFINE = {"SCALE": True, "SHIFT": True}


def _norm_linear(kernel: str) -> list[dict[str, Any]]:
    """LayerNorm with GELU (ViT) and RMSNorm with SwiGLU (LLaMA) first; then what else has code of its own."""
    pair = "pair" in kernel
    gelu = "swiglu" if pair else "gelu"
    if kernel.endswith("load"):
        layer = {"NORM": "load", "RMS": False, "BIAS": True, "ACT": gelu, "PRE": True} | _AFFINE
        rms = {"NORM": "load", "RMS": True, "SCALE": True, "SHIFT": False, "BIAS": False, "ACT": gelu, "PRE": True}
        return [layer, rms, layer | _PLAIN, layer | {"PRE": False}, *([] if pair else [layer | {"ACT": "gelu_tanh"}])]
    layer = {"NORM": "fold", "RMS": False, "BIAS": True, "ACT": gelu, "PRE": False} | _PLAIN
    rms = layer | {"RMS": True, "BIAS": False}
    none = layer | {"NORM": "none", "PRE": True}
    return [layer, rms, none, *([] if pair else [layer | {"ACT": act} for act in ("none", "gelu_tanh", "silu")])]


def _constants(kernel: str) -> list[dict[str, Any]]:
    """Constexprs besides those of the tile, the usual launch first."""
    if kernel.startswith("norm_linear"):
        return _norm_linear(kernel)
    part = {"PART": routed_configs.PART}
    names = {
        "linear_residual": ("GATE", "BIAS", "EMIT"),
        "input_gradient": ("GATHER", "GATE", "DOT", "STORE"),
        "weight_gradient": ("GATHER_A", "GATE", "GATHER_B", "NORM", "RMS", "SCALE", "SHIFT"),
        "norm_rows": ("NORM", "RMS", "SCALE", "SHIFT", "STORE", "STATISTICS"),
        "residual": ("GATE",),
        "norm_backward": ("NORM", "RMS", "SCALE"),
        "residual_backward": ("GATE", "STORE", "DOT"),
        "gate_rows": ("BIAS",),
        "column_sums": ("GATHER", "GATE", "NORM", "RMS"),
        "route_plan": ("HARD", "FORCE"),
    }.get(kernel, ())
    flags = {
        "linear_residual": ("111", "110", "011", "000"),
        "input_gradient": ("1111", "1101", "1110", "0001"),
        "weight_gradient": ("1100000", "0011011", "0011110", "1000000", "0010000"),
        "norm_rows": ("101101", "111010", "101110", "000010"),
        "residual": ("1", "0"),
        "norm_backward": ("101", "111", "100", "000"),
        "residual_backward": ("111", "110", "101"),
        "gate_rows": ("1", "0"),
        "column_sums": ("0010", "0011", "1100", "0000"),
        "route_plan": ("10", "11", "00", "01"),
    }.get(kernel, ("",))
    if kernel == "activation_backward":
        return [{"ACT": act} for act in ("gelu", "gelu_tanh", "silu", "relu", "swiglu")]
    shared = part if kernel == "linear_residual" else {}
    return [shared | {name: flag == "1" for name, flag in zip(names, one)} for one in flags]


def variants(kernel: str, product: str) -> list[Variant]:
    """The specialisations of a kernel, the usual one (shapes divisible by 16, one dtype) first."""
    usual = "fp32" if product in ("fp32", "tf32") else product
    product_kernel = kernel in routed_configs.PRODUCT_KERNELS
    even = {"EVEN": True} if product_kernel and kernel != "weight_gradient" else {}
    constants = [c | even for c in _constants(kernel)]
    found = [Variant(usual, c) for c in constants]
    if usual != "fp32" and any(n in ("x_ptr", "dout_ptr") for n in _function(kernel).arg_names):
        found += [Variant("fp32", c) for c in constants[:2]]  # a residual stream kept in fp32
    if even:
        constants = [c | {"EVEN": False} for c in constants]
        found += [Variant(usual, c) for c in constants[:2]]
    return found + [Variant(usual, c, aligned=False) for c in constants[:2]]


def launches(kernel: str, arch: int, product: str) -> Iterator[tuple[configs.Tile, Variant]]:
    """Every (tile, specialisation) that the host side launches; of fp16, which differs from bf16 by the names of the
    instructions, the two usual ones."""
    ragged = kernel in routed_configs.PRODUCT_KERNELS
    found = variants(kernel, product)
    for variant in found[:2] if product == "fp16" else found:
        if ragged and not variant.aligned:
            yield routed_configs.ragged_tile(kernel, product), variant
        else:
            for tile in tiles(kernel, arch, product):
                yield tile, variant


def tiles(kernel: str, arch: int, product: str) -> tuple[configs.Tile, ...]:
    """Tiles of a kernel; none for a product dtype that would only repeat another's launch."""
    if kernel not in routed_configs.PRODUCT_KERNELS and product in ("tf32", "fp16"):
        return ()
    if kernel == "route_plan":
        return tuple(configs.Tile(None, 1, chunk, warps) for chunk, warps in route_plan.CHUNKS.items())
    return routed_configs.tiles(kernel, arch, product)


def _function(kernel: str) -> Any:
    return _FUNCTIONS["norm_linear" if kernel.startswith("norm_linear") else kernel]


def compile_kernel(
    kernel: str, arch: int, product: str, tile: configs.Tile, variant: Variant | None = None
) -> Compiled:
    """As ``aot.compile_kernel``."""
    variant = variant or variants(kernel, product)[0]
    rows = "fp32" if product in ("fp32", "tf32") else product
    constants = variant.constants | {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "CHUNK": tile.columns,
        "GROUP": routed_configs.GROUP,
        "PRODUCT": _FACTORS[product],
        "PRECISION": "tf32" if product == "tf32" else "ieee",
    }
    if tile.depth:
        constants["DEPTH"] = tile.depth
    if kernel == "add_parts":
        del constants["ROWS"]

    def kind(name: str) -> str:
        if name.endswith("_ptr"):
            return _POINTERS.get(name, "*fp32").replace("*x", f"*{variant.inputs}").replace("*z", f"*{rows}")
        return "fp32" if name in _FLOATS else "i32"

    aligned = _ALIGNED_IF_SHAPE if variant.aligned else ()
    return compile_launch(kernel, _function(kernel), arch, product, tile, variant, constants, kind, aligned)
