"""Routed linear maps: values and every gradient against the dense equation with masks, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from routed_parts import activated, normalised, route_of, routed_backends, row_mask
from tolerances import TOLERANCES, relative
from torch.nn import functional

import xdfast
from xdfast.ops import (
    routed_linear_residual,
    routed_linear_residual_,
    routed_ln_linear,
    routed_norm,
    routed_residual,
    routed_residual_,
)
from xdfast.ops.routed import ACTIVATIONS, NORMS
from xdfast.ops.routed import op as routed_op
from xdfast.ops.routed.reference import linear_residual_reference, ln_linear_reference, rows_of

HALVES = (torch.bfloat16, torch.float16)
backends = pytest.mark.parametrize("backend", routed_backends())
SHAPES = {
    "active": st.lists(st.booleans(), min_size=1, max_size=6),
    "rows": st.sampled_from([1, 2, 5]),
    "width": st.sampled_from([1, 3, 16, 33, 40]),
    "features": st.sampled_from([1, 7, 32]),
    "norm": st.sampled_from(NORMS),
    "act": st.sampled_from(ACTIVATIONS),
    "affine": st.booleans(),
    "known": st.booleans(),
    "seed": st.integers(0, 9),
}


def _leaf(*shape: int, dtype: torch.dtype = torch.float32, shift: float = 0.0) -> torch.Tensor:
    return (torch.randn(*shape) + shift).to(dtype).requires_grad_()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _promise(dtype: torch.dtype, width: int) -> float:
    """A norm over one or three features divides by a standard deviation near zero: rounding is multiplied by it. Few numbers
    of 8 or 11 bits, too, may be off by more than their share: by one that cancels, or whose sign turns at relu's corner."""
    return TOLERANCES["routed", dtype] * (6 if dtype in HALVES else 30 if width < 16 else 1)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@settings(max_examples=25, deadline=None)
