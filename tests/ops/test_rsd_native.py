"""The compiled CPU kernels ``torch.ops.xdfast_c.rsd_loss`` and ``rsd_prepare`` against fp64, called directly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES, relative

from xdfast.ops.rsd.reference import rsd_loss_reference

# Without the compiled extension: `pip install --no-build-isolation --no-deps -e .` builds it.
pytest.importorskip("xdfast._C", exc_type=ImportError)

EPS = 1e-5
KAPPA = 0.01
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_BF16 = torch.ops.xdfast_c.cpu_has_bf16_gemm()
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bfloat16 products (AVX512-BF16 or AMX)")


def statistics(x: torch.Tensor, eps: float = EPS, on_variance: bool = False) -> tuple[torch.Tensor, ...]:
    """(mean, inv, ratio) of the columns, as rsd_prepare computes them."""
    hi, lo, inv, ratio = torch.ops.xdfast_c.rsd_prepare(x, eps, on_variance, False)[0].double()
    return hi + lo, inv, ratio


def run(student, teacher, *, bf16=False, on_variance=False, need=(True, False), prepared=False, scale=1.0):
    known = torch.ops.xdfast_c.rsd_prepare(teacher, EPS, on_variance, bf16) if prepared else (None, None)
    gram = known[1] if prepared and known[1].numel() else None
    return torch.ops.xdfast_c.rsd_loss(
        student, teacher, KAPPA, EPS, on_variance, bf16, scale, *need, known[0], gram
    )  # fmt: skip


def truth(student, teacher, eps_mode: str = "std"):
    s, t = student.double().requires_grad_(), teacher.double().requires_grad_()
    invariance, decorrelation, diagonal = rsd_loss_reference(s, t, EPS, eps_mode)
    loss = invariance + KAPPA * decorrelation
    return loss, invariance, decorrelation, diagonal, *torch.autograd.grad(loss, (s, t))


def pair(n: int, d: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    student = torch.randn(n, d)
    return student.to(dtype), (0.5 * student + 2 * torch.randn(n, d) + 1).to(dtype)


# Both forms, and sizes around what the code cuts into: vectors (4..64), row chunks and strips (32, 64), tiles (128),
# blocks (256), the serial threshold.
# N = 2 is tested in test_rsd.py, against another measure.
SHAPES = [
    (5, 1),
    (4, 2),
    (7, 50),
    (33, 63),
    (63, 64),
    (64, 64),
    (65, 66),
    (129, 128),
    (128, 129),
    (300, 257),
    (40, 1000),
]


@pytest.mark.parametrize("need", [(True, False), (False, True), (True, True), (False, False)], ids=str)
@pytest.mark.parametrize("on_variance", [False, True], ids=["std", "var"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_fp64(shape, on_variance, need) -> None:
    student, teacher = pair(*shape)
    expected = truth(student, teacher, "var" if on_variance else "std")
    for prepared in [False] if need[1] else [False, True]:
        got = run(student, teacher, on_variance=on_variance, need=need, prepared=prepared, scale=3.0)
        assert relative(got[0], 3 * expected[0]) < TOLERANCES["value", torch.float32]
        for part, wanted in zip(got[1:4], expected[1:4]):
            # One column has no off-diagonal: compared absolutely there.
            assert relative(part, wanted) < TOLERANCES["value", torch.float32]
        for needed, gradient, wanted in zip(need, got[4:], expected[4:]):
            if needed:
                assert relative(gradient, 3 * wanted) < TOLERANCES["gradient", torch.float32]
            else:
                assert gradient.shape == (0, 0)


@needs_bf16
@pytest.mark.parametrize("need", [(True, False), (True, True), (False, False)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_products(shape, need) -> None:
    student, teacher = pair(*shape)
    expected = truth(student, teacher)
    got = run(student, teacher, bf16=True, need=need)
    assert relative(got[0], expected[0]) < TOLERANCES["value", "bfloat16 products"]
    for needed, gradient, wanted in zip(need, got[4:], expected[4:]):
        if needed:
            assert relative(gradient, wanted) < TOLERANCES["gradient", "bfloat16 products"]


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(4, 200),
    d=st.integers(1, 300),
    student=st.sampled_from(DTYPES),
    teacher=st.sampled_from(DTYPES),
    need=st.sampled_from([(True, False), (False, True), (True, True), (False, False)]),
    on_variance=st.booleans(),
    bf16=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_dtype(n, d, student, teacher, need, on_variance, bf16, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(n, d, generator=generator).to(student)
    t = (torch.randn(n, d, generator=generator) + 0.3 * s).to(teacher)
    bf16 = bf16 and HAS_BF16
    got, expected = (
        run(s, t, on_variance=on_variance, need=need, bf16=bf16),
        truth(s, t, "var" if on_variance else "std"),
    )
    # The loss of a few columns can be near zero: compared with the size of its terms, which are about 1 a column.
    limit = TOLERANCES["value", "bfloat16 products"] if bf16 else TOLERANCES["value", torch.float32]
    assert abs(float(got[0]) - float(expected[0].detach())) < limit * max(float(expected[0].detach()), 0.1 * d)
    for needed, x, gradient, wanted in zip(need, (s, t), got[4:], expected[4:]):
        if needed:
            limit = TOLERANCES["gradient", x.dtype]
            limit = max(limit, TOLERANCES["gradient", "bfloat16 products"]) if bf16 else limit
            # Few samples: the gradient is a small difference of terms of size inv · 2/N.
            size = float(wanted.norm()) + 2e-2 * float((1 / x.double().std(0, correction=0)).norm()) / n
            assert float((gradient.double() - wanted).norm()) < limit * size
            assert gradient.dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 1), (63, 64), (65, 127), (300, 257), (20_000, 70)], ids=str)
@pytest.mark.parametrize("on_variance", [False, True], ids=["std", "var"])
def test_statistics_equal_fp64(shape, dtype, on_variance) -> None:
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    wide = x.double()
    variance = (wide - wide.mean(0)).square().mean(0)
    inv = 1 / (variance + EPS).sqrt() if on_variance else 1 / (variance.sqrt() + EPS)
    got = statistics(x, on_variance=on_variance)
    torch.testing.assert_close(got[0], wide.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[1], inv, rtol=1e-6, atol=0)
    ratio = torch.ones_like(inv) if on_variance else (variance.sqrt() + EPS) / variance.sqrt()
    torch.testing.assert_close(got[2], ratio, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mean", [1e2, 1e3, 1e4, 1e5])
def test_large_means_lose_nothing(mean) -> None:
    x = torch.randn(512, 40) + mean
    torch.testing.assert_close(statistics(x)[1], 1 / (x.double().std(0, correction=0) + EPS), rtol=1e-6, atol=0)
    student, teacher = pair(64, 96)
    student, teacher = student + mean, teacher - mean
    assert relative(run(student, teacher)[4], truth(student, teacher)[4]) < 1e-6


def test_every_half_value_is_read_exactly() -> None:
    """All 65536 bit patterns of float16, Inf and NaN included: two equal rows give mean = the value itself."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    # Rows v and 0: mean v/2, std |v|/2, so inv = 1 / (|v|/2 + eps) tells the value that was read.
    inv = statistics(torch.stack([values, torch.zeros_like(values)]), 1.0)[1]
    finite = values.isfinite()
    torch.testing.assert_close(inv[finite], (1 / (values.double().abs() / 2 + 1))[finite], rtol=1e-6, atol=0)
    assert inv[~finite].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype) -> None:
    base = torch.randn(90, 200).to(dtype)
    for x in (base.T, base[1::2], base[:, 1::3], base[5:, 7:107], base.T[3:, ::2], base[:1].expand(90, 200)):
        other = torch.randn(x.shape)
        for a, b in ((x, other), (other, x)):
            for got, want in zip(run(a, b), run(a.contiguous(), b.contiguous())):
                assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [2, 63, 64, 65, 1000])
