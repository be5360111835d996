"""The compiled column standardisation ``torch.ops.xdfast_c.rsd_standardize`` against fp64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

# Without the compiled extension: `pip install --no-build-isolation --no-deps -e .` builds it.
pytest.importorskip("xdfast._C", exc_type=ImportError)

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def standardize(x: torch.Tensor, eps: float = EPS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.ops.xdfast_c.rsd_standardize(x, eps)


def expected(x: torch.Tensor, eps: float = EPS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.double()
    centred = x - x.mean(0)
    std = centred.square().mean(0).sqrt()
    return centred / (std + eps), 1 / (std + eps), torch.where(std == 0, 0.0, (std + eps) / std)


def check(x: torch.Tensor, eps: float = EPS) -> None:
    """1e-6: fp32 sums over at most 64 rows, fp64 above that; the error must not grow with N."""
    got, want = standardize(x, eps), expected(x, eps)
    assert [t.dtype for t in got] == [torch.float32] * 3
    assert got[0].is_contiguous() and got[0].shape == x.shape
    scale = want[0].abs().amax(0).clamp_min(1e-30)
    assert ((got[0].double() - want[0]).abs() / scale).max() < 1e-6
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[2].double(), want[2], rtol=1e-6, atol=0)


# Around the block (64 columns), the panel (128), the row chunk (64), the serial threshold and the buffer limit.
SHAPES = [(2, 1), (2, 3), (7, 50), (33, 63), (63, 64), (64, 65), (65, 127), (128, 128), (129, 129), (300, 257)]
SHAPES += [(3, 1000)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_equal_fp64(shape, dtype):
    check((torch.randn(shape) * 3 + 1).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_too_long_to_buffer(dtype):
    check((torch.randn(20_000, 70) + 3).to(dtype))


@pytest.mark.parametrize("mean", [1e2, 1e3, 1e4, 1e5])
def test_large_means_lose_nothing(mean):
    check(torch.randn(512, 40) + mean)


@pytest.mark.parametrize("scale", [1e-10, 1e-3, 1e10])
def test_extreme_scales(scale):
    check(torch.randn(100, 40) * scale, eps=1e-5 * scale)


def test_every_half_value_is_read_exactly():
    """All 65536 bit patterns of float16, Inf and NaN included: two equal rows give mean = the value itself."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    # Rows v and 0: mean v/2, std |v|/2, so inv = 1 / (|v|/2 + eps) tells the value that was read.
    x = torch.stack([values, torch.zeros_like(values)])
    inv = standardize(x, 1.0)[1]
    want = 1 / (values.double().abs() / 2 + 1)
    finite = values.isfinite()
    torch.testing.assert_close(inv[finite].double(), want[finite], rtol=1e-6, atol=0)
    assert inv[~finite].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    base = torch.randn(90, 200).to(dtype)
    for x in (base.T, base[1::2], base[:, 1::3], base[5:, 7:107], base.T[3:, ::2]):
        check(x)
        assert torch.equal(standardize(x)[0], standardize(x.contiguous())[0])


def test_expanded_rows_are_constant_columns():
    z, inv, ratio = standardize(torch.randn(1, 30).expand(12, 30))
    assert z.abs().max() == 0 and ratio.abs().max() == 0
    torch.testing.assert_close(inv, torch.full_like(inv, 1 / EPS))


@pytest.mark.parametrize("rows", [1, 2, 63, 64, 65, 1000])
def test_constant_columns(rows):
    x = torch.randn(rows, 70)
    x[:, 3], x[:, 69] = 0.1, 12345.678
    z, inv, ratio = standardize(x)
    assert z[:, [3, 69]].abs().max() == 0
    assert ratio[[3, 69]].abs().max() == 0
    torch.testing.assert_close(inv[[3, 69]], torch.full((2,), 1 / EPS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_column(value, dtype):
    clean = torch.randn(70, 150).to(dtype)
    for column in (0, 5, 149):
        x = clean.clone()
        x[11, column] = value
        z, inv, ratio = standardize(x)
        assert z[:, column].isnan().all() and inv[column].isnan() and ratio[column].isnan()
        others = [c for c in range(150) if c != column]
        for got, want in zip(standardize(x), standardize(clean)):
            assert torch.equal(got[..., others], want[..., others])


def test_fresh_memory_is_never_read(poisoned_memory):
    z, inv, ratio = standardize(torch.randn(31, 77))
    assert z.isfinite().all() and inv.isfinite().all() and ratio.isfinite().all()


def test_threads_do_not_change_the_result():
    x = torch.randn(300, 700)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(standardize(x))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other):
            assert torch.equal(first, second)


def test_input_is_not_changed_and_no_columns_work():
    x = torch.randn(9, 9)
    copy = x.clone()
    standardize(x)
    assert torch.equal(x, copy)
    assert [tuple(t.shape) for t in standardize(torch.empty(4, 0))] == [(4, 0), (0,), (0,)]


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(4), ValueError, r"must be a matrix \[N, D\], but has shape \[4\]"),
        (torch.randn(2, 3, 4), ValueError, r"but has shape \[2, 3, 4\]"),
        (torch.empty(0, 4), ValueError, "at least one row"),
        (torch.ones(3, 4, dtype=torch.int64), TypeError, "must be float32, bfloat16 or float16, but is Long"),
        (torch.ones(3, 4, dtype=torch.float64), TypeError, "Double; convert it"),
    ],
)
def test_bad_input(x, error, message):
    with pytest.raises(error, match=message):
        standardize(x)


_OTHER_ISA = """
import torch, xdfast._C
torch.manual_seed(0)
op = torch.ops.xdfast_c
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((2, 3), (65, 127), (129, 300), (9000, 33)):
        x = (torch.randn(shape) + 2).to(dtype)
        x[:, 0] = 1.5
        z, inv, ratio = op.rsd_standardize(x, 1e-5)
        d = x.double(); c = d - d.mean(0); std = c.square().mean(0).sqrt()
        want = c / (std + 1e-5)
        assert ((z.double() - want).abs() / want.abs().amax(0).clamp_min(1e-30)).max() < 1e-6, (dtype, shape)
        torch.testing.assert_close(inv.double(), 1 / (std + 1e-5), rtol=1e-6, atol=0)
        assert ratio[0] == 0 and z[:, 0].abs().max() == 0
print(op.cpu_capability())
"""


def _runnable() -> list[str]:
    """Instruction sets this CPU can run, of those the kernel is compiled for."""
    order = ["default", "avx2", "avx512"]
    here = torch.ops.xdfast_c.cpu_capability().lower()
    return order[: order.index(here) + 1] if here in order else order[:1]


@pytest.mark.parametrize("capability", _runnable())
def test_every_instruction_set(capability, tmp_path):
    """The kernel is compiled for several targets; each one this CPU can run is checked, chosen as torch chooses."""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONSAFEPATH": "1"}
    run = subprocess.run(
        [sys.executable, "-c", _OTHER_ISA], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == capability.upper()