@example(  # a gate's gradient of 10.7 that is a sum of larger terms
    active=[True], rows=1, width=16, features=7, norm="layer", act="swiglu", affine=False, known=False, seed=3
)
@example(  # one hidden feature that cancels: an error of 0.017 of the result in bfloat16
    active=[False, True, False, False, False, False],
    rows=1,
    width=33,
    features=1,
    norm="layer",
    act="swiglu",
    affine=True,
    known=False,
    seed=7,
)
@given(**SHAPES)
def test_a_branch_equals_the_dense_equation_with_masks(
    backend, dtype, active, rows, width, features, norm, act, affine, known, seed
) -> None:
    torch.manual_seed(seed)
    if dtype in HALVES:
        width = max(width, 16)  # of fewer features a half says nothing that a test could hold it to
    gate = torch.rand(len(active)).to(_wide(dtype)).requires_grad_()
    route = route_of(active, rows, gate=gate, known=known)
    x = _leaf(len(active) * rows, width, dtype=dtype, shift=1.0)
    weight = _leaf(features * (2 if act == "swiglu" else 1), width, dtype=dtype)
    bias = _leaf(weight.shape[0], dtype=dtype) if affine else None
    wide = _wide(dtype)
    norm_weight = _leaf(width, dtype=wide, shift=1.0) if affine and norm != "none" else None
    norm_bias = _leaf(width, dtype=wide) if affine and norm == "layer" else None
    outer, outer_bias = _leaf(width, features, dtype=dtype), _leaf(width, dtype=dtype) if affine else None
    parameters = [t for t in (x, weight, bias, norm_weight, norm_bias, outer, outer_bias, gate) if t is not None]
    with xdfast.backend(backend):
        h = routed_ln_linear(
            x, weight, bias, route, norm_weight=norm_weight, norm_bias=norm_bias, norm=norm, eps=1e-3, act=act
        )
        y = routed_linear_residual(x, h, outer, outer_bias, route)
        direction = torch.randn_like(y)
        gradients = torch.autograd.grad(y, parameters, direction, allow_unused=True)
    assert h.shape == (route.capacity, features) and h.dtype == weight.dtype and y.dtype == x.dtype
    mask = row_mask(route)
    assert torch.equal(y[~mask], x[~mask])

    exact = [t.detach().double().requires_grad_() for t in parameters]
    named = dict(zip([id(t) for t in parameters], exact, strict=True))
    e = {name: None if t is None else named[id(t)] for name, t in {
        "x": x, "weight": weight, "bias": bias, "nw": norm_weight, "nb": norm_bias, "outer": outer, "ob": outer_bias,
        "gate": gate}.items()}  # fmt: skip
    full = activated(functional.linear(normalised(e["x"], e["nw"], e["nb"], norm, 1e-3), e["weight"], e["bias"]), act)
    added = e["gate"].repeat_interleave(rows)[:, None] * functional.linear(full, e["outer"], e["ob"])
    expected = e["x"] + torch.where(mask[:, None], added, 0)
    promise = _promise(dtype, width)
    assert relative(y, expected) < promise
    # the reference beside the op says the same
    listed = rows_of(route.index, int(route.count), rows)
    h64 = ln_linear_reference(e["x"], e["weight"], e["bias"], e["nw"], e["nb"], listed, norm, 1e-3, act)
    y64 = linear_residual_reference(e["x"], h64, e["outer"], e["ob"], e["gate"], listed, listed // rows)
    torch.testing.assert_close(y64, expected, rtol=1e-9, atol=1e-9)
    wanted = torch.autograd.grad(expected, exact, direction.double(), allow_unused=True)
    scale = max(float(g.norm()) for g in wanted if g is not None)
    # gradients that cancel (a norm's along the mean; a gate's most of all, one number) are small beside what they are made of
    terms = float((direction.double() * functional.linear(full, e["outer"], e["ob"]).detach()).abs().sum())
    for of, mine, true in zip(parameters, gradients, wanted, strict=True):
        true = torch.zeros_like(mine, dtype=torch.float64) if true is None else true
        made_of = max(scale, terms) if of is gate else 0.2 * scale
        assert float((mine.double() - true).norm()) < 4 * promise * max(float(true.norm()), made_of)


@backends
@settings(max_examples=30, deadline=None)
@given(active=SHAPES["active"], rows=SHAPES["rows"], width=SHAPES["width"], gated=st.booleans(), seed=st.integers(0, 9))
def test_in_place_equals_the_functional_form_bit_for_bit(backend, active, rows, width, gated, seed) -> None:
    torch.manual_seed(seed)
    gate = torch.rand(len(active)) if gated else None
    route = route_of(active, rows, gate=gate)
    x, h = torch.randn(len(active) * rows, width), torch.randn(route.capacity, 5)
    weight, bias = torch.randn(width, 5), torch.randn(width)
    before = x.clone()
    with xdfast.backend(backend):
        for functional_form, in_place, second in (
            (routed_linear_residual, routed_linear_residual_, (h, weight, bias)),
            (routed_residual, routed_residual_, (torch.randn(route.capacity, width),)),
        ):
            expected = functional_form(x, *second, route)
            assert torch.equal(x, before)
            mine = x.clone()
            assert in_place(mine, *second, route) is mine
            assert torch.equal(mine, expected)
            assert torch.equal(mine[~row_mask(route)], x[~row_mask(route)])


@backends
def test_gate_zero_is_the_identity_and_gate_one_is_dense_bit_for_bit(backend) -> None:
    x, weight, bias = torch.randn(4 * 3, 20), torch.randn(20, 20), torch.randn(20)
    everything, nothing = route_of([True] * 4, 3), route_of([False] * 4, 3)
    one = route_of([True] * 4, 3, gate=torch.ones(4))
    with xdfast.backend(backend):
        assert torch.equal(routed_linear_residual(x, torch.empty(0, 20), weight, bias, nothing), x)
        assert routed_norm(x, nothing).shape == (0, 20)
        dense = routed_linear_residual(x, x, weight, bias, everything)
        assert torch.equal(routed_linear_residual(x, x, weight, bias, one), dense)
        torch.testing.assert_close(dense, x + functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(routed_norm(x, everything), functional.layer_norm(x, (20,), eps=1e-6))


@backends
def test_a_sample_does_not_depend_on_who_else_is_listed_nor_on_its_place(backend) -> None:
    x = torch.randn(6, 4, 32)
    norm_weight = torch.randn(32)
    with xdfast.backend(backend):
        alone = routed_norm(x, route_of([i == 2 for i in range(6)], 4), norm_weight=norm_weight)
        among = routed_norm(x, route_of([True] * 6, 4), norm_weight=norm_weight)
        order = torch.randperm(6)
        moved = routed_norm(x[order], route_of([True] * 6, 4), norm_weight=norm_weight)
    assert torch.equal(alone, among[8:12])
    assert torch.equal(moved.unflatten(0, (6, 4)), among.unflatten(0, (6, 4))[order])


@backends
def test_the_same_call_gives_the_same_bits(backend) -> None:
    x, weight = _leaf(40 * 3, 24), _leaf(17, 24)
    norm_weight = _leaf(24)
    route = route_of([i % 3 > 0 for i in range(40)], 3)
    results = []
    for _ in range(20):
        with xdfast.backend(backend):
            h = routed_ln_linear(x, weight, None, route, norm_weight=norm_weight, act="gelu")
            results.append(torch.autograd.grad(h.square().sum(), (x, weight, norm_weight)))
    assert all(torch.equal(a, b) for later in results[1:] for a, b in zip(later, results[0], strict=True))


@backends
def test_tails_are_never_read(backend, poisoned_memory) -> None:
    """Counts that the host does not know leave room behind the listed rows: NaN there must not spread."""
    route = route_of([True, False, True, False], 3, gate=torch.rand(4).requires_grad_(), known=False)
    x, weight, outer = _leaf(12, 8), _leaf(6, 8), _leaf(8, 6)
    with xdfast.backend(backend):
        h = routed_ln_linear(x, weight, None, route, act="silu")
        assert h.shape == (12, 6) and h[:6].isfinite().all()
        y = routed_linear_residual(x, h, outer, None, route)
        gradients = torch.autograd.grad(y.sum(), (x, weight, outer, route.gate))
    assert y.isfinite().all() and all(g.isfinite().all() for g in gradients)
    assert gradients[3][1] == 0 and gradients[3][0] != 0


def test_gradients_by_finite_differences() -> None:
    route = route_of([True, False, True], 2, gate=torch.tensor([0.7, 0.2, 0.9]))
    gate = torch.tensor([0.7, 0.2, 0.9], dtype=torch.float64, requires_grad=True)
    shapes = ((6, 5), (8, 5), (8,), (5,), (5,), (5, 4), (5,))
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def branch(x, weight, bias, norm_weight, norm_bias, outer, outer_bias, gate):
        listed = route.__class__(gate, route.index, route.count, route.offsets, 2, 2)
        h = routed_ln_linear(x, weight, bias, listed, norm_weight=norm_weight, norm_bias=norm_bias, act="swiglu")
        return routed_linear_residual(x, h, outer, outer_bias, listed)

    torch.autograd.gradcheck(branch, (*leaves, gate))


def test_the_ops_keep_torchs_rules() -> None:
    route = route_of([True, False, True], 2)
    x, weight, outer = _leaf(6, 8), _leaf(4, 8), _leaf(8, 4)
    lists = (route.index, route.count, 2, 2)
    first = (x, weight, None, None, None, *lists, "layer", 1e-6, "gelu", True)
    torch.library.opcheck(torch.ops.xdfast.routed_ln_linear.default, first)
    second = (x, torch.randn(4, 4, requires_grad=True), outer, None, None, *lists)
    torch.library.opcheck(torch.ops.xdfast.routed_linear_residual.default, second)
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.xdfast.routed_linear_residual_.default, tuple(t.detach() if t is x else t for t in second)
        )


def test_whole_branches_under_the_compiler() -> None:
    route = route_of([True, False, True], 2)
    x, weight, outer = _leaf(6, 8), _leaf(4, 8), _leaf(8, 4)

    def branch(x):
        return routed_linear_residual(x, routed_ln_linear(x, weight, None, route, act="gelu"), outer, None, route)

    compiled = torch.compile(branch, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), branch(x))
    mine, theirs = (torch.autograd.grad(f(x).square().sum(), (x, weight, outer)) for f in (compiled, branch))
    torch.testing.assert_close(mine, theirs)