def test_constant_columns(rows) -> None:
    x = torch.randn(rows, 70)
    x[:, 3], x[:, 69] = 0.1, 12345.678
    _, inv, ratio = statistics(x)
    assert ratio[[3, 69]].abs().max() == 0
    torch.testing.assert_close(inv[[3, 69]], torch.full((2,), 1 / EPS).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(70, 150), (150, 70)], ids=str)
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=needs_bf16)])
def test_nan_and_inf_of_the_student_stay_in_their_column(value, shape, bf16) -> None:
    clean, teacher = pair(*shape)
    for column in (0, 5, shape[1] - 1):
        student = clean.clone()
        student[11, column] = value
        loss, *_, gradient, _ = run(student, teacher, bf16=bf16)
        assert loss.isnan() and gradient[:, column].isnan().all()
        others = [c for c in range(shape[1]) if c != column]
        assert gradient[:, others].isfinite().all()
        assert run(teacher, student, bf16=bf16)[4].isnan().all()


def test_fresh_memory_is_never_read(poisoned_memory) -> None:
    for shape in SHAPES[1:]:
        for result in run(*pair(*shape), need=(True, True)):
            assert result.isfinite().all()


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=needs_bf16)])
@pytest.mark.parametrize("shape", [(40, 1000), (200, 300), (300, 200), (128, 129)], ids=str)
def test_threads_change_nothing_but_rounding(shape, bf16) -> None:
    student, teacher = pair(*shape)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 16):
            torch.set_num_threads(threads)
            results.append(run(student, teacher, need=(True, True), bf16=bf16))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other):
            assert relative(second, first) < (1e-3 if bf16 else 1e-6)


