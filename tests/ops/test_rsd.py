"""The RSD op against its equation in fp64: values, both gradients, every backend, and what must not happen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import TOLERANCES, relative
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import xdfast
from xdfast.ops.rsd import RSDComponents, rsd_loss
from xdfast.ops.rsd.reference import rsd_loss_reference

# N < D/2, D/2 < N < 3D/4, 3D/4 < N < D, N = D, N > D pick different matrix chains; odd sizes; the width-1 corner.
SHAPES = [(16, 33), (20, 33), (27, 33), (33, 33), (70, 33), (7, 1), (128, 768), (3, 5)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(n: int, d: int, dtype: torch.dtype, mean: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + d)
    student = torch.randn(n, d, dtype=torch.float64, generator=generator)
    noise = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return student.to(dtype), (0.5 * student + 2 * noise + mean).to(dtype)


def truth(student: torch.Tensor, teacher: torch.Tensor, kappa: float = 0.01, eps: float = 1e-5):
    s, t = student.detach().double().requires_grad_(), teacher.detach().double().requires_grad_()
    invariance, decorrelation, diagonal = rsd_loss_reference(s, t, eps)
    loss = invariance + kappa * decorrelation
    return loss, invariance, decorrelation, diagonal, *torch.autograd.grad(loss, (s, t))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("both", [False, True], ids=["student-grad", "both-grads"])
def test_value_and_gradients_equal_the_equation(backend, n, d, dtype, both, poisoned_memory) -> None:
    student, teacher = inputs(n, d, dtype)
    student.requires_grad_()
    teacher.requires_grad_(both)
    parts = rsd_loss(student, teacher, return_components=True)
    expected = truth(student, teacher)
    for actual, wanted in zip(parts, expected, strict=False):
        # decorrelation of one column is exactly zero: compared absolutely there
        assert relative(actual, wanted) < TOLERANCES["value", dtype], parts._fields
    # grad_output ≠ 1: the factor must reach the input
    grads = torch.autograd.grad(3 * parts.loss, [student, teacher][: 1 + both])
    for actual, wanted in zip(grads, expected[4:], strict=False):
        assert actual.dtype == dtype
        assert relative(actual, 3 * wanted) < TOLERANCES["gradient", dtype]


def test_no_gradient_gives_the_same_value(backend) -> None:
    for n, d in SHAPES:
        student, teacher = inputs(n, d, torch.float64)
        assert relative(rsd_loss(student, teacher), truth(student, teacher)[0]) < 1e-12


def test_the_loss_of_a_half_input_is_float32_and_of_a_double_is_float64(backend) -> None:
    for dtype in DTYPES:
        student, teacher = inputs(8, 6, dtype)
        assert rsd_loss(student, teacher).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert rsd_loss(student.float(), teacher.double()).dtype == torch.float64


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(3, 40),
    d=st.integers(1, 60),
    kappa=st.floats(0, 2),
    mean=st.sampled_from([0.0, 10.0, -1000.0]),
    strided=st.booleans(),
)
def test_any_shape(n: int, d: int, kappa: float, mean: float, strided: bool) -> None:
    student, teacher = inputs(n, d, torch.float64, mean)
    if strided:
        student, teacher = student.repeat(1, 2)[:, ::2][:, :d], teacher.T.contiguous().T
    student = student.detach().requires_grad_()
    loss = rsd_loss(student, teacher, kappa=kappa)
    expected = truth(student, teacher, kappa)
    assert relative(loss, expected[0]) < 1e-10
    assert relative(torch.autograd.grad(loss, student)[0], expected[4]) < 1e-9


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_column_means_of_1e5_cost_no_more_than_the_literal_formulation(backend, shape) -> None:
    student, teacher = inputs(*shape, torch.float64)
    student, teacher = (student + 1e5).float(), (teacher - 1e5).float()
    expected = truth(student, teacher)

    def error(function) -> float:
        s = student.detach().requires_grad_()
        return relative(torch.autograd.grad(function(s), s)[0], expected[4])

    def literal(s):
        invariance, decorrelation, _ = rsd_loss_reference(s, teacher, 1e-5)
        return invariance + 0.01 * decorrelation

    assert error(lambda s: rsd_loss(s, teacher)) <= max(error(literal), 1e-6)


def test_constant_columns_have_a_finite_gradient_equal_to_the_equation(backend) -> None:
    student, teacher = inputs(16, 24, torch.float64)
    student[:, 3], teacher[:, 5], student[:, 7], teacher[:, 7] = 0.1, 2.0, -4.0, 0.0
    student.requires_grad_()
    loss = rsd_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.isfinite().all()
    expected = truth(student, teacher)
    assert relative(loss, expected[0]) < 1e-10
    assert relative(gradient, expected[4]) < 1e-8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_nan_and_inf_propagate(backend, bad, shape) -> None:
    student, teacher = inputs(*shape, torch.float32)
    student[1, 2] = bad
    student.requires_grad_()
    loss = rsd_loss(student, teacher)
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[:, 2].isnan().all()


def test_two_samples_have_the_gradient_of_the_equation(backend) -> None:
    # With N = 2, z is ±1 up to ε and the gradient is a difference of nearly equal numbers: compared with the size of
    # those numbers (1/std), not with the small difference.
    student, teacher = inputs(2, 9, torch.float32)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(rsd_loss(student, teacher), student)
    wanted = truth(student, teacher)[4]
    scale = (1 / student.detach().std(0, correction=0)).max()
    assert ((gradient.double() - wanted).abs() / scale).max() < 1e-5


def test_reductions_and_components() -> None:
    student, teacher = inputs(8, 10, torch.float64)
    parts = rsd_loss(student, teacher, kappa=0.5, return_components=True)
    assert isinstance(parts, RSDComponents)
    torch.testing.assert_close(parts.loss, parts.invariance + 0.5 * parts.decorrelation)
    torch.testing.assert_close(rsd_loss(student, teacher, kappa=0.5, reduction="feature"), parts.loss / 10)
    torch.testing.assert_close(rsd_loss(student, teacher, kappa=0.5, reduction="mean"), parts.loss / 100)
    mean = rsd_loss(student, teacher, kappa=0.5, reduction="mean", return_components=True)
    torch.testing.assert_close(mean.decorrelation, parts.decorrelation / 100)
    torch.testing.assert_close(mean.mean_diagonal, parts.mean_diagonal)


def test_only_the_loss_carries_a_gradient(backend) -> None:
    student, teacher = inputs(8, 10, torch.float64)
    parts = rsd_loss(student.requires_grad_(), teacher, return_components=True)
    assert [part.requires_grad for part in parts] == [True, False, False, False]


def test_gradcheck_and_double_backward(backend) -> None:
    for n, d in [(5, 9), (9, 5), (7, 8)]:
        student, teacher = (x.requires_grad_() for x in inputs(n, d, torch.float64))
        assert torch.autograd.gradcheck(lambda a, b: rsd_loss(a, b, kappa=0.3), (student, teacher))
        assert torch.autograd.gradgradcheck(lambda a, b: rsd_loss(a, b, kappa=0.3), (student, teacher))


def test_backward_twice_and_accumulated_gradients(backend) -> None:
    student, teacher = inputs(8, 12, torch.float64)
    student.requires_grad_()
    loss = rsd_loss(student, teacher)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    loss.backward()
    torch.testing.assert_close(student.grad, 2 * once)


@pytest.mark.parametrize("needs", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize(("n", "d"), [(6, 9), (9, 6)])
def test_opcheck(n, d, needs) -> None:
    student, teacher = inputs(n, d, torch.float64)
    args = (student.requires_grad_(needs[0]), teacher.requires_grad_(needs[1]), 0.01, 1e-5, "std", "float32", 2.0)
    opcheck(torch.ops.xdfast.rsd_loss.default, (*args, *needs, None, None))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(compiler) -> None:
    student, teacher = inputs(8, 12, torch.float32)
    weight = torch.eye(12, requires_grad=True)
    compiled = torch.compile(lambda w: rsd_loss(student @ w, teacher), fullgraph=True, backend=compiler)
    (actual,) = torch.autograd.grad(compiled(weight), weight)
    (wanted,) = torch.autograd.grad(rsd_loss(student @ weight, teacher), weight)
    torch.testing.assert_close(actual, wanted)


def test_exports_with_a_dynamic_batch() -> None:
    batch = torch.export.Dim("batch", min=2, max=4096)
    args = inputs(8, 12, torch.float32)
    program = torch.export.export(xdfast.RSDLoss(), args, dynamic_shapes=({0: batch}, {0: batch}))
    other = inputs(5, 12, torch.float32)
    torch.testing.assert_close(program.module()(*other), rsd_loss(*other))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_does_not_lower_the_precision(backend, half) -> None:
    student, teacher = inputs(32, 48, torch.float32)
    student.requires_grad_()
    with torch.autocast("cpu", dtype=half):
        loss = rsd_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    expected = truth(student, teacher)
    assert relative(loss, expected[0]) < TOLERANCES["value", torch.float32]
    assert relative(gradient, expected[4]) < TOLERANCES["gradient", torch.float32]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(backend, reentrant) -> None:
    student, teacher = inputs(8, 12, torch.float64)
    weight = torch.eye(12, dtype=torch.float64, requires_grad=True)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return rsd_loss(student @ w, teacher)

    (wanted,) = torch.autograd.grad(loss(weight), weight)
    checkpoint(loss, weight, use_reentrant=reentrant).backward()
    torch.testing.assert_close(weight.grad, wanted)


def test_no_dxd_matrix_when_the_batch_is_smaller() -> None:
    student, teacher = inputs(8, 512, torch.float32)
    student.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        rsd_loss(student, teacher).backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 512 * 512 * 4 / 4  # an N×D tensor is 16 KiB, D×D would be 1 MiB


def test_the_literal_loop_of_the_public_code_gives_the_same_curve() -> None:
    """RSDLoss in place of the published loss, inside a loop of its style: the loss curves are equal."""

    def published(student: torch.Tensor, teacher: torch.Tensor, kappa: float = 0.01) -> torch.Tensor:
        # METHODS.md §1 trap 3: standardise, D×D product, boolean mask over the off-diagonal, sum
        def standardise(f):
            return (f - f.mean(0)) / (f.std(0, unbiased=False) + 1e-5)

        p = standardise(teacher).T @ standardise(student) / student.shape[0]
        identity = torch.eye(p.shape[0])
        squared = (p - identity).pow(2)
        squared[(1 - identity).bool()] *= kappa
        return squared.sum()

    def curve(criterion) -> list[float]:
        torch.manual_seed(1)
        backbone = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU())
        head, aad = torch.nn.Linear(16, 5), xdfast.AAD(16, 24)
        teacher = torch.nn.Sequential(torch.nn.Linear(20, 24), torch.nn.Tanh())
        optimizer = torch.optim.SGD(
            [*backbone.parameters(), *head.parameters(), *aad.parameters()], lr=0.05, momentum=0.9
        )
        images, labels = torch.randn(128, 20), torch.randint(0, 5, (128,))
        losses = []
        for step in range(40):
            x, y = images[step % 4 * 32 :][:32], labels[step % 4 * 32 :][:32]
            with torch.no_grad():
                target = teacher(x)
            features = backbone(x)
            loss = torch.nn.functional.cross_entropy(head(features), y) + 0.1 * criterion(aad(features), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, theirs = curve(xdfast.RSDLoss()), curve(published)
    assert ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=2e-4)


class TestBadInput:
    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"same shape, got \[4, 5\] and \[4, 6\].*AAD"):
            rsd_loss(torch.randn(4, 5), torch.randn(4, 6))
        with pytest.raises(ValueError, match=r"shape \[N, D\].*got \[4\]"):
            rsd_loss(torch.randn(4), torch.randn(4))
        with pytest.raises(ValueError, match=r"got \[4, 5, 6\]; pool or flatten"):
            rsd_loss(torch.randn(4, 5, 6), torch.randn(4, 5, 6))
        for n in (0, 1):
            with pytest.raises(ValueError, match=rf"at least 2 samples, got shape \[{n}, 5\].*drop_last"):
                rsd_loss(torch.randn(n, 5), torch.randn(n, 5))
        with pytest.raises(ValueError, match="at least one feature"):
            rsd_loss(torch.randn(4, 0), torch.randn(4, 0))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
    def test_dtypes(self, dtype) -> None:
        with pytest.raises(TypeError, match=f"teacher must be floating point.*{dtype}"):
            rsd_loss(torch.randn(4, 5), torch.ones(4, 5, dtype=dtype))

    def test_not_a_tensor(self) -> None:
        with pytest.raises(TypeError, match="student must be a torch.Tensor.*ndarray"):
            rsd_loss(torch.randn(4, 5).numpy(), torch.randn(4, 5))

    def test_devices(self) -> None:
        with pytest.raises(ValueError, match=r"same device, got cpu and meta; use teacher.to"):
            rsd_loss(torch.randn(4, 5), torch.randn(4, 5, device="meta"))

    @pytest.mark.parametrize(
        "options", [{"kappa": -0.1}, {"kappa": float("nan")}, {"eps": 0.0}, {"kappa": float("inf")}]
    )
    def test_numbers(self, options) -> None:
        (name, value) = next(iter(options.items()))
        with pytest.raises(ValueError, match=f"{name} must be finite and .* got {value}"):
            rsd_loss(torch.randn(4, 5), torch.randn(4, 5), **options)
        with pytest.raises(ValueError, match=name):
            xdfast.RSDLoss(**options)

    def test_option_types(self) -> None:
        with pytest.raises(TypeError, match="kappa must be a number, got str"):
            rsd_loss(torch.randn(4, 5), torch.randn(4, 5), kappa="0.01")
        with pytest.raises(ValueError, match="reduction must be one of 'sum', 'feature', 'mean', got 'total'"):
            rsd_loss(torch.randn(4, 5), torch.randn(4, 5), reduction="total")
