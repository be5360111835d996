"""Options of the RSD op: where ε goes, precision of the products, prepared teachers, odd inputs, FLOP counts."""

from __future__ import annotations

import warnings

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from tolerances import TOLERANCES, relative
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import xdfast
from xdfast.ops.rsd import rsd_loss
from xdfast.ops.rsd.flops import rsd_flops, rsd_flops_from_fvcore
from xdfast.ops.rsd.reference import rsd_loss_reference

SHAPES = [(16, 33), (30, 33), (33, 33), (70, 33), (7, 1)]


def inputs(n: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    student = torch.randn(n, d)
    teacher = 0.5 * student + 2 * torch.randn(n, d) + 1
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def truth(student: torch.Tensor, teacher: torch.Tensor, eps_mode: str = "std") -> tuple[torch.Tensor, torch.Tensor]:
    s, t = student.detach().double().requires_grad_(), teacher.detach().double()
    invariance, decorrelation, _ = rsd_loss_reference(s, t, 1e-5, eps_mode)
    loss = invariance + 0.01 * decorrelation
    return loss.detach(), torch.autograd.grad(loss, s)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_epsilon_on_the_variance_is_batch_norm(backend, shape, dtype) -> None:
    student, teacher = inputs(*shape, dtype)
    teacher.requires_grad_()
    loss = rsd_loss(student, teacher, eps_mode="var")
    grads = torch.autograd.grad(loss, (student, teacher))

    s, t = (x.detach().double().requires_grad_() for x in (student, teacher))
    z_s, z_t = (torch.nn.functional.batch_norm(x, None, None, training=True, eps=1e-5) for x in (s, t))
    c = z_t.T @ z_s / len(s)
    weight = torch.full_like(c, 0.01).fill_diagonal_(1)
    wanted = (weight * (c - torch.eye(len(c))) ** 2).sum()
    assert relative(loss, wanted) < TOLERANCES["value", dtype]
    for got, exact in zip(grads, torch.autograd.grad(wanted, (s, t))):
        assert relative(got, exact) < TOLERANCES["gradient", dtype]


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(16, 33), (64, 200), (33, 33), (70, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_of_the_products(backend, shape, dtype, precision) -> None:
    student, teacher = inputs(*shape, dtype)
    loss, wanted = rsd_loss(student, teacher, precision=precision), truth(student, teacher)
    assert loss.dtype == torch.float32
    assert relative(loss, wanted[0]) < TOLERANCES["value", "bfloat16 products"]
    assert relative(torch.autograd.grad(loss, student)[0], wanted[1]) < TOLERANCES["gradient", "bfloat16 products"]


def test_float64_ignores_the_precision(backend) -> None:
    student, teacher = inputs(16, 33, torch.float64)
    assert relative(rsd_loss(student, teacher, precision="bfloat16"), truth(student, teacher)[0]) < 1e-12


def test_float16_products_do_not_overflow() -> None:
    """Columns that all say the same: an entry of the Gram matrix is near N · D = 160,000, float16 ends at 65,504."""
    column = torch.randn(40, 1)
    column[0] = 60.0  # one sample far out: its z is near √N
    student = (column + 1e-3 * torch.randn(40, 4000)).requires_grad_()
    with xdfast.backend("torch"):
        loss = rsd_loss(student, student.detach().clone(), precision="float16")
    assert loss.isfinite() and torch.autograd.grad(loss, student)[0].isfinite().all()


def test_auto_precision_follows_autocast_and_torchs_switch() -> None:
    from xdfast.ops.rsd.op import resolve_precision

    assert resolve_precision("auto", "cpu") == "float32"
    assert resolve_precision("float32", "cpu") == "float32"
    for dtype, name in ((torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        with torch.autocast("cpu", dtype=dtype):
            assert resolve_precision("auto", "cpu") == name
            assert resolve_precision("float32", "cpu") == "float32"
    before = torch.get_float32_matmul_precision()
    try:
        for setting, name in (("high", "tf32"), ("medium", "bfloat16")):
            torch.set_float32_matmul_precision(setting)
            assert resolve_precision("auto", "cpu") == name
    finally:
        torch.set_float32_matmul_precision(before)
    student, teacher = inputs(64, 200)
    with torch.autocast("cpu", dtype=torch.bfloat16), xdfast.backend("torch"):
        lowered = rsd_loss(student, teacher, precision="auto")
    assert lowered != rsd_loss(student, teacher)
    compiled = torch.compile(lambda a, b: rsd_loss(a, b, precision="auto"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, teacher), rsd_loss(student, teacher))


def test_weight_and_reduction_scale_loss_and_gradient(backend) -> None:
    student, teacher = inputs(16, 33, torch.float64)
    loss, gradient = truth(student, teacher)
    parts = rsd_loss(student, teacher, weight=0.1, reduction="feature", return_components=True)
    torch.testing.assert_close(parts.loss, 0.1 / 33 * loss)
    torch.testing.assert_close(torch.autograd.grad(parts.loss, student)[0], 0.1 / 33 * gradient)
    torch.testing.assert_close(parts.invariance + 0.01 * parts.decorrelation, loss / 33)
    criterion = xdfast.RSDLoss(weight=0.1, reduction="mean")
    torch.testing.assert_close(criterion(student, teacher), 0.1 / 33**2 * loss)


class TestPreparedTeacher:
    @pytest.mark.parametrize("eps_mode", ["std", "var"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_gives_the_same_loss_and_gradient(self, backend, shape, dtype, eps_mode) -> None:
        _, teacher = inputs(*shape, dtype)
        prepared = xdfast.prepare_teacher(teacher, eps_mode=eps_mode)
        for _ in range(2):
            student, _ = inputs(*shape, dtype)
            loss, wanted = rsd_loss(student, prepared, eps_mode=eps_mode), truth(student, teacher, eps_mode)
            assert relative(loss, wanted[0]) < TOLERANCES["value", dtype]
            assert relative(torch.autograd.grad(loss, student)[0], wanted[1]) < TOLERANCES["gradient", dtype]
            assert (
                relative(rsd_loss(student.detach(), prepared, eps_mode=eps_mode), wanted[0])
                < TOLERANCES["value", dtype]
            )

    def test_by_the_loss_module(self) -> None:
        student, teacher = inputs(16, 40)
        criterion = xdfast.RSDLoss(eps=1e-3, precision="bfloat16")
        torch.testing.assert_close(criterion(student, criterion.prepare(teacher)), criterion(student, teacher))

    def test_is_detached_and_has_no_gradient(self) -> None:
        student, teacher = inputs(16, 40)
        prepared = xdfast.prepare_teacher(teacher.requires_grad_())
        rsd_loss(student, prepared).backward()
        assert student.grad is not None and teacher.grad is None

    def test_other_settings_are_refused(self) -> None:
        student, teacher = inputs(16, 40)
        prepared = xdfast.prepare_teacher(teacher, eps=1e-3)
        with pytest.raises(ValueError, match=r"prepared with .*0.001, 'std', 'float32'.* the loss has \(1e-05"):
            rsd_loss(student, prepared)
        with pytest.raises(ValueError, match="'bfloat16'"):
            rsd_loss(student, prepared, eps=1e-3, precision="bfloat16")
        with pytest.raises(ValueError, match=r"same shape, got \[15, 40\] and \[16, 40\]"):
            rsd_loss(student[:15], prepared, eps=1e-3)

    def test_bad_input(self) -> None:
        with pytest.raises(TypeError, match="teacher must be a torch.Tensor"):
            xdfast.prepare_teacher([1.0, 2.0])
        with pytest.raises(ValueError, match="at least 2 samples"):
            xdfast.prepare_teacher(torch.randn(1, 4))
        with pytest.raises(ValueError, match="precision must be one of .* got 'bf16' Did you mean 'bfloat16'"):
            xdfast.prepare_teacher(torch.randn(4, 4), precision="bf16")


@pytest.mark.parametrize(
    ("option", "value"), [("eps_mode", "variance"), ("precision", "float8"), ("reduction", "total")]
)
def test_unknown_options_name_the_known_ones(option, value) -> None:
    with pytest.raises(ValueError, match=f"{option} must be one of '.*got '{value}'"):
        rsd_loss(torch.randn(4, 5), torch.randn(4, 5), **{option: value})


class TestOddInputs:
    def test_expanded_transposed_and_sliced_tensors(self, backend) -> None:
        base = torch.randn(40, 60)
        teacher = torch.randn(60, 40)
        for view in (base.T, base.repeat(2, 2)[10:70, 5:45], base[:, :1].expand(40, 40)[:, ::1].T.repeat(2, 1)[:60]):
            x = view.detach().requires_grad_()
            loss = rsd_loss(x, teacher)
            wanted = truth(x.contiguous(), teacher)
            assert relative(loss, wanted[0]) < 2e-6
            assert torch.autograd.grad(loss, x)[0].shape == x.shape

    def test_one_column(self, backend) -> None:
        student, teacher = inputs(9, 1)
        parts = rsd_loss(student, teacher, return_components=True)
        assert parts.decorrelation.abs() < 1e-6
        assert relative(parts.loss, truth(student, teacher)[0]) < 1e-5

    def test_inference_mode(self, backend) -> None:
        student, teacher = inputs(9, 20)
        with torch.inference_mode():
            value = rsd_loss(student, teacher)
            inside = rsd_loss(torch.ones(4, 5), torch.ones(4, 5))
        assert not value.requires_grad and inside.isfinite()
        assert relative(value, truth(student, teacher)[0]) < 1e-5

    def test_a_teacher_that_requires_a_gradient_gets_one(self, backend) -> None:
        student, teacher = inputs(9, 20, torch.float64)
        teacher.requires_grad_()
        rsd_loss(student.detach(), teacher).backward()
        assert teacher.grad is not None and student.grad is None

    def test_more_than_2_31_elements(self) -> None:
        """Shapes, dtypes and FLOPs of 4 billion elements; the kernels' offsets are 64 bits wide (tests/kernels)."""
        with FakeTensorMode():
            student = torch.empty(2**16, 2**16, requires_grad=True)
            loss = rsd_loss(student, torch.empty(2**16, 2**16))
            assert loss.shape == () and torch.autograd.grad(loss, student)[0].shape == student.shape


def test_both_ways_through_the_op_agree() -> None:
    """Where nothing watches the dispatcher, the op runs past it; a dispatch mode forces the other way."""
    student, teacher = inputs(16, 33)
    direct = rsd_loss(student, teacher)
    with FlopCounterMode(display=False):
        watched = rsd_loss(student, teacher)
    assert torch.equal(direct, watched)
    first, second = (torch.autograd.grad(loss, student)[0] for loss in (direct, watched))
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)], ids=str)
def test_flops_by_both_counters(shape) -> None:
    n, d = shape
    student, teacher = inputs(*shape)
    with FlopCounterMode(display=False) as counter:
        rsd_loss(student, teacher).backward()
    assert counter.get_total_flops() == rsd_flops(n, d, True, False) == 4 * n * d * min(n, d)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore traces by TorchScript, which is deprecated
        analysis = FlopCountAnalysis(xdfast.RSDLoss(), (student.detach(), teacher))
        counted = analysis.set_op_handle("xdfast::rsd_loss", rsd_flops_from_fvcore).total()
    assert 2 * counted == rsd_flops(n, d, False, False)
    assert rsd_flops(n, d, True, False, has_gram=True) == (2 * n * n * d if n < d else 4 * n * d * d)
    assert rsd_flops(n, d, True, True) == (8 * n * n * d if n < d else 6 * n * d * d)
