"""What ``aot.py`` is made of: one kernel compiled without a GPU, and what the assembler says about it."""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from . import configs

__all__ = ["SHARED_LIMIT", "Compiled", "Variant", "compile_launch", "problems"]

#: Shared memory one program may use, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


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
        flags = "".join(f" {k}={v if isinstance(v, str) else int(v)}" for k, v in self.constants.items())
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


def compile_launch(
    kernel: str,
    function: Any,
    arch: int,
    product: str,
    tile: configs.Tile,
    variant: Variant,
    constants: dict[str, Any],
    kind: Callable[[str], str],
    aligned: Collection[str],
) -> Compiled:
    """Compiles ``function`` as a launch would, for a GPU that need not be here.

    Args:
        kernel: its name in the table.
        function: the jit function.
        arch: architecture.
        product: dtype of its products.
        tile: launch configuration.
        variant: what is compiled, for the report.
        constants: every constexpr, and integer arguments that are always 1.
        kind: Triton's type of an argument, by name.
        aligned: arguments divisible by 16 (pointers always are).

    Raises:
        RuntimeError: the assembler does not know the architecture or fails.
    """
    names = function.arg_names
    constants = {n: v for n, v in constants.items() if n in names}
    signature = {n: "constexpr" if n in constants else kind(n) for n in names}
    divisible = [n for n in names if n not in constants and (n.endswith("_ptr") or n in aligned)]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
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