def test_the_same_call_gives_the_same_bits() -> None:
    student, teacher = pair(130, 300)
    first, second = (run(student, teacher, need=(True, True)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_calls_from_several_python_threads_do_not_meet() -> None:
    inputs = [pair(60 + i, 200) for i in range(4)]
    alone = [run(*x) for x in inputs]
    together: list = [None] * len(inputs)

    def work(i: int) -> None:
        for _ in range(20):
            together[i] = run(*inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(alone, together):
        assert all(relative(y, x) < 1e-6 for x, y in zip(a, b))


def test_inputs_are_not_changed() -> None:
    student, teacher = pair(9, 12)
    copies = student.clone(), teacher.clone()
    run(student, teacher, need=(True, True), prepared=False)
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.randn(4), ValueError, r"must be a matrix \[N, D\], but has shape \[4\]"),
        (torch.randn(2, 3, 4), ValueError, r"but has shape \[2, 3, 4\]"),
        (torch.empty(0, 4), ValueError, "at least one row"),
        (torch.empty(4, 0), ValueError, "at least one column"),
        (torch.ones(3, 4, dtype=torch.int64), TypeError, "must be float32, bfloat16 or float16, but is Long"),
        (torch.ones(3, 4, dtype=torch.float64), TypeError, "Double; convert it"),
    ],
)
def test_bad_input(x, error, message) -> None:
    with pytest.raises(error, match=message):
        run(x, x)
    with pytest.raises(error, match=message):
        torch.ops.xdfast_c.rsd_prepare(x, EPS, False, False)


def test_bad_combinations() -> None:
    student, teacher = pair(5, 8)
    with pytest.raises(ValueError, match="must have the same shape"):
        run(student, teacher[:, :7])
    with pytest.raises(ValueError, match="a prepared teacher cannot have a gradient"):
        run(student, teacher, need=(True, True), prepared=True)
    known = torch.ops.xdfast_c.rsd_prepare(teacher, EPS, False, False)
    for statistics_, gram in ((known[0][:3], known[1]), (known[0], known[1][:4])):
        with pytest.raises(ValueError, match="must be .*but has shape"):
            torch.ops.xdfast_c.rsd_loss(
                student, teacher, KAPPA, EPS, False, False, 1.0, True, False, statistics_, gram
            )  # fmt: skip


_OTHER_ISA = """
import torch, xdfast._C
torch.manual_seed(0)
op = torch.ops.xdfast_c
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for shape in ((3, 2), (65, 127), (129, 300), (300, 129), (9000, 33)):
        s, t = (torch.randn(shape) + 2).to(dtype), torch.randn(shape).to(dtype)
        s[:, 0] = 1.5
        x, y = s.double().requires_grad_(), t.double().requires_grad_()
        z = [(v - v.mean(0)) / (v.std(0, correction=0) + 1e-5) for v in (x, y)]
        p = z[1].T @ z[0] / len(x)
        weights = torch.full_like(p, 0.01).fill_diagonal_(1)
        loss = (weights * (p - torch.eye(len(p))) ** 2).sum()
        gradients = torch.autograd.grad(loss, (x, y))
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            got = op.rsd_loss(s, t, 0.01, 1e-5, False, False, 1.0, True, True, None, None)
            assert abs(got[0] - loss) / loss < 1e-6, (dtype, shape, threads)
            for g, want in zip(got[4:], gradients):
                limit = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
                keep = slice(1, None)  # the constant column is tested by its own equation elsewhere
                assert (g[:, keep].double() - want[:, keep]).norm() / want[:, keep].norm() < limit, (dtype, shape, threads)
print(op.cpu_capability(), op.cpu_has_bf16_gemm(), "own kernels" in op.cpu_gemm())
"""


