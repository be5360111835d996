"""Compiles every Triton kernel for every tile of the table, without a GPU, and reports what the assembler says.

``python -m xdfast.kernels.aot`` prints registers, spilled bytes and shared memory per (kernel, architecture, dtype,
tile) and exits with 1 if anything spills.
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
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from . import configs, rsd

__all__ = ["Compiled", "compile_all", "compile_kernel", "main"]

#: kernel name → (function, {argument: Triton type, "x" standing for the input dtype}, arguments specialised to 1)
_SIGNATURES: dict[str, tuple[Any, dict[str, str], tuple[str, ...]]] = {
    name: (
        getattr(rsd, name),
        {
            "x_ptr": "*x",
            "z_ptr": "*fp32",
            "inv_ptr": "*fp32",
            "ratio_ptr": "*fp32",
            "n": "i32",
            "d": "i32",
            "x_row": "i32",
            "x_col": "i32",
            "eps": "fp32",
        },
        ("x_col",),
    )
    for name in ("column_standardize_resident", "column_standardize_stream")
}


@dataclass(frozen=True)
class Compiled:
    """What the assembler reports for one kernel.

    Attributes:
        registers: registers per thread.
        spill_bytes: bytes of spill stores and loads per thread; 0 is required.
        shared_bytes: shared memory per program.
        occupancy_warps: warps that fit one SM by registers alone.
    """

    kernel: str
    arch: int
    dtype: str
    tile: configs.Tile
    registers: int
    spill_bytes: int
    shared_bytes: int

    @property
    def occupancy_warps(self) -> int:
        return min(64, 65536 // (32 * max(8, -(-self.registers // 8) * 8)))


def compile_kernel(kernel: str, arch: int, dtype: str, tile: configs.Tile) -> Compiled:
    """Compiles one kernel with the specialisation of a typical call (aligned pointers, D and strides divisible by 16).

    Raises:
        RuntimeError: the assembler does not know the architecture or fails.
    """
    function, types, ones = _SIGNATURES[kernel]
    constants = {name: 1 for name in ones} | {"ROWS": tile.rows, "COLUMNS": tile.columns}
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types[n].replace("*x", f"*{dtype}") for n in names}
    aligned = [n for n in names if n not in constants and (signature[n].startswith("*") or n in ("d", "x_row"))]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True},
    )
    registers, spills = _assemble(compiled.asm["ptx"], arch)
    return Compiled(kernel, arch, dtype, tile, registers, spills, compiled.metadata.shared)


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


def compile_all(archs: Sequence[int] = configs.ARCHITECTURES) -> Iterator[Compiled]:
    """Every (kernel, architecture, dtype, tile) of the table."""
    for arch in archs:
        for kernel in configs.KERNELS:
            for dtype in ("fp32", "bf16", "fp16"):
                for tile in configs.tiles(kernel, arch, dtype):
                    yield compile_kernel(kernel, arch, dtype, tile)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 1 if a kernel spills. Arguments: architectures, e.g. ``80 90`` (default: all of the table)."""
    arguments = sys.argv[1:] if argv is None else argv
    archs = tuple(int(a) for a in arguments) or configs.ARCHITECTURES
    spilled = 0
    print(
        f"{'kernel':30} {'arch':6} {'dtype':6} {'rows':>5} {'cols':>4} {'warps':>5} {'regs':>5} "
        f"{'spill B':>7} {'smem B':>7}"
    )
    for c in compile_all(archs):
        t = c.tile
        spilled += c.spill_bytes > 0
        print(
            f"{c.kernel:30} sm_{c.arch:<3} {c.dtype:6} {t.rows:5} {t.columns:4} {t.warps:5} {c.registers:5} "
            f"{c.spill_bytes:7} {c.shared_bytes:7}",
            flush=True,
        )
    print(f"triton {triton.__version__}; {spilled} of the above spill")
    return int(spilled > 0)


if __name__ == "__main__":
    sys.exit(main())
