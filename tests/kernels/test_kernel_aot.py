"""Every kernel compiles for every architecture of the tile table without a GPU, and nothing spills to memory."""

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
    assert compiled.spill_bytes == 0, compiled
    assert 0 < compiled.registers <= 128, compiled  # above that fewer than 16 warps fit one SM
    assert compiled.shared_bytes <= 48 * 1024, compiled
    assert compiled.registers * 32 * compiled.tile.warps <= 65536, compiled  # the block must fit the register file


# The largest tile of each kernel is the one that would spill; the full product runs with -m slow.
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_largest_tile_does_not_spill(kernel, arch, dtype):
    _check(aot.compile_kernel(kernel, arch, dtype, configs.tiles(kernel, arch, dtype)[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_no_tile_spills(arch):
    compiled = list(aot.compile_all([arch]))
    assert len(compiled) == sum(
        len(configs.tiles(k, arch, d)) for k in configs.KERNELS for d in ("fp32", "bf16", "fp16")
    )
    for one in compiled:
        _check(one)


def test_lookup_takes_the_smallest_tile_that_fits():
    assert configs.lookup("column_standardize_resident", 90, "fp32", 128).rows == 128
    assert configs.lookup("column_standardize_resident", 90, "fp32", 129).rows == 256
    assert configs.lookup("column_standardize_resident", 90, "fp32", 10**6) is None


def test_newer_and_older_architectures_use_the_nearest_row():
    assert configs.tiles("column_standardize_stream", 120, "bf16") == configs.tiles(
        "column_standardize_stream", 100, "bf16"
    )
    assert configs.tiles("column_standardize_stream", 75, "fp32") == configs.tiles(
        "column_standardize_stream", 80, "fp32"
    )


def test_main_prints_a_row_per_kernel(capsys):
    assert aot.main(["90"]) == 0
    out = capsys.readouterr().out
    for kernel in configs.KERNELS:
        assert kernel in out
    assert "0 of the above spill" in out
