"""Compiles every Triton kernel for every tile of the table, without a GPU, and reports what the assembler says.

``python -m xdfast.kernels.aot`` prints registers, spilled bytes and shared memory per (kernel, architecture, product
dtype, tile, variant) and exits with 1 if anything spills or needs more shared memory than the architecture has.
Arguments restrict it: architectures (``80 90``), kernels (``product``), product dtypes (``bf16``).
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from . import configs, rsd_gradient, rsd_product, rsd_standardize

__all__ = ["SHARED_LIMIT", "Compiled", "Variant", "compile_all", "compile_kernel", "main", "problems", "variants"]

#: Shared memory one program may use, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

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


class Variant(NamedTuple):
    """One specialisation that the host side launches.

    Attributes:
        inputs: dtype of student, teacher and their gradients.
        constants: constexprs besides those of the tile.
        aligned: D is divisible by 16.
    """

    inputs: str
    constants: dict[str, Any]
    aligned: bool = True

    def __str__(self) -> str:
        flags = "".join(f" {k}={int(v)}" for k, v in self.constants.items())
        return f"{self.inputs}{flags}{'' if self.aligned else ' ragged'}".lower()


@dataclass(frozen=True)
class Compiled:
    """What the assembler reports for one kernel.

    Attributes:
        registers: registers per thread.
        spill_bytes: bytes of spill stores and loads per thread; 0 is required.
        shared_bytes: shared memory per program.
        instruction: what the matrix product became: wgmma, tcgen05, mma, fma, or "" without one.
    """

    kernel: str
    arch: int
    product: str
    tile: configs.Tile
    variant: Variant
    registers: int
    spill_bytes: int
    shared_bytes: int
    instruction: str


def variants(kernel: str, product: str) -> list[Variant]:
    """The specialisations of a kernel that are launched, the usual one (one gradient, input in the product's dtype) first."""
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
    function = _FUNCTIONS[kernel]
    variant = variant or variants(kernel, product)[0]
    matrices = "fp32" if product in ("fp32", "tf32") else product
    names = function.arg_names
    tiled = {"ROWS": tile.rows, "COLUMNS": tile.columns, "SIZE": tile.rows, "DEPTH": tile.depth}
    tiled["PRECISION"] = "tf32" if product == "tf32" else "ieee"
    constants = {n: v for n, v in (tiled | variant.constants | dict.fromkeys(_ONES, 1)).items() if n in names}
    signature, aligned = {}, []
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = _POINTERS.get(name, "*fp32")
            signature[name] = kind.replace("*x", f"*{variant.inputs}").replace("*z", f"*{matrices}")
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
        always = name.endswith("_ptr") or name in _ALIGNED
        if name not in constants and (always or (variant.aligned and name in _ALIGNED_IF_SHAPE)):
            aligned.append(name)
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True},
    )
    ptx = compiled.asm["ptx"]
    registers, spills = _assemble(ptx, arch)
    found = [name for name in ("wgmma", "tcgen05.mma", "mma.sync") if name in ptx]
    instruction = found[0] if found else "fma" if "DEPTH" in constants else ""
    return Compiled(kernel, arch, product, tile, variant, registers, spills, compiled.metadata.shared, instruction)


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    """(registers, spilled bytes) by `ptxas -v`; Triton itself learns these only when it loads the kernel on a GPU."""
    match = re.search(r"^\.target\s+(sm_\w+)", ptx, re.MULTILINE)
    target = match[1] if match else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        ptxas = (
            nvidia.get_ptxas(arch) if inspect.signature(nvidia.get_ptxas).parameters else nvidia.get_ptxas()
        )  # < 3.6
        command = [ptxas.path, "-v", f"--gpu-name={target}", str(path), "-o", str(path) + ".cubin"]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"ptxas failed for {target}: {run.stderr.strip()[-500:]}")
    registers = re.search(r"Used (\d+) registers", run.stderr)
    if registers is None:
        raise RuntimeError(f"ptxas reported no register count for {target}: {run.stderr.strip()[-500:]}")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", run.stderr)
    return int(registers[1]), sum(int(s) for s in spills)


def compile_all(
    archs: Sequence[int] = configs.ARCHITECTURES,
    kernels: Sequence[str] = configs.KERNELS,
    products: Sequence[str] = configs.PRODUCTS,
) -> Iterator[Compiled]:
    """Every (kernel, architecture, product dtype, tile, variant) of the table."""
    for arch in archs:
        for kernel in kernels:
            for product in products:
                for tile in configs.tiles(kernel, arch, product):
                    for variant in variants(kernel, product):
                        yield compile_kernel(kernel, arch, product, tile, variant)


def problems(c: Compiled) -> list[str]:
    """Why a kernel must not be launched like this; empty if it may."""
    found = []
    if c.spill_bytes:
        found.append(f"spills {c.spill_bytes} bytes")
    if c.shared_bytes > SHARED_LIMIT[c.arch]:
        found.append(f"needs {c.shared_bytes} bytes of shared memory, sm_{c.arch} has {SHARED_LIMIT[c.arch]}")
    if c.registers * 32 * c.tile.warps > 65536:
        found.append(f"needs {c.registers * 32 * c.tile.warps} registers, an SM has 65536")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if a kernel spills or does not fit."""
    arguments = sys.argv[1:] if argv is None else argv
    archs = tuple(int(a) for a in arguments if a.isdigit()) or configs.ARCHITECTURES
    kernels = tuple(a for a in arguments if a in configs.KERNELS) or configs.KERNELS
    products = tuple(a for a in arguments if a in configs.PRODUCTS) or configs.PRODUCTS
    unknown = {a for a in arguments if not a.isdigit()} - {*configs.KERNELS, *configs.PRODUCTS}
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