def test_autocast_takes_products_in_half_precision_and_keeps_the_stream() -> None:
    route = route_of([True, False, True], 2)
    x, weight, outer = _leaf(6, 16), _leaf(8, 16), _leaf(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        h = routed_ln_linear(x, weight, None, route, act="gelu")
        y = routed_linear_residual(x, h, outer, None, route)
    assert h.dtype == torch.bfloat16 and y.dtype == torch.float32
    plain = routed_linear_residual(x, routed_ln_linear(x, weight, None, route, act="gelu"), outer, None, route)
    assert 0 < relative(y, plain) < 2e-2
    assert torch.autograd.grad(y.sum(), weight)[0].dtype == torch.float32


def test_a_gradient_of_a_gradient_is_an_error_not_a_zero() -> None:
    route = route_of([True, False], 2)
    x, weight = _leaf(4, 8), _leaf(4, 8)
    (first,) = torch.autograd.grad(routed_ln_linear(x, weight, None, route).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|does not require grad|not registered"):
        torch.autograd.grad(first.sum(), weight)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, r: routed_norm(x.int(), r), TypeError, "floating-point tensor, got torch.int32"),
        (lambda x, r: routed_norm(x[0], r), ValueError, r"\[rows, D\] or \[B, T, D\], got \[8\]"),
        (lambda x, r: routed_norm(x[:4], r), ValueError, "plan is for 3 units of 2 rows, 6 in all.*has 4"),
        (lambda x, r: routed_norm(x, r, norm="batch"), ValueError, "norm"),
        (lambda x, r: routed_norm(x, r, norm="rms", norm_bias=x[0]), ValueError, "RMSNorm has no bias"),
        (
            lambda x, r: routed_norm(x, r, norm_weight=x[0, :3]),
            ValueError,
            r"norm_weight must have shape \[8\], got \[3\]",
        ),
        (lambda x, r: routed_ln_linear(x, x[:, :3], None, r), ValueError, r"weight must be \[F, 8\].*got \[6, 3\]"),
        (lambda x, r: routed_ln_linear(x, x[:5], None, r, act="swiglu"), ValueError, "swiglu"),
        (lambda x, r: routed_ln_linear(x, x, None, r, act="gellu"), ValueError, "Did you mean 'gelu'"),
        (lambda x, r: routed_ln_linear(x, x, x[0], r), ValueError, r"bias must have shape \[6\], got \[8\]"),
        (lambda x, r: routed_linear_residual(x, x[:4], x, None, r), ValueError, "to be added to x of width 8"),
        (lambda x, r: routed_residual(x, x[:4, :3], r), ValueError, "to be added to x of width 8"),
        (lambda x, r: routed_residual_(x.requires_grad_(), x[:4], r), RuntimeError, "in-place form has no gradient"),
    ],
)
def test_what_does_not_fit_is_told(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(6, 8), route_of([True, False, True], 2))


