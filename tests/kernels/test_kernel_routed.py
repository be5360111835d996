"""The routed kernels, run by Triton's interpreter on the CPU, against their equations in fp64 (fixture ``interpreter``).

Whatever nobody may read is poisoned: compact rows of units that are not listed, entries of the list from count on, gates
and statistics of inactive rows.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from routed_kernel_parts import EPS, NAN, activate, close, compact, double, normalize, plan, randn
from torch import Tensor
from torch.nn import functional

import xdfast.kernels

#: Other cases are drawn in every run.
EXAMPLES = 100 if os.environ.get("XDFAST_HARDEN") == "long" else 12

pytestmark = pytest.mark.skipif(not xdfast.kernels.HAS_TRITON, reason=xdfast.kernels.WHY_NOT or "-")

ACTS = ["none", "gelu", "gelu_tanh", "silu", "relu", "swiglu"]
# Relative to the whole tensor. fp16: 11 bits in factors, in what is stored between launches and in the result.
TOLERANCE = {"float32": (1e-6, 3e-6), "float16": (2e-3, 4e-3)}
#: 16 × 32 tiles, several parts of the statistics, passes of 16 columns: many tiles of small shapes.
SMALL = {"table": "small"}
quick = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def grads(loss: Tensor, *leaves: Tensor | None) -> list[Tensor | None]:
    found = iter(torch.autograd.grad(loss, [t for t in leaves if t is not None], allow_unused=True))
    return [None if t is None else next(found) for t in leaves]


shapes = {
    "units": st.integers(1, 5),
    "rows_per_unit": st.integers(1, 9),
    "fill": st.sampled_from(["some", "some", "all", "none"]),
    "depth": st.sampled_from([1, 5, 16, 33, 64]),
    "columns": st.sampled_from([1, 7, 32, 48, 70]),
    "table": st.sampled_from([SMALL, {}]),
    "dtype": st.sampled_from(["float32", "float16"]),
    "seed": st.integers(0, 9),
}


@quick
@example(  # the sum that is the norm's gradient cancels
    act="silu", norm="rms", affine=True, biased=False, units=1, rows_per_unit=2, fill="some", depth=1, columns=70, table=SMALL,
    dtype="float16", seed=3,
)  # fmt: skip
@given(
    act=st.sampled_from(ACTS),
    norm=st.sampled_from(["layer", "rms", "none"]),
    affine=st.booleans(),
    biased=st.booleans(),
    **shapes,
)
def test_norm_linear(
    interpreter, units, rows_per_unit, fill, depth, columns, table, dtype, seed, act, norm, affine, biased
):
    value, gradient = TOLERANCE[dtype]
    p = plan(units, rows_per_unit, fill, seed)
    wide = columns * (2 if act == "swiglu" else 1)
    x = randn(p.capacity, depth, seed=seed, dtype=dtype, shift=0.5)
    if depth == 1 and norm == "layer":
        x = x * 0 + 1  # one channel is its own mean
    w = randn(wide, depth, seed=seed + 1, dtype=dtype, scale=depth**-0.5)
    bias = randn(wide, seed=seed + 2) if biased else None
    gamma = randn(depth, seed=seed + 3, shift=1.0) if affine and norm != "none" else None
    beta = randn(depth, seed=seed + 4) if affine and norm == "layer" else None
    pre = None if act == "none" else compact(p, wide, dtype)
    statistics = None if norm == "none" else compact(p, 2, "float32")
    options = {"norm": norm, "act": act, "precision": dtype}
    got = interpreter(
        "routed_linear.norm_linear", x, w, bias, gamma, beta, *p.where, compact(p, columns, dtype), eps=EPS, pre=pre,
        row_statistics=statistics, **options, **table,
    )  # fmt: skip
    assert got.launches == [*(["norm_rows_kernel"] if norm != "none" else []), "norm_linear_kernel"]
    args, kwargs = got.outputs
    out, pre, statistics = args[8], kwargs["pre"], kwargs["row_statistics"]
    leaves = double(x, w, bias, gamma, beta)
    x64, w64, bias64, gamma64, beta64 = leaves
    pre64 = functional.linear(normalize(x64, gamma64, beta64, norm)[p.rows], w64, bias64)
    close(out[: p.n], activate(pre64, act), value)
    assert out[p.n :].isnan().all()
    if pre is not None:
        close(pre[: p.n], pre64, value)
    # Backward of what the kernel saved.
    dout = randn(p.n, columns, seed=seed + 5, dtype=dtype)
    wanted = grads((activate(pre64, act) * dout.double()).sum(), *leaves)
    buffers = [None if t is None else torch.full(t.shape, NAN, dtype=t.dtype) for t in (w, bias, gamma, beta)]
    outputs = dict(zip(("dweight", "dbias", "dnorm_weight", "dnorm_bias"), buffers)) | {"dx": torch.zeros_like(x)}
    got = interpreter(
        "routed_gradients.norm_linear_backward", compact(p, columns, dtype, dout), x, w, gamma, beta, pre, statistics,
        *p.where, **options, **outputs, **table,
    )  # fmt: skip
    got = got.outputs[1]
    assert not got["dx"][p.inactive].any()
    for name, want in zip(("dx", "dweight", "dbias", "dnorm_weight", "dnorm_bias"), wanted):
        if want is not None:
            # LayerNorm's dx cancels (to nothing with one channel), and so may the sums over rows and columns of the norm's
            # gradients: compared with the size of their terms.
            half = 1e-4 * float(p.n and dtype == "float16")
            terms = 1 + want.norm() + (dout.double().norm() * w.double().norm() if "norm" in name else 0)
            slack = half * terms + (2e-3 * (1 + want.norm()) if name == "dx" and depth < 6 else 0)
            error = (got[name].double() - want).norm()
            assert got[name].isfinite().all() and error <= gradient * want.norm() + slack + 1e-5, name


@quick
@given(gated=st.booleans(), biased=st.booleans(), emit=st.booleans(), **shapes)
def test_linear_residual(
    interpreter, units, rows_per_unit, fill, depth, columns, table, dtype, seed, gated, biased, emit
):
    value, gradient = TOLERANCE[dtype]
    p = plan(units, rows_per_unit, fill, seed)
    x = randn(p.capacity, columns, seed=seed, dtype=dtype)
    x[p.inactive] = NAN
    h = compact(p, depth, dtype, randn(p.n, depth, seed=seed + 1, dtype=dtype))
    w = randn(columns, depth, seed=seed + 2, dtype=dtype, scale=depth**-0.5)
    bias = randn(columns, seed=seed + 3) if biased else None
    gate = p.gate if gated else None
    parts = -(-columns // (16 if table else 64))
    statistics = torch.full((p.capacity, parts, 2), NAN) if emit else None
    got = interpreter(
        "routed_linear.linear_residual", x, h, w, bias, gate, *p.where, statistics=statistics, precision=dtype, **table
    )
    assert got.launches == ["linear_residual_kernel"] and got.operators == []
    new, statistics = got.outputs[0][0], got.outputs[1]["statistics"]
    assert new[p.inactive].isnan().all()
    leaves = double(h[: p.n], w, bias, gate)
    h64, w64, bias64, gate64 = leaves
    y = functional.linear(h64, w64, bias64)
    y = y if gate is None else y * gate64[p.unit, None]
    close(new[p.rows], x[p.rows].double() + y, value)
    if emit:
        assert statistics[p.inactive].isnan().all()
        close(statistics[p.rows].sum(1)[:, 1], new[p.rows].double().square().sum(1), 1e-6)
        assert (
            (statistics[p.rows].sum(1)[:, 0].double() - new[p.rows].double().sum(1)).abs().max(-1)[0] < 1e-4
            if p.n
            else 1
        )
    dout = randn(p.capacity, columns, seed=seed + 4, dtype=dtype)
    dout[p.inactive] = NAN
    wanted = grads((y * dout[p.rows].double()).sum(), *leaves)
    outputs = {
        "dh": compact(p, depth, dtype),
        "dweight": torch.full(w.shape, NAN),
        "dbias": None if bias is None else torch.full(bias.shape, NAN),
        "dgate": None if gate is None else torch.zeros(units),
    }
    got = interpreter(
        "routed_gradients.linear_residual_backward", dout, h, w, bias, gate, *p.where, precision=dtype, **outputs,
        **table,
    ).outputs[1]  # fmt: skip
    close(got["dh"][: p.n], wanted[0], gradient)
    assert got["dh"][p.n :].isnan().all()
    close(got["dweight"], wanted[1], gradient)
    if bias is not None:
        close(got["dbias"], wanted[2], 3e-6)
    if gate is not None:
        listed = torch.zeros(units, dtype=torch.bool)
        listed[p.listed] = True
        assert not got["dgate"][~listed].any()
        size = (y.detach() * dout[p.rows].double()).norm() / p.gate[p.listed].min() if p.n else 0
        error = (got["dgate"][listed].double() - wanted[3][listed]).norm()
        assert error <= gradient * size


@quick
@given(norm=st.sampled_from(["layer", "rms", "none"]), affine=st.booleans(), gated=st.booleans(), **shapes)
def test_norm_and_residual(
    interpreter, units, rows_per_unit, fill, depth, columns, table, dtype, seed, norm, affine, gated
):
    value, gradient = TOLERANCE[dtype]
    p = plan(units, rows_per_unit, fill, seed)
    x = randn(p.capacity, columns + 1, seed=seed, dtype=dtype, shift=0.5)
    gamma = randn(columns + 1, seed=seed + 1, shift=1.0) if affine and norm != "none" else None
    beta = randn(columns + 1, seed=seed + 2) if affine and norm == "layer" else None
    statistics = None if norm == "none" else compact(p, 2, "float32")
    got = interpreter(
        "routed_linear.norm", x, gamma, beta, *p.where, compact(p, columns + 1, dtype), norm=norm, eps=EPS,
        row_statistics=statistics, **table,
    )  # fmt: skip
    assert got.launches == ["norm_rows_kernel"] and got.operators == []
    y, statistics = got.outputs[0][6], got.outputs[1]["row_statistics"]
    leaves = double(x, gamma, beta)
    y64 = normalize(*leaves, norm)[p.rows]
    close(y[: p.n], y64, value)
    assert y[p.n :].isnan().all()
    dy = randn(p.n, columns + 1, seed=seed + 3, dtype=dtype)
    wanted = grads((y64 * dy.double()).sum(), *leaves)
    outputs = {
        "dx": torch.zeros_like(x),
        "dnorm_weight": None if gamma is None else gamma * NAN,
        "dnorm_bias": None if beta is None else beta * NAN,
    }
    got = interpreter(
        "routed_gradients.norm_backward", compact(p, columns + 1, dtype, dy), x, statistics, gamma, *p.where, norm=norm,
        **outputs, **table,
    ).outputs[1]  # fmt: skip
    for name, want in zip(outputs, wanted):
        if want is not None and p.n:
            cancels = 1e-4 if columns == 1 else 0  # LayerNorm of two channels: dx is all but 0
            assert (got[name].double() - want).norm() <= gradient * want.norm() + cancels * dy.norm(), name
    # The residual, with y as any branch's output.
    gate = p.gate if gated else None
    y, old = compact(p, columns + 1, dtype, dy), x.clone()
    old[p.inactive] = NAN
    got = interpreter("routed_linear.residual", old, y, gate, *p.where, **table)
    assert got.launches == ["residual_kernel"]
    new = got.outputs[0][0]
    assert new[p.inactive].isnan().all()
    g = torch.ones(p.n, 1) if gate is None else p.gate[p.unit, None]
    close(new[p.rows], x[p.rows].double() + (g * dy).double(), value)
    got = interpreter(
        "routed_gradients.residual_backward", old, y, gate, *p.where, p.capacity, dy=compact(p, columns + 1, dtype),
        dgate=torch.zeros(units), **table,
    ).outputs[1]  # fmt: skip
    close(got["dy"][: p.n], g.double() * x[p.rows].double(), gradient)
    dots = torch.zeros(units, dtype=torch.double).index_add(0, p.unit, (dy.double() * x[p.rows].double()).sum(1))
    assert (got["dgate"].double() - dots).norm() <= 1e-5 * (1 + dots.norm())


def fold(w: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    folded = (w.double() if gamma is None else w.double() * gamma.double()).to(w.dtype)
    shift = torch.zeros(len(w), dtype=torch.double) if bias is None else bias.double()
    shift = shift if beta is None else shift + w.double() @ beta.double()
    return folded, folded.double().sum(1).float(), shift.float()


@pytest.mark.parametrize("table", [SMALL, {}], ids=["small", "table"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("norm", "act", "depth", "columns"),
    [("layer", "gelu", 80, 48), ("layer", "swiglu", 33, 40), ("rms", "swiglu", 64, 32), ("rms", "none", 48, 7)],
)
def test_norm_linear_with_carried_statistics(interpreter, norm, act, depth, columns, dtype, table):
    p = plan(4, 7, seed=3)
    wide = columns * (2 if act == "swiglu" else 1)
    x = randn(p.capacity, depth, seed=0, dtype=dtype, shift=2.0)
    w, bias = randn(wide, depth, seed=1, dtype=dtype, scale=depth**-0.5), randn(wide, seed=2)
    gamma, beta = randn(depth, seed=3, shift=1.0, scale=0.3), randn(depth, seed=4) if norm == "layer" else None
    parts = -(-depth // (16 if table else 64))
    got = interpreter("routed_linear.moments", x, torch.full((p.capacity, parts, 2), NAN), **table)
    statistics = got.outputs[0][1]
    close(statistics.sum(1), torch.stack((x.double().sum(1), x.double().square().sum(1)), 1), 1e-6)
    statistics[p.inactive] = NAN
    given_fold = interpreter("routed_linear.fold_norm", w, bias, gamma, beta, w.dtype).outputs
    for ours, theirs in zip(given_fold, fold(w, bias, gamma, beta)):
        assert ours.dtype == theirs.dtype
        close(ours, theirs.double(), 1e-3 if dtype == "float16" else 1e-6)
    folded, sums, shift = given_fold
    got = interpreter(
        "routed_linear.norm_linear", x, folded, shift, None, None, *p.where, compact(p, columns, dtype), norm=norm,
        eps=EPS, act=act, statistics=statistics, weight_sums=sums if norm == "layer" else None, precision=dtype,
        **table,
    )  # fmt: skip
    assert got.launches == ["norm_linear_kernel"] and got.operators == []
    x64, w64, bias64, gamma64, beta64 = double(x, w, bias, gamma, beta)
    want = activate(functional.linear(normalize(x64, gamma64, beta64, norm)[p.rows], w64, bias64), act)
    close(got.outputs[0][8][: p.n], want, {"float32": 3e-6, "float16": 5e-3}[dtype])


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 3e-6), ("float16", 3e-3)])
@pytest.mark.parametrize("table", [SMALL, {}], ids=["small", "table"])
def test_a_stack_with_carried_statistics_through_skipped_layers(interpreter, dtype, limit, table):
    """Three layers of an MLP and a linear branch; nobody in the second, everybody in the third."""
    units, rows_per_unit, width, hidden = 4, 5, 48, 64
    parts = -(-width // (16 if table else 64))
    x = randn(units * rows_per_unit, width, seed=0, dtype=dtype, shift=0.3)
    want = x.double()
    statistics = interpreter("routed_linear.moments", x, torch.full((len(x), parts, 2), NAN), **table).outputs[0][1]
    for layer, fill in enumerate(("some", "none", "some", "all")):
        p = plan(units, rows_per_unit, fill, seed=layer + 1)
        w1 = randn(hidden, width, seed=layer, dtype=dtype, scale=width**-0.5)
        w2 = randn(width, hidden, seed=layer + 9, dtype=dtype, scale=hidden**-0.5)
        b1, b2 = randn(hidden, seed=layer + 10), randn(width, seed=layer + 11)
        gamma, beta = randn(width, seed=layer + 12, shift=1.0, scale=0.2), randn(width, seed=layer + 13)
        folded, sums, shift = fold(w1, b1, gamma, beta)
        got = interpreter(
            "routed_linear.norm_linear", x, folded, shift, None, None, *p.where, compact(p, hidden, dtype),
            norm="layer", eps=EPS, act="gelu", statistics=statistics, weight_sums=sums, precision=dtype, **table,
        )  # fmt: skip
        got = interpreter(
            "routed_linear.linear_residual", x, got.outputs[0][8], w2, b2, p.gate, *p.where, statistics=statistics,
            precision=dtype, **table,
        )  # fmt: skip
        assert torch.equal(got.outputs[0][0][p.inactive], x[p.inactive])
        assert torch.equal(got.outputs[1]["statistics"][p.inactive], statistics[p.inactive])
        x, statistics = got.outputs[0][0], got.outputs[1]["statistics"]
        y = functional.linear(normalize(want, gamma.double(), beta.double(), "layer")[p.rows], w1.double(), b1.double())
        y = functional.linear(functional.gelu(y), w2.double(), b2.double())
        want = want.index_add(0, p.rows, y * p.gate[p.unit, None].double())
    close(x, want, limit)


def test_a_row_does_not_depend_on_which_others_are_active_nor_a_run_on_the_last(interpreter):
    units, rows_per_unit, width = 5, 7, 32
    x, w = randn(units * rows_per_unit, width, seed=0), randn(48, width, seed=1)
    results = []
    for fill in ("some", "all", "all"):
        p = plan(units, rows_per_unit, fill, seed=1)
        got = interpreter(
            "routed_linear.norm_linear", x, w, None, None, None, *p.where, compact(p, 48, "float32"), norm="layer",
            eps=EPS, act="silu", **SMALL,
        )  # fmt: skip
        back = interpreter(
            "routed_gradients.linear_residual_backward", x, got.outputs[0][8], randn(width, 48, seed=2), None, None,
            *p.where, dh=compact(p, 48, "float32"), dweight=torch.empty(width, 48), **SMALL,
        ).outputs[1]  # fmt: skip
        full = torch.zeros(len(x), 96)
        full[p.rows] = torch.cat((got.outputs[0][8][: p.n], back["dh"][: p.n]), 1)
        results.append((p, full, back["dweight"]))
    (p, some, _), (_, every, first), (_, again, second) = results
    # Not to the bit: rows lie elsewhere in their tiles, whose products are NumPy's here (the GPU tests ask for the bits).
    close(some[p.rows], every[p.rows], 1e-6)
    assert p.n < len(x)
    assert torch.equal(every, again) and torch.equal(first, second)


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_the_weight_gradient_in_stretches(interpreter, splits):
    p = plan(6, 11, "some", seed=2)
    dout, h = randn(p.capacity, 33, seed=0), compact(p, 40, "float32", randn(p.n, 40, seed=1))
    dout[p.inactive] = NAN
    got = interpreter(
        "routed_gradients.linear_residual_backward", dout, h, randn(33, 40, seed=2), None, p.gate, *p.where,
        dweight=torch.full((33, 40), NAN), dbias=torch.full((33,), NAN), splits=splits, **SMALL,
    )  # fmt: skip
    assert ("add_parts_kernel" in got.launches[:2]) == (splits > 1)
    scaled = dout[p.rows].double() * p.gate[p.unit, None].double()
    close(got.outputs[1]["dweight"], scaled.T @ h[: p.n].double(), 3e-6)
    close(got.outputs[1]["dbias"], scaled.sum(0), 3e-6)


def test_rows_may_lie_apart(interpreter):
    p = plan(3, 4, "some", seed=1)
    wide = torch.full((p.capacity, 50), NAN)
    wide[:, :20] = randn(p.capacity, 20, seed=0)
    out = torch.full((p.capacity, 40), NAN)
    w = randn(30, 20, seed=1)
    got = interpreter(
        "routed_linear.norm_linear", wide[:, :20], w, None, None, None, *p.where, out[:, :30], norm="rms", eps=EPS
    )
    want = normalize(wide[:, :20].double(), None, None, "rms")[p.rows] @ w.double().T
    close(got.outputs[0][8][: p.n], want, 1e-6)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_a_bad_row_stays_in_its_unit(interpreter, bad):
    p = plan(4, 3, "all")
    x = randn(p.capacity, 32, seed=0)
    x[4, 5] = bad
    got = interpreter(
        "routed_linear.norm_linear", x, randn(32, 32, seed=1), None, None, None, *p.where, compact(p, 32, "float32"),
        norm="layer", eps=EPS, act="relu",
    ).outputs[0][8]  # fmt: skip
    assert got[4].isnan().all() and got[:4].isfinite().all() and got[5:].isfinite().all()
