"""Every routed kernel compiles for every architecture without a GPU, fits it and spills nothing; and the table's choices."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from xdfast.kernels import configs

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 replaces the compiler by the interpreter"
)
pytest.importorskip("triton")
aot = pytest.importorskip("xdfast.kernels.aot")
from xdfast.kernels import aot_routed, routed_configs  # noqa: E402

CSRC = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
PRODUCTS = routed_configs.PRODUCT_KERNELS
PASSES = [kernel for kernel in aot_routed.KERNELS if kernel not in PRODUCTS]


def check(compiled: aot.Compiled) -> None:
    assert aot.problems(compiled) == [], compiled
    tensor_cores = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[compiled.arch]
    if compiled.kernel in PASSES:
        assert compiled.instruction == ""
    elif compiled.product == "fp32":
        assert compiled.instruction == "fma"
    else:  # fewer than 64 rows are not for the instructions of a warp group
        assert compiled.instruction == (tensor_cores if compiled.tile.rows >= 64 else "mma.sync"), compiled


# The largest tile, the usual launch, one architecture and dtype each; all of them with -m slow.
@pytest.mark.parametrize(
    ("kernel", "arch", "product"),
    [(kernel, (90, 100, 80)[i % 3], "bf16") for i, kernel in enumerate(PRODUCTS)] + [("linear_residual", 90, "tf32")],
)
def test_largest_tile_does_not_spill(kernel, arch, product):
    check(aot.compile_kernel(kernel, arch, product, routed_configs.tiles(kernel, arch, product)[0]))


@pytest.mark.parametrize("kernel", PASSES)
def test_pass_does_not_spill(kernel):
    check(aot.compile_kernel(kernel, 90, "bf16", aot_routed.tiles(kernel, 90, "bf16")[-1]))


def test_a_ragged_shape_does_not_spill():
    tile = routed_configs.ragged_tile("norm_linear", "bf16")
    check(aot.compile_kernel("norm_linear", 90, "bf16", tile, aot.variants("norm_linear", "bf16")[-1]))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kernel", aot_routed.KERNELS)
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_no_tile_spills(arch, kernel):
    compiled = list(aot.compile_all([arch], [kernel]))
    assert len(compiled) == sum(len(list(aot_routed.launches(kernel, arch, p))) for p in configs.PRODUCTS)
    for one in compiled:
        check(one)


def test_every_variant_is_another_specialisation():
    for kernel in aot_routed.KERNELS:
        for product in configs.PRODUCTS:
            names = [str(v) for v in aot.variants(kernel, product)]
            assert len(set(names)) == len(names)


def test_main_knows_the_routed_kernels(capsys):
    assert aot.main(["90", "gate_units", "fp32"]) == 0
    assert capsys.readouterr().out.count("gate_units") == 2 * len(aot.variants("gate_units", "fp32"))


@pytest.mark.parametrize("product", configs.PRODUCTS)
@pytest.mark.parametrize("arch", [75, *configs.ARCHITECTURES, 120])
def test_every_shape_has_a_tile(arch, product):
    for kernel in PRODUCTS:
        found = routed_configs.tiles(kernel, arch, product)
        assert found[-1].deeper == 0  # any contraction
        for tile in (*found, routed_configs.ragged_tile(kernel, product)):
            assert kernel != "linear_residual" or tile.columns % routed_configs.PART == 0
            assert tile.depth >= 16 and tile.programs >= 1
        sizes = [tile.rows * tile.columns for tile in found]
        assert sizes == sorted(sizes, reverse=True)
    for kernel in routed_configs.KERNELS:
        if kernel not in PRODUCTS:
            assert routed_configs.row_tile(kernel, 10**6).limit is None


def test_the_tile_follows_the_work():
    choose = lambda *shape: routed_configs.lookup("norm_linear", 90, "bf16", *shape, processors=132)  # noqa: E731
    assert (choose(16 * 197, 4096, 1024).rows, choose(16 * 197, 4096, 1024).columns) == (128, 128)
    assert (choose(16 * 197, 1536, 384).rows, choose(16 * 197, 1536, 384).columns) == (64, 128)  # short contraction
    assert choose(197, 1152, 384).rows < 64  # one image
    assert choose(1, 64, 64).rows == 16
    assert routed_configs.parts(384) == 6 and routed_configs.parts(65) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_cuda_planner_compiles_without_spills(tmp_path):
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in configs.ARCHITECTURES]
    command = ["nvcc", "-O3", "-std=c++17", "-Xptxas=-v", *targets, "-c", str(CSRC / "route_plan.cu")]
    run = subprocess.run([*command, "-o", str(tmp_path / "route_plan.o")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    functions = len(configs.ARCHITECTURES) * 3  # gate dtypes
    assert run.stderr.count("0 bytes spill stores, 0 bytes spill loads") == functions == run.stderr.count("registers")
