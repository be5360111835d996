"""Compiles every Triton kernel for every tile of the tables, without a GPU, and reports what the assembler says.

``python -m xdfast.kernels.aot`` prints registers, spilled bytes and shared memory per (kernel, architecture, product
dtype, tile, variant) and exits with 1 if anything spills or needs more shared memory than the architecture has.
Arguments restrict it: architectures (``80 90``), kernels (``product``), product dtypes (``bf16``). The routed kernels'
specialisations are in ``aot_routed.py``, the rest here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import triton

from . import aot_routed, configs, rsd_gradient, rsd_product, rsd_standardize
from .aot_compile import SHARED_LIMIT, Compiled, Variant, compile_launch, problems

__all__ = [
    "KERNELS",
    "SHARED_LIMIT",
    "Compiled",
    "Variant",
    "compile_all",
    "compile_kernel",
    "main",
    "problems",
    "variants",
]

#: Every kernel of the tables.
KERNELS = (*configs.KERNELS, *aot_routed.KERNELS)

_FUNCTIONS = {
    name: getattr(module, name) for module in (rsd_standardize, rsd_product, rsd_gradient) for name in module.__all__
}
# Argument → Triton type; "x" stands for the dtype of the inputs, "z" for that of the products.
_POINTERS = dict.fromkeys(("s_ptr", "t_ptr", "ds_ptr", "dt_ptr"), "*x")
_POINTERS |= dict.fromkeys(("z_ptr", "student_ptr", "teacher_ptr"), "*z")
_POINTERS |= dict.fromkeys(("counter_ptr", "tile_counter_ptr"), "*i32")  # the other pointers are fp32
_FLOATS = ("eps", "kappa", "factor", "scale")
_ONES = ("s_col", "t_col")  # contiguous rows
_ALIGNED = ("ld", "ldc", "plane", "chunk")  # divisible by 16 whatever the shape
_ALIGNED_IF_SHAPE = ("d", "s_row", "t_row")  # D divisible by 16


def variants(kernel: str, product: str) -> list[Variant]:
    """The specialisations of a kernel that are launched, the usual one (one gradient, input in the product's dtype) first."""
    if kernel in aot_routed.KERNELS:
        return aot_routed.variants(kernel, product)
    usual = "fp32" if product in ("fp32", "tf32") else product
    needs = [{"STUDENT": s, "TEACHER": t} for s, t in ((True, False), (True, True), (False, True), (False, False))]
    if kernel.startswith("standardize"):
        combinations = [{"STUDENT": s, "VARIANCE": v} for s in (True, False) for v in (False, True)]
    elif kernel == "product":
        forms = [{"GRAM": True} | need for need in needs[:3]] + [{"GRAM": False} | need for need in needs]
        combinations = [form | {"SPLITS": 4} for form in forms]
        # The other splits differ by a loop count: with both outputs, whose code contains the rest.
        combinations += [form | {"SPLITS": splits} for splits in (1, 2, 8) for form in (forms[1], forms[4])]
    else:
        combinations = needs
    found = [Variant(usual, c) for c in combinations]
    if kernel == "product":  # which sees neither the inputs' dtype nor D
        return found
    if usual != "fp32":
        found += [Variant("fp32", c) for c in combinations[:2]]
    return found + [Variant(usual, c, aligned=False) for c in combinations[:2]]


def compile_kernel(
    kernel: str, arch: int, product: str, tile: configs.Tile, variant: Variant | None = None
) -> Compiled:
    """Compiles one kernel as it is launched (pointers aligned, rows contiguous); ``variant`` None: the usual one.

    Raises:
        RuntimeError: the assembler does not know the architecture or fails.
    """
    if kernel in aot_routed.KERNELS:
        return aot_routed.compile_kernel(kernel, arch, product, tile, variant)
    variant = variant or variants(kernel, product)[0]
    matrices = "fp32" if product in ("fp32", "tf32") else product
    tiled = {"ROWS": tile.rows, "COLUMNS": tile.columns, "SIZE": tile.rows, "DEPTH": tile.depth}
    tiled["PRECISION"] = "tf32" if product == "tf32" else "ieee"

    def kind(name: str) -> str:
        if name.endswith("_ptr"):
            return _POINTERS.get(name, "*fp32").replace("*x", f"*{variant.inputs}").replace("*z", f"*{matrices}")
        return "fp32" if name in _FLOATS else "i32"

    constants = tiled | variant.constants | dict.fromkeys(_ONES, 1)
    aligned = (*_ALIGNED, *_ALIGNED_IF_SHAPE) if variant.aligned else _ALIGNED
    return compile_launch(kernel, _FUNCTIONS[kernel], arch, product, tile, variant, constants, kind, aligned)


def compile_all(
    archs: Sequence[int] = configs.ARCHITECTURES,
    kernels: Sequence[str] = KERNELS,
    products: Sequence[str] = configs.PRODUCTS,
) -> Iterator[Compiled]:
    """Every (kernel, architecture, product dtype, tile, variant) of the table."""
    for arch in archs:
        for kernel in kernels:
            for product in products:
                if kernel in aot_routed.KERNELS:
                    launches = list(aot_routed.launches(kernel, arch, product))
                else:
                    launches = [(t, v) for t in configs.tiles(kernel, arch, product) for v in variants(kernel, product)]
                for tile, variant in launches:
                    yield compile_kernel(kernel, arch, product, tile, variant)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if a kernel spills or does not fit."""
    arguments = sys.argv[1:] if argv is None else argv
    archs = tuple(int(a) for a in arguments if a.isdigit()) or configs.ARCHITECTURES
    kernels = tuple(a for a in arguments if a in KERNELS) or KERNELS
    products = tuple(a for a in arguments if a in configs.PRODUCTS) or configs.PRODUCTS
    unknown = {a for a in arguments if not a.isdigit()} - {*KERNELS, *configs.PRODUCTS}
    if unknown:
        print(f"not in the table: {' '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    bad = 0
    print(
        f"{'kernel':21} {'arch':6} {'prod':5} {'rows':>5} {'cols':>4} {'warps':>5} {'depth':>5} {'regs':>5} "
        f"{'spill B':>7} {'smem B':>7} {'by':8} variant"
    )
    for c in compile_all(archs, kernels, products):
        t, wrong = c.tile, problems(c)
        bad += bool(wrong)
        print(
            f"{c.kernel:21} sm_{c.arch:<3} {c.product:5} {t.rows:5} {t.columns:4} {t.warps:5} {t.depth:5} "
            f"{c.registers:5} {c.spill_bytes:7} {c.shared_bytes:7} {c.instruction:8} {c.variant} "
            f"{'; '.join(wrong).upper()}",
            flush=True,
        )
    print(f"triton {triton.__version__}; {bad} of the above spill or do not fit")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
