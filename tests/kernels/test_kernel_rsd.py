"""The three launches of the RSD loss, run by Triton's interpreter on the CPU, against fp64 (fixture ``interpreter``)."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import relative
from torch import Tensor

import xdfast.kernels

#: Other cases are drawn in every run.
EXAMPLES = 100 if os.environ.get("XDFAST_HARDEN") == "long" else 15

pytestmark = pytest.mark.skipif(not xdfast.kernels.HAS_TRITON, reason=xdfast.kernels.WHY_NOT or "-")

KAPPA, EPS = 0.01, 1e-5
# (loss, gradient), relative. fp32: rounding 6e-8 · √terms; measured 1e-7 and 1e-6. fp16: 11 bits in every factor.
P_ROUNDING = 3e-7  # absolute, of p_j in fp32, |p_j| ≤ 1: 2.5 units of rounding
TOLERANCE = {"float32": (1e-6, 5e-6), "tf32": (1e-6, 5e-6), "float16": (1e-3, 2e-2), "bfloat16": (1e-2, 5e-2)}

# name → (N, D, mean, dtype of student, of teacher); what each is for is in its name.
SHAPES = {
    "two_rows": (2, 3, 1.0, "float32", "float32"),
    "one_column": (9, 1, 0.0, "float32", "float32"),
    "exact_tiles": (32, 64, 0.0, "float32", "float32"),
    "one_past_a_tile": (33, 65, 0.0, "float32", "float32"),
    "square": (48, 48, 0.0, "float32", "float32"),
    "square_less_one": (47, 48, 0.0, "float32", "float32"),
    "gram": (70, 101, 2.0, "float32", "float32"),
    "covariance": (101, 37, 2.0, "float32", "float32"),
    "long": (1100, 20, 0.0, "float32", "float32"),
    "wide": (5, 300, 0.0, "float32", "float32"),
    "halves": (33, 70, 2.0, "float16", "float16"),
    "mixed": (70, 33, 2.0, "float16", "float32"),
    "bfloat16_in_and_out": (20, 33, 1.0, "bfloat16", "float32"),
    "mean_1e5": (130, 33, 1e5, "float32", "float32"),
    "mean_1e5_gram": (33, 130, 1e5, "float32", "float32"),
    "mean_1e5_long": (1100, 7, 1e5, "float32", "float32"),
}
#: How the kernels for large shapes are reached with small ones: 16 × 16 tiles and no resident ones.
SMALL = {"table": "small"}


def pair(n: int, d: int, mean: float = 0.0, dtypes: tuple[str, str] = ("float32", "float32"), seed: int = 0):
    generator = torch.Generator().manual_seed(seed + n * 1000 + d)
    t = torch.randn(n, d, generator=generator)
    s = torch.randn(n, d, generator=generator) + 0.5 * t
    return [(x + mean).to(getattr(torch, name)) for x, name in zip((s, 2 * t), dtypes)]


def expected(s: Tensor, t: Tensor, kappa: float = KAPPA, eps: float = EPS, mode: str = "std") -> tuple[Tensor, ...]:
    """The equation and its autograd in fp64; last, what rounding may amount to."""
    s, t = (x.detach().double().requires_grad_() for x in (s, t))

    def standardize(x: Tensor) -> Tensor:
        c = x - x.mean(0)
        return c / (x.std(0, correction=0) + eps) if mode == "std" else c / (c.square().mean(0) + eps).sqrt()

    zs, zt = standardize(s), standardize(t)
    p = zt.T @ zs / len(s)
    diagonal = p.diagonal()
    invariance, off = (diagonal - 1).square().sum(), (p - torch.diag(diagonal)).square().sum()
    loss = invariance + kappa * off
    grad_s, grad_t = torch.autograd.grad(loss, (s, t), retain_graph=True)
    # Bounds of what rounding does. Each gradient is a sum of terms that may cancel (two rows: to nearly nothing), and
    # p − 1 has the absolute error of p.
    n, sizes, sensitivities = len(s), [], []
    for x, own, other in ((s, zs, zt), (t, zt, zs)):
        variance = x.detach().var(0, correction=0)
        inv = 1 / (variance.sqrt() + eps) if mode == "std" else 1 / (variance + eps).sqrt()
        product = (other @ (other.T @ own)).detach() * (2 * kappa / n**2)
        weight = ((diagonal - 1).abs() + kappa * diagonal.abs()).detach() * 2 / n
        sizes.append(float((inv * product).norm() + (inv * weight * other.detach()).norm()))
        sensitivities.append(float((inv * other.detach()).norm() * 2 / n))
    values = (loss, invariance, off, diagonal.mean())
    return *(value.detach() for value in values), grad_s, grad_t, (sizes, sensitivities)


def check(outputs, s: Tensor, t: Tensor, need: tuple[bool, bool], precision: str, **options) -> None:
    value, gradient = TOLERANCE[precision]
    loss, invariance, off, diagonal, grad_s, grad_t, (sizes, sensitivities) = expected(s, t, **options)
    d = s.shape[1]
    of_p = 2 * P_ROUNDING * (d * invariance).sqrt() + d * P_ROUNDING**2  # of Σ (p − 1)²
    for got, want, limit in zip(
        outputs[:4],
        (loss, invariance, off, diagonal),
        (value * loss + of_p, 1e-6 * invariance + of_p, value * (off + d), P_ROUNDING),
    ):
        assert got.dtype == torch.float32 and got.shape == ()
        assert abs(got.double() - want) <= limit
    for got, want, x, wanted, size, sensitivity in zip(
        outputs[4:], (grad_s, grad_t), (s, t), need, sizes, sensitivities
    ):
        if not wanted:
            assert got.shape == (0, 0) and got.dtype == x.dtype
            continue
        assert got.shape == x.shape and got.dtype == x.dtype and got.is_contiguous()
        info = torch.finfo(x.dtype)
        rounding = 0.0 if x.dtype == torch.float32 else info.eps
        denormal = info.smallest_normal * info.eps * x.numel() ** 0.5  # fp16 has a floor of 6e-8
        limit = (gradient + rounding) * want.norm() + gradient / 5 * size + P_ROUNDING * sensitivity
        assert (got.double() - want).norm() <= limit + denormal


@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_gradients_equal_fp64(interpreter, name):
    n, d, mean, *dtypes = SHAPES[name]
    s, t = pair(n, d, mean, tuple(dtypes))
    got = interpreter("rsd_loss_and_gradients", s, t, KAPPA, EPS, "std", "float32", 1.0, True, True)
    check(got.outputs, s, t, (True, True), "float32")
    if n > 2 and torch.float32 in (s.dtype, t.dtype):  # the promise itself, without allowance for the terms
        *_, grad_s, grad_t, _ = expected(s, t)
        for got_grad, want in zip(got.outputs[4:], (grad_s, grad_t)):
            assert relative(got_grad, want) < 5e-6 or got_grad.dtype != torch.float32


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    n=st.integers(2, 80),
    d=st.integers(1, 80),
    need=st.sampled_from([(True, False), (False, True), (True, True), (False, False)]),
    mode=st.sampled_from(["std", "var"]),
    precision=st.sampled_from(["float32", "float16"]),
    dtypes=st.sampled_from([("float32", "float32"), ("float16", "float16"), ("float32", "float16")]),
    layout=st.sampled_from(["contiguous", "transposed", "strided"]),
    large=st.sampled_from([{}, {**SMALL, "groups": 1}, {**SMALL, "groups": 2, "splits": 4}, {**SMALL, "splits": 1}]),
    kappa=st.sampled_from([0.0, 0.01, 1.0]),
)
def test_any_shape(interpreter, n, d, need, mode, precision, dtypes, layout, large, kappa):
    s, t = pair(n, d, 1.0, dtypes)
    if layout == "transposed":
        s, t = s.T.contiguous().T, t
    elif layout == "strided":
        s = torch.stack((s, s + 1), 2).reshape(n, 2 * d)[:, ::2]
        t = torch.cat((t, t))[::2] if n > 2 else t
        t = t[:n]
    got = interpreter("rsd_loss_and_gradients", s, t, kappa, EPS, mode, precision, 1.0, *need, **large)
    check(got.outputs, s, t, need, precision, kappa=kappa, mode=mode)


@pytest.mark.parametrize(
    ("shape", "groups", "splits", "precision"),
    [
        ((40, 56), 1, 4, "float32"),  # one program parks U and reads it back
        ((53, 56), 3, 8, "float16"),  # groups with unequal numbers of row tiles
        ((40, 54), None, 1, "float32"),  # a group for every row tile
        ((56, 40), None, 2, "float32"),
        ((54, 37), None, 8, "float16"),  # more splits than steps of the contraction
    ],
)
def test_kernels_for_large_shapes(interpreter, shape, groups, splits, precision):
    s, t = pair(*shape)
    options = (KAPPA, EPS, "std", precision, 1.0, True, True)
    got = interpreter("rsd_loss_and_gradients", s, t, *options, groups=groups, splits=splits, **SMALL)
    assert got.launches[0] == "standardize_stream"
    assert got.launches[2] == ("gradient_parked" if shape[0] < shape[1] else "gradient_covariance")
    check(got.outputs, s, t, (True, True), precision)


@pytest.mark.slow
def test_more_parts_than_one_load_takes(interpreter):
    s, t = pair(300, 260)  # 17 tiles of 16 columns; 16 of their sums are read at once
    options = (KAPPA, EPS, "std", "float32", 1.0, True, True)
    got = interpreter("rsd_loss_and_gradients", s, t, *options, table="small product", splits=1)
    check(got.outputs, s, t, (True, True), "float32")


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_var_mode_is_batch_norm(interpreter, shape):
    s, t = pair(*shape)
    x = s.double().requires_grad_()
    zs, zt = (torch.nn.functional.batch_norm(y, None, None, training=True, eps=0.5) for y in (x, t.double()))
    p = zt.T @ zs / len(s)
    weight = torch.full_like(p, KAPPA).fill_diagonal_(1.0)
    (want,) = torch.autograd.grad((weight * (p - torch.eye(len(p))).square()).sum(), x)
    got = interpreter("rsd_forward", s, t, KAPPA, 0.5, "var", "float32", True, False).outputs
    assert relative(got[3], want) < 5e-6


@pytest.mark.parametrize("shape", [(16, 40), (24, 40), (40, 24)])
@pytest.mark.parametrize("need", [(True, False), (False, True), (True, True), (False, False)])
def test_three_launches_and_nothing_else(interpreter, shape, need):
    s, t = pair(*shape)
    got = interpreter("rsd_forward", s, t, KAPPA, EPS, "std", "float32", *need)
    standardize, product, gradient = got.launches
    assert (standardize, product) == ("standardize_resident", "product") and gradient.startswith("gradient_")
    assert set(got.operators) <= {"empty", "split_with_sizes", "split"}  # no memset, no copy
    assert len({out.untyped_storage().data_ptr() for out in got.outputs if out.numel()}) == 3 + sum(need)


@pytest.mark.parametrize("shape", [(16, 40), (40, 24)])
@pytest.mark.parametrize("options", [{}, SMALL])
def test_scale_is_of_the_loss_and_the_gradients_alone(interpreter, shape, options):
    s, t = pair(*shape)
    once, twice = (
        interpreter("rsd_loss_and_gradients", s, t, KAPPA, EPS, "std", "float32", k, True, True, **options).outputs
        for k in (1.0, 2.0)
    )
    for factor, x, y in zip((2, 1, 1, 1, 2, 2), once, twice):
        assert torch.equal(factor * x, y)


@pytest.mark.parametrize("options", [{}, SMALL])
def test_no_dxd_matrix_when_the_batch_is_smaller(interpreter, options):
    s, t = pair(4, 200)
    for need in ((True, True), (False, False)):
        got = interpreter("rsd_forward", s, t, KAPPA, EPS, "std", "float32", *need, **options)
        assert got.largest < 200 * 200 / 4


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("need", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("n", [32, 21])
def test_a_given_gram_matrix_equals_its_own(interpreter, n, need, precision):
    s, t = pair(n, 50)
    gram = interpreter("teacher_gram", t, EPS, "std", precision)
    assert gram.launches == ["standardize_resident", "product"]
    matrix = gram.outputs
    assert matrix.shape == (n, n) and matrix.is_contiguous() and matrix.dtype == getattr(torch, precision)
    z = (t - t.mean(0)).double() / (t.double().std(0, correction=0) + EPS)
    assert relative(matrix, z @ z.T / 50) < (1e-6 if precision == "float32" else 1e-3)
    # Not to the bit: a tile's product is NumPy's here, whose rounding depends on the place on some processors.
    assert relative(matrix, matrix.T) < (1e-6 if precision == "float32" else 1e-3)
    options = (s, t, KAPPA, EPS, "std", precision, *need)
    own, given = interpreter("rsd_forward", *options), interpreter("rsd_forward", *options, gram=matrix)
    assert len(given.launches) == (3 if need[1] else 2)
    if n % 16 == 0:
        assert set(given.operators) <= {"empty", "split_with_sizes", "split"}
    wider = interpreter("rsd_forward", *options, gram=matrix.float())
    for x, y, z in zip(own.outputs, given.outputs, wider.outputs):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_a_given_gram_matrix_of_any_strides_and_with_more_samples_than_columns(interpreter):
    s, t = pair(20, 50)
    matrix = interpreter("teacher_gram", t, EPS, "std", "float32", **SMALL).outputs
    spread = torch.full((40, 60), float("nan"))[::2, ::3]
    spread[:] = matrix
    got = interpreter("rsd_loss_and_gradients", s, t, KAPPA, EPS, "std", "float32", 1.0, True, False, gram=spread)
    check(got.outputs, s, t, (True, False), "float32")
    s, t = pair(50, 20)
    matrix = interpreter("teacher_gram", t, EPS, "std", "float32").outputs
    got = interpreter("rsd_loss_and_gradients", s, t, KAPPA, EPS, "std", "float32", 1.0, True, False, gram=matrix)
    assert matrix.shape == (50, 50) and len(got.launches) == 3  # the covariance form has no use for it
    check(got.outputs, s, t, (True, False), "float32")


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("options", [{}, SMALL])
def test_runs_are_bitwise_equal(interpreter, shape, options):
    s, t = pair(*shape)
    first, second = (
        interpreter("rsd_loss_and_gradients", s, t, KAPPA, EPS, "std", "float16", 1.0, True, True, **options).outputs
        for _ in range(2)
    )
    assert all(torch.equal(x, y) for x, y in zip(first, second))


@pytest.mark.parametrize("side", ["student", "teacher", "expanded"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("options", [{}, SMALL])
def test_constant_columns_have_the_finite_gradient_of_the_equation(interpreter, shape, side, options):
    s, t = pair(*shape)
    x = s if side == "student" else t
    x[:, 3], x[:, 7] = 0.1, 12345.678
    if side == "expanded":  # stride 0: every teacher column is constant
        t = t[:1].expand(shape)
    got = interpreter("rsd_loss_and_gradients", s, t, KAPPA, EPS, "std", "float32", 1.0, True, True, **options).outputs
    want = expected(s, t)
    assert abs(got[0].double() - want[0]) <= 1e-6 * want[0]
    for gradient, truth in zip(got[4:], want[4:6]):
        assert gradient.isfinite().all()
        # A constant column's gradient is 1/ε times larger: compared column by column.
        error = (gradient.double() - truth).norm(dim=0)
        assert (error <= 1e-5 * truth.norm(dim=0) + 1e-9 * truth.norm()).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("options", [{}, SMALL])
def test_nan_and_inf_propagate(interpreter, shape, bad, options):
    s, t = pair(*shape)
    s[5, 4] = bad
    got = interpreter("rsd_forward", s, t, KAPPA, EPS, "std", "float32", True, False, **options).outputs
    assert got[0].isnan() and got[1].isnan() and got[2].isnan()
    columns = got[3].isnan()
    assert columns[:, 4].all() and columns.sum() == shape[0]  # a bad student column stays in its column
    s, t = pair(*shape)
    t[5, 4] = bad
    got = interpreter("rsd_forward", s, t, KAPPA, EPS, "std", "float32", True, False, **options).outputs
    assert got[1].isnan() and got[3].isnan().all()


# On a GPU: the shapes of training, every precision, every kernel.
GPU_SHAPES = [(128, 768), (100, 1000), (256, 1024), (512, 768), (600, 1000), (1024, 2048), (1024, 768), (5000, 515)]


def _on_the_gpu(s: Tensor, t: Tensor, precision: str) -> list[Tensor]:
    from xdfast.kernels.rsd import rsd_loss_and_gradients

    outputs = rsd_loss_and_gradients(s.cuda(), t.cuda(), KAPPA, EPS, "std", precision, 1.0, True, True)
    return [out.cpu() for out in outputs]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_loss_and_gradients_equal_fp64_on_the_gpu(shape, precision):
    s, t = pair(*shape)
    loss, gradient = (1e-3, 5e-3) if precision == "tf32" else TOLERANCE[precision]
    got, want = _on_the_gpu(s, t, precision), expected(s, t)
    assert abs(got[0].double() - want[0]) <= loss * want[0]
    assert relative(got[4], want[4]) < gradient and relative(got[5], want[5]) < gradient


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_runs_are_bitwise_equal_on_the_gpu(shape):
    s, t = pair(*shape)
    first = _on_the_gpu(s, t, "bfloat16")
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(first, _on_the_gpu(s, t, "bfloat16")))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 768), (600, 1000), (1024, 768)])
def test_captured_in_a_cuda_graph(shape):
    from xdfast.kernels.rsd import rsd_loss_and_gradients, teacher_gram

    s, t = (x.cuda() for x in pair(*shape))
    options = (KAPPA, EPS, "std", "bfloat16", 1.0, True, True)
    rsd_loss_and_gradients(s, t, *options, gram=teacher_gram(t, EPS, "std", "bfloat16"))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rsd_loss_and_gradients(s, t, *options, gram=teacher_gram(t, EPS, "std", "bfloat16"))
    s.copy_(pair(*shape, seed=1)[0])
    for _ in range(3):
        graph.replay()
    for x, y in zip(captured, rsd_loss_and_gradients(s, t, *options)):
        torch.testing.assert_close(x, y)