@pytest.mark.parametrize("unit", [3, 7, -1, 2**31 - 1])  # the last one plus 1 is negative in 32 bits
def test_a_list_of_another_batch_does_not_read_foreign_memory(unit) -> None:
    x, index = torch.randn(6, 8), torch.tensor([0, unit, 2], dtype=torch.int32)
    rows = routed_op.implementation(x).rows
    with pytest.raises((ValueError, IndexError), match="another batch|out of range"):
        rows.gather_norm(x, None, None, index, 2, 2, "layer", 1e-6, False)


@backends
@pytest.mark.parametrize("linear", [True, False])
def test_rows_that_the_host_cannot_know_to_be_unlisted_teach_nothing(poisoned_memory, backend, linear) -> None:
    """Found by tests/hardening: their gradient was memory that nobody had written."""
    route = route_of([False, True, False], 2, known=False)
    x, h = torch.randn(6, 5), torch.randn(route.capacity, 5, requires_grad=True)
    weight = torch.randn(5, 5) if linear else None
    with xdfast.backend(backend):
        y = routed_residual(x, h, route) if weight is None else routed_linear_residual(x, h, weight, None, route)
        (gradient,) = torch.autograd.grad(y.sum(), h)
    assert route.capacity == 6 and gradient[:2].all() and not gradient[2:].any()


@backends
def test_an_empty_list_takes_h_of_any_strides(backend) -> None:
    """Found by tests/hardening: contiguous() does nothing to a tensor without elements."""
    x, route = torch.randn(4, 5), route_of([False, False], 2)
    with xdfast.backend(backend):
        assert torch.equal(routed_residual(x, torch.ones(0, 10)[:, ::2], route), x)
