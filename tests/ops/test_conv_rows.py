"""The fused short convolution against its plain formulation in fp64, on every instruction set this CPU has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES, relative

from xdfast.ops.conv_rows import (
    conv_rows,
    conv_rows_available,
    conv_rows_reference,
    pack_rows,
    pack_rows_transposed,
)

pytestmark = pytest.mark.skipif(not conv_rows_available()[0], reason=conv_rows_available()[1])
LIMIT = TOLERANCES["conv_rows", torch.float32]


def _case(batch, height, inputs, outputs, kernel, stride, padding, groups, film, residual, bias, seed):
    torch.manual_seed(seed)
    x, weight = torch.randn(batch, height, inputs), torch.randn(outputs, inputs, kernel) / (inputs * kernel) ** 0.5
    b = torch.randn(outputs) if bias else None
    norm = (groups, torch.randn(outputs), torch.randn(outputs), 1e-5) if groups else None
    packed = pack_rows(weight, b, stride=stride, padding=padding, norm=norm)
    rows = (height + 2 * padding - kernel) // stride + 1
    vector = torch.randn(batch, 3 + 2 * outputs) if film else None
    added = torch.randn(batch, rows, outputs) if residual else None
    ours = conv_rows(x, packed, film=vector, film_offset=3 if film else 0, residual=added)
    theirs = conv_rows_reference(
        x.double(),
        weight.double(),
        None if b is None else b.double(),
        stride=stride,
        padding=padding,
        groups=groups,
        norm_weight=None if norm is None else norm[1].double(),
        norm_bias=None if norm is None else norm[2].double(),
        scale=None if vector is None else vector[:, 3 : 3 + outputs].double(),
        shift=None if vector is None else vector[:, 3 + outputs :].double(),
        residual=None if added is None else added.double(),
    )
    return ours, theirs


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 4), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.sampled_from([1, 3, 5]),
    st.integers(1, 3), st.integers(0, 2), st.sampled_from([0, 1, 2, 4, 8]), st.booleans(), st.booleans(), st.booleans(),
    st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(batch, height, inputs, eighths, kernel, stride, padding, groups, film, residual, bias, seed) -> None:
    outputs = eighths * 8 if groups else eighths * 8 - 3
    height = max(height, kernel)
    ours, theirs = _case(batch, height, inputs, outputs, kernel, stride, padding, groups, film, residual, bias, seed)
    assert ours.shape == theirs.shape
    if ours.numel():
        assert relative(ours, theirs) < LIMIT


@pytest.mark.parametrize("threads", [1, 2])
def test_a_layer_of_the_fields_size_on_threads(threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, theirs = _case(2, 16, 256, 512, 5, 1, 2, 8, True, True, True, 0)
    finally:
        torch.set_num_threads(before)
    assert relative(ours, theirs) < LIMIT


def test_mish_from_far_below_to_far_above() -> None:
    x = torch.linspace(-200, 200, 4001).reshape(1, 1, -1)
    outputs = x.shape[2]
    # a norm over one channel and row would make everything 0: mean and deviation are of a group of two rows, ± 1
    rows = torch.stack([torch.ones(outputs), -torch.ones(outputs)])[None]
    packed = pack_rows(torch.eye(outputs)[:, :, None], None, norm=(outputs, x.flatten(), torch.zeros(outputs), 0.0))
    got = conv_rows(rows, packed)[0, 0]
    want = torch.nn.functional.mish(x.flatten().double())
    assert ((got.double() - want).abs() <= 3e-7 * want.abs() + 1e-35).all()


def test_a_transposed_convolution_doubles_the_rows() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 6, 24), torch.randn(24, 20, 4), torch.randn(20)
    want = torch.nn.functional.conv_transpose1d(
        x.double().transpose(1, 2), weight.double(), bias.double(), stride=2, padding=1
    ).transpose(1, 2)
    got = conv_rows(x, pack_rows_transposed(weight, bias)).view(3, 12, 20)
    assert relative(got, want) < LIMIT
    with pytest.raises(ValueError, match="kernel 4, got 3"):
        pack_rows_transposed(torch.zeros(4, 4, 3), None)


def test_nan_stays_within_its_sample() -> None:
    x = torch.randn(2, 8, 16)
    x[0, 3, 5] = torch.nan
    packed = pack_rows(torch.randn(32, 16, 5), None, padding=2, norm=(8, torch.ones(32), torch.zeros(32), 1e-5))
    y = conv_rows(x, packed)
    assert y[0].isnan().all() and y[1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 16, dtype=torch.float64)}, "x must be contiguous float32"),
        ({"x": torch.zeros(1, 16, 8).transpose(1, 2)}, "x must be contiguous float32"),
        ({"x": torch.zeros(1, 8, 15)}, "panels must be"),
        ({"film": torch.zeros(1, 63)}, "with 2 . 32 columns from 0 on"),
        ({"film": torch.zeros(2, 64)}, "film must be"),
        ({"residual": torch.zeros(1, 7, 32)}, "residual must be"),
        ({"film": torch.zeros(1, 64), "film_offset": 2**63 - 1}, "film must be"),
        ({"film": torch.zeros(1, 64), "film_offset": -1}, "film must be"),
    ],
)
def test_wrong_inputs_are_named(change, message) -> None:
    given = {"x": torch.zeros(1, 8, 16), **change}
    with pytest.raises(ValueError, match=message):
        conv_rows(given.pop("x"), pack_rows(torch.zeros(32, 16, 5), torch.zeros(32), padding=2), **given)


def test_padding_without_bounds_is_refused() -> None:
    with pytest.raises(ValueError, match="padding 4611686018427387904"):
        conv_rows(torch.zeros(1, 8, 16), pack_rows(torch.zeros(32, 16, 5), None, padding=2**62))


def test_fewer_rows_than_the_kernel() -> None:
    with pytest.raises(ValueError, match="2 rows are fewer than the kernel's 5"):
        conv_rows(torch.zeros(1, 2, 4), pack_rows(torch.zeros(8, 4, 5), None))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set(capability, tmp_path) -> None:
    """The best one is what the other tests ran with."""
    if capability == "avx2" and torch.ops.xdfast_c.cpu_capability() == "DEFAULT":
        pytest.skip("this CPU has no AVX2")
    script = f"""
import sys; sys.path[:0] = [{os.path.dirname(__file__)!r}, {os.path.dirname(os.path.dirname(__file__))!r}]
import test_conv_rows as t, torch
print(torch.ops.xdfast_c.cpu_capability())
for case in [(2, 16, 20, 64, 5, 1, 2, 8, True, True, True, 0), (1, 7, 3, 5, 1, 1, 0, 0, False, True, True, 1),
             (1, 17, 8, 40, 3, 2, 1, 8, True, False, False, 2)]:
    ours, theirs = t._case(*case)
    assert t.relative(ours, theirs) < t.LIMIT, case
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if torch.ops.xdfast_c.cpu_capability() != "DEFAULT":
        assert done.stdout.strip() == capability.upper()
