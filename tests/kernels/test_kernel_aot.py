"""Every kernel compiles for every architecture of the tile table without a GPU, fits it, and spills nothing to memory."""

from __future__ import annotations

import os

import pytest

from xdfast.kernels import configs

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 replaces the compiler by the interpreter"
)
pytest.importorskip("triton")
aot = pytest.importorskip("xdfast.kernels.aot")


def _check(compiled: aot.Compiled) -> None:
    assert aot.problems(compiled) == [], compiled
    assert compiled.registers > 0, compiled
    assert (compiled.instruction != "") == (compiled.tile.depth > 0), compiled


# The largest tile of each kernel is the one that would spill; all tiles and variants run with -m slow.
@pytest.mark.parametrize(("arch", "product"), [(80, "bf16"), (90, "fp32"), (90, "bf16"), (100, "tf32")])
@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_largest_tile_does_not_spill(kernel, arch, product):
    compiled = aot.compile_kernel(kernel, arch, product, configs.tiles(kernel, arch, product)[-1])
    _check(compiled)
    if compiled.tile.depth:
        tensor_cores = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[arch]
        assert compiled.instruction == ("fma" if product == "fp32" else tensor_cores), compiled


@pytest.mark.parametrize("kernel", [k for k in configs.KERNELS if not k.startswith("standardize")])
def test_both_gradients_in_one_launch_do_not_spill(kernel):
    both = [v for v in aot.variants(kernel, "bf16") if v.constants["STUDENT"] and v.constants["TEACHER"]]
    for variant in both[:2]:
        _check(aot.compile_kernel(kernel, 90, "bf16", configs.tiles(kernel, 90, "bf16")[-1], variant))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kernel", configs.KERNELS)
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_no_tile_spills(arch, kernel):
    compiled = list(aot.compile_all([arch], [kernel]))
    assert len(compiled) == sum(
        len(configs.tiles(kernel, arch, p)) * len(aot.variants(kernel, p)) for p in configs.PRODUCTS
    )
    for one in compiled:
        _check(one)


def test_problems_are_told():
    tile = configs.Tile(None, 64, 64, 32)
    compiled = aot.Compiled("product", 80, "bf16", tile, aot.variants("product", "bf16")[0], 128, 8, 200_000, "fma")
    spills, shared, registers = aot.problems(compiled)
    assert "spills 8" in spills and "sm_80 has 166912" in shared and "131072 registers" in registers


def test_every_variant_is_another_specialisation():
    for kernel in configs.KERNELS:
        for product in configs.PRODUCTS:
            names = [str(v) for v in aot.variants(kernel, product)]
            assert len(set(names)) == len(names)


def test_lookup_takes_the_first_tile_that_fits():
    assert configs.lookup("standardize_resident", 90, "fp32", 128).rows == 128
    assert configs.lookup("standardize_resident", 90, "fp32", 129).rows == 256
    assert configs.lookup("standardize_resident", 90, "fp32", 10**6) is None
    assert configs.lookup("product", 90, "bf16", 10**6).rows == 128


@pytest.mark.parametrize("product", configs.PRODUCTS)
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_size_has_a_tile(arch, product):
    for kernel in ("standardize_stream", "product", "gradient_parked", "gradient_covariance"):
        assert configs.tiles(kernel, arch, product)[-1].limit is None
    for kernel in configs.KERNELS:
        limits = [t.limit for t in configs.tiles(kernel, arch, product) if t.limit is not None]
        assert limits == sorted(limits)
        if kernel.endswith("resident"):  # all rows in one tile
            assert all(t.limit == t.rows for t in configs.tiles(kernel, arch, product))


def test_newer_and_older_architectures_use_the_nearest_row():
    assert configs.tiles("product", 120, "bf16") == configs.tiles("product", 100, "bf16")
    assert configs.tiles("product", 75, "fp32") == configs.tiles("product", 80, "fp32")


def test_splits_fill_the_gpu_but_leave_every_part_two_steps():
    assert configs.splits(90, tiles=1000, steps=64) == 1
    assert configs.splits(90, tiles=10, steps=12) == 4
    assert configs.splits(90, tiles=1, steps=1000) == 8
    assert configs.splits(90, tiles=1, steps=3) == 1


def test_groups_do_not_outnumber_the_row_tiles():
    assert configs.groups(90, blocks=2, row_tiles=5) == 5
    assert configs.groups(90, blocks=100, row_tiles=50) == 3
    assert configs.groups(90, blocks=1000, row_tiles=50) == 1


def test_main_prints_a_row_per_variant(capsys):
    assert aot.main(["90", "gradient_parked", "fp32"]) == 0
    out = capsys.readouterr().out
    assert out.count("gradient_parked") == len(aot.variants("gradient_parked", "fp32"))
    assert "0 of the above spill" in out


def test_main_says_what_it_does_not_know(capsys):
    assert aot.main(["90", "gradient_packed"]) == 2
    assert "gradient_packed" in capsys.readouterr().err