def _runnable() -> list[str]:
    """Instruction sets this CPU can run, of those the kernel is compiled for."""
    order = ["default", "avx2", "avx512"]
    here = torch.ops.xdfast_c.cpu_capability().lower()
    return order[: order.index(here) + 1] if here in order else order[:1]


@pytest.mark.parametrize("products", ["panels", "blas"])
@pytest.mark.parametrize("capability", _runnable())
def test_every_instruction_set(capability, products, tmp_path) -> None:
    """The passes are compiled for several targets; each one this CPU can run is checked, chosen as torch chooses, with
    products of our own where they are compiled and by BLAS."""
    environment = os.environ | {
        "ATEN_CPU_CAPABILITY": capability, "XDFAST_CPU_GEMM": products, "PYTHONSAFEPATH": "1"
    }  # fmt: skip
    process = subprocess.run(
        [sys.executable, "-c", _OTHER_ISA], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr[-3000:]
    name, bf16, own = process.stdout.split()
    assert name == capability.upper()
    assert own == str(products == "panels" and capability != "default")
    assert bf16 == str(HAS_BF16) if capability == "avx512" else bf16 == "False"


def test_without_an_exported_sgemm(tmp_path) -> None:
    """Torch builds that export no BLAS multiply by at::mm; every form and thread count goes that way here."""
    environment = os.environ | {"XDFAST_CPU_GEMM": "at", "PYTHONSAFEPATH": "1"}
    script = _OTHER_ISA + "assert op.cpu_gemm().startswith('at::mm'), op.cpu_gemm()\n"
    process = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr[-3000:]


def autograd(student, teacher, *, on_variance=False, scale=1.0):
    return torch.ops.xdfast_c.rsd_loss_autograd(
        student, teacher, KAPPA, EPS, on_variance, False, scale, None, None
    )  # fmt: skip


@pytest.mark.parametrize("on_variance", [False, True], ids=["std", "var"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)], ids=str)
def test_the_gradient_rule_in_cpp(shape, dtype, on_variance) -> None:
    """First and second derivatives, also where other gradients come in and by half inputs, against fp64."""
    student, teacher = (x.requires_grad_() for x in pair(*shape, dtype))
    exact = student.detach().double().requires_grad_(), teacher.detach().double().requires_grad_()
    invariance, decorrelation, diagonal = rsd_loss_reference(*exact, EPS, "var" if on_variance else "std")
    loss, *parts = autograd(student, teacher, on_variance=on_variance, scale=3.0)
    assert loss.requires_grad and not any(part.requires_grad for part in parts)
    for got, wanted in zip(
        (loss, *parts), (3 * (invariance + KAPPA * decorrelation), invariance, decorrelation, diagonal)
    ):
        assert relative(got, wanted) < TOLERANCES["value", dtype]
    truths = torch.autograd.grad(3 * (invariance + KAPPA * decorrelation), exact, create_graph=True)
    for factor in (1.0, -2.5):  # twice from the same graph
        for got, wanted in zip(torch.autograd.grad(factor * loss, (student, teacher), retain_graph=True), truths):
            assert relative(got, factor * wanted) < TOLERANCES["gradient", dtype] and got.dtype == dtype
    firsts = torch.autograd.grad(loss, (student, teacher), create_graph=True)
    directions = [torch.randn_like(x) for x in firsts]
    seconds = torch.autograd.grad(firsts, (student, teacher), directions)
    wanted = torch.autograd.grad(truths, exact, [d.double() for d in directions])
    for got, want in zip(seconds, wanted):
        assert relative(got, want) < 2 * TOLERANCES["gradient", dtype]


def test_the_gradient_rule_gives_only_what_is_asked() -> None:
    student, teacher = pair(12, 20)
    assert not autograd(student, teacher)[0].requires_grad
    student.requires_grad_()
    with torch.no_grad():
        assert not autograd(student, teacher)[0].requires_grad
    with torch.inference_mode():
        assert not autograd(*pair(12, 20))[0].requires_grad
    loss = autograd(student, teacher)[0]
    loss.backward()
    assert student.grad is not None and teacher.grad is None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the second derivative does not round its products
        first = torch.autograd.grad(autograd(student, teacher)[0], student, create_graph=True)[0]
    exact = student.detach().double().requires_grad_()
    truth_ = torch.autograd.grad(sum(torch.mul(*p) for p in zip(
        rsd_loss_reference(exact, teacher.double(), EPS)[:2], (1.0, KAPPA))), exact)[0]  # fmt: skip
    assert relative(first, truth_) < TOLERANCES["gradient", torch.float32]
