"""The Triton kernel's arithmetic, run by Triton's interpreter on the CPU, against fp64.

TRITON_INTERPRET must be set before Triton is imported, and this process may have imported it; the kernel therefore runs
in one subprocess for the whole file, and every case is a parameter here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import xdfast.kernels

pytestmark = pytest.mark.skipif(not xdfast.kernels.HAS_TRITON, reason=xdfast.kernels.WHY_NOT or "-")

EPS = 1e-5

# name → (N, D, mean, std, dtype); what each is for is in its name.
SHAPES = {
    "one_row": (1, 5, 0.0, 1.0, "float32"),
    "two_rows": (2, 3, 1.0, 1.0, "float32"),
    "one_column": (9, 1, 0.0, 1.0, "float32"),
    "exact_tile": (16, 16, 0.0, 1.0, "float32"),
    "odd": (33, 70, 2.0, 3.0, "float32"),
    "prime": (101, 37, 0.0, 1.0, "float32"),
    "large_tile": (300, 19, 0.0, 1.0, "float32"),
    "stream": (1500, 18, 1.0, 2.0, "float32"),
    "mean_1e3": (130, 33, 1e3, 1.0, "float32"),
    "mean_1e5": (130, 33, 1e5, 1.0, "float32"),
    "mean_1e5_stream": (1100, 7, 1e5, 1.0, "float32"),
    "tiny_values": (40, 20, 0.0, 1e-6, "float32"),
    "half": (33, 70, 2.0, 3.0, "float16"),
    "half_stream": (1100, 33, 0.0, 1.0, "float16"),
}
LAYOUTS = ("contiguous", "transposed", "row_slice", "column_slice", "expanded_rows")

_RUNNER = """
import sys, torch
from xdfast.kernels.rsd import column_standardize
cases = torch.load(sys.argv[1], weights_only=True)
# Outputs start as NaN: an element the kernel does not write is seen.
empty = torch.empty
torch.empty = lambda *a, **k: empty(*a, **k).fill_(float("nan"))
torch.save({name: column_standardize(x, 1e-5) for name, x in cases.items()}, sys.argv[2])
"""


def _layout(name: str) -> torch.Tensor:
    base = torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    return {
        "contiguous": base,
        "transposed": base.T,
        "row_slice": base[1::3],
        "column_slice": base[:, 1::2],
        "expanded_rows": base[:1].expand(8, 60),
    }[name]


def _special(name: str) -> torch.Tensor:
    x = torch.randn(24, 20, generator=torch.Generator().manual_seed(5))
    if name == "constant_column":
        x[:, 3], x[:, 7] = 0.1, 12345.678
    elif name == "nan_column":
        x[5, 4] = float("nan")
    elif name == "inf_column":
        x[2, 9] = float("inf")
    return x


def _inputs() -> dict[str, torch.Tensor]:
    cases = {}
    for name, (n, d, mean, std, dtype) in SHAPES.items():
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(n * 1000 + d)) * std + mean
        cases[name] = x.to(getattr(torch, dtype))
    cases |= {f"layout_{name}": _layout(name) for name in LAYOUTS}
    cases |= {name: _special(name) for name in ("constant_column", "nan_column", "inf_column")}
    cases["again"] = cases["odd"]
    cases["no_columns"] = torch.empty(4, 0)
    return cases


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    folder: Path = tmp_path_factory.mktemp("kernel_rsd")
    # torch.save keeps strides of views, so the kernel sees the layouts made here.
    torch.save(_inputs(), folder / "in.pt")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _RUNNER, str(folder / "in.pt"), str(folder / "out.pt")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=110)
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(folder / "out.pt", weights_only=True)


def _expected(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.double()
    centred = x - x.mean(0)
    std = centred.square().mean(0).sqrt()
    return centred / (std + EPS), 1 / (std + EPS), torch.where(std == 0, 0.0, (std + EPS) / std)


def _compare(got, x: torch.Tensor) -> None:
    # fp32 statistics: 1e-6 of the largest value of a column for z, 1e-6 relative for the column constants.
    z, inv, ratio = _expected(x)
    assert [t.dtype for t in got] == [torch.float32] * 3
    assert got[0].is_contiguous()
    scale = z.abs().amax(0).clamp_min(1e-30)
    assert ((got[0].double() - z).abs() / scale).max() < 1e-6
    torch.testing.assert_close(got[1].double(), inv, rtol=1e-6, atol=0)
    torch.testing.assert_close(got[2].double(), ratio, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [n for n in SHAPES if n != "one_row"])
def test_values_equal_fp64(results, name):
    _compare(results[name], _inputs()[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(results, layout):
    x = _layout(layout)
    if layout == "expanded_rows":  # all rows equal: every column is constant
        z, inv, ratio = results["layout_expanded_rows"]
        assert z.abs().max() == 0 and ratio.abs().max() == 0
        torch.testing.assert_close(inv, torch.full_like(inv, 1 / EPS))
    else:
        _compare(results[f"layout_{layout}"], x)


def test_one_row_is_a_constant_column(results):
    z, inv, ratio = results["one_row"]
    assert z.abs().max() == 0 and ratio.abs().max() == 0
    torch.testing.assert_close(inv, torch.full_like(inv, 1 / EPS))


def test_constant_columns_have_ratio_zero_and_touch_nothing_else(results):
    x = _special("constant_column")
    z, inv, ratio = results["constant_column"]
    for column in (3, 7):
        assert z[:, column].abs().max() == 0
        assert ratio[column] == 0
        assert inv[column] == pytest.approx(1 / EPS, rel=1e-6)
    others = [c for c in range(20) if c not in (3, 7)]
    _compare((z[:, others].contiguous(), inv[others], ratio[others]), x[:, others])


@pytest.mark.parametrize(("name", "column"), [("nan_column", 4), ("inf_column", 9)])
def test_nan_and_inf_stay_in_their_column(results, name, column):
    x = _special(name)
    z, inv, ratio = results[name]
    assert z[:, column].isnan().all() and inv[column].isnan() and ratio[column].isnan()
    others = [c for c in range(20) if c != column]
    _compare((z[:, others].contiguous(), inv[others], ratio[others]), x[:, others])


def test_runs_are_bitwise_equal(results):
    for first, second in zip(results["odd"], results["again"]):
        assert torch.equal(first, second)


def test_no_columns(results):
    assert [tuple(t.shape) for t in results["no_columns"]] == [(4, 0), (0,), (0,)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n in SHAPES if n != "one_row"])
def test_values_equal_fp64_on_the_gpu(name):
    from xdfast.kernels.rsd import column_standardize

    x = _inputs()[name]
    _compare([t.cpu() for t in column_standardize(x.cuda(), EPS)], x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_and_wide_on_the_gpu(dtype):
    from xdfast.kernels.rsd import column_standardize

    for n, d in ((128, 768), (1024, 2048), (5000, 515)):
        x = (torch.randn(n, d, generator=torch.Generator().manual_seed(n)) + 2).to(dtype)
        _compare([t.cpu() for t in column_standardize(x.cuda(), EPS)], x)
