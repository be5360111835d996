"""Barlow Twins and VICReg in one process: against formulations written out here, against lightly where it is installed."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from tolerances import TOLERANCES, relative
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

import xdfast
from xdfast.ops.covariance import vicreg_loss

# N < D/2, 3D/4 < N < D, N = D, N > D
SHAPES = [(12, 40), (33, 40), (40, 40), (90, 40), (128, 512), (7, 1)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def views(n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + d)
    z_a = torch.randn(n, d, dtype=torch.float64, generator=generator)
    z_b = 0.7 * z_a + torch.randn(n, d, dtype=torch.float64, generator=generator)
    z_b = z_b * torch.linspace(0.3, 1.3, d, dtype=torch.float64)  # both sides of the variance term's hinge at std = 1
    return (1.3 * z_a + 0.5).to(dtype).requires_grad_(), z_b.to(dtype).requires_grad_()


def barlow_twins(z_a: Tensor, z_b: Tensor, lambda_param: float = 5e-3) -> Tensor:
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    c = a.T @ b / len(a)
    identity = torch.eye(c.shape[0], dtype=c.dtype)
    squared = (c - identity).square()
    return (identity * squared).sum() + lambda_param * ((1 - identity) * squared).sum()


def vicreg(z_a: Tensor, z_b: Tensor, weights=(25.0, 25.0, 1.0), eps: float = 1e-4) -> Tensor:
    n, d = z_a.shape
    variance, covariance = torch.zeros((), dtype=z_a.dtype), torch.zeros((), dtype=z_a.dtype)
    for z in (z_a, z_b):
        centred = z - z.mean(0)
        c = centred.T @ centred / (n - 1)
        variance += (1 - (c.diagonal() + eps).sqrt()).clamp_min(0).mean() / 2
        covariance += c[~torch.eye(d, dtype=torch.bool)].square().sum() / d
    return weights[0] * (z_a - z_b).square().mean() + weights[1] * variance + weights[2] * covariance


CASES = [
    pytest.param(xdfast.BarlowTwinsLoss(), barlow_twins, id="barlow-twins"),
    pytest.param(xdfast.VICRegLoss(), vicreg, id="vicreg"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize(("criterion", "formula"), CASES)
def test_value_and_both_gradients_equal_the_formula(criterion, formula, n, d, dtype) -> None:
    a, b = views(n, d, dtype)
    x, y = (z.detach().double().requires_grad_() for z in (a, b))
    loss, expected = criterion(a, b), formula(x, y)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(loss, expected) < TOLERANCES["value", dtype]
    for actual, wanted in zip(torch.autograd.grad(2 * loss, (a, b)), torch.autograd.grad(2 * expected, (x, y))):
        assert actual.dtype == dtype
        assert relative(actual, wanted) < TOLERANCES["gradient", dtype]


@pytest.mark.parametrize(("criterion", "formula"), CASES)
def test_one_view_with_a_gradient_and_none(criterion, formula) -> None:
    for n, d in SHAPES:
        a, b = views(n, d, torch.float64)
        fixed = b.detach()
        (actual,) = torch.autograd.grad(criterion(a, fixed), a)
        (wanted,) = torch.autograd.grad(formula(a, fixed), a)
        assert relative(actual, wanted) < 1e-10
        with torch.no_grad():
            assert relative(criterion(a, b), formula(a, b)) < 1e-12


@pytest.mark.parametrize(("criterion", "formula"), CASES)
def test_gradcheck_and_second_derivatives(criterion, formula) -> None:
    for n, d in [(5, 9), (9, 5)]:
        a, b = views(n, d, torch.float64)
        assert torch.autograd.gradcheck(criterion, (a, b))
        assert torch.autograd.gradgradcheck(criterion, (a, b))


@pytest.mark.parametrize(("criterion", "formula"), CASES)
def test_options(criterion, formula) -> None:
    a, b = views(12, 20, torch.float64)
    if formula is barlow_twins:
        torch.testing.assert_close(xdfast.BarlowTwinsLoss(0.3)(a, b), barlow_twins(a, b, 0.3))
        torch.testing.assert_close(xdfast.BarlowTwinsLoss(weight=0.3)(a, b), 0.3 * barlow_twins(a, b))
        half = xdfast.BarlowTwinsLoss(precision="bfloat16")(a.float(), b.float())
        assert 0 < relative(half, barlow_twins(a, b)) < TOLERANCES["value", "bfloat16 products"]
    else:
        torch.testing.assert_close(xdfast.VICRegLoss(2, 3, 4, eps=0.2)(a, b), vicreg(a, b, (2, 3, 4), 0.2))
        for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
            torch.testing.assert_close(xdfast.VICRegLoss(*weights)(a, b), vicreg(a, b, weights))
    # no process group: nothing to gather
    assert type(criterion)(gather_distributed=True)(a, b) == criterion(a, b)
    assert "gather_distributed=False" in repr(criterion)


@pytest.mark.parametrize(("criterion", "formula"), CASES)
def test_autocast_and_compile(criterion, formula) -> None:
    a, b = views(24, 40, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert relative(criterion(a, b), formula(a.double(), b.double())) < TOLERANCES["value", torch.float32]
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    grads = torch.autograd.grad(compiled(a, b), (a, b)), torch.autograd.grad(criterion(a, b), (a, b))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("need", [True, False])
@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_opcheck_of_the_covariance(shape, need) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=need)
    opcheck(torch.ops.xdfast.variance_covariance.default, (x, 12.5, 1.0, 1e-4, need, False, ""))


def test_vicreg_forms_no_matrix_of_d_by_d_when_the_batch_is_smaller() -> None:
    a, b = views(8, 512, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        vicreg_loss(a, b).backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 512 * 512 * 4 / 4


def test_vicreg_with_columns_of_unequal_size() -> None:
    """‖C‖² − Σ C_jj² cancels where few columns hold the variance; what the docstring promises for a ratio of 100."""
    a, b = views(24, 80, torch.float64)
    scale = torch.ones(80, dtype=torch.float64)
    scale[0] = 100
    expected = vicreg(a * scale, b * scale, (0, 0, 1))
    actual = vicreg_loss((a * scale).float(), (b * scale).float(), lambda_param=0, mu_param=0)
    assert relative(actual, expected) < 1e-3


@pytest.mark.parametrize("large", [1e2, 1e4])
@pytest.mark.parametrize(("criterion", "formula"), CASES)
def test_large_column_means(criterion, formula, large) -> None:
    for n, d in [(24, 40), (40, 24)]:
        a, b = ((z.detach() + large).float().requires_grad_() for z in views(n, d, torch.float64))
        x, y = (z.detach().double().requires_grad_() for z in (a, b))
        for actual, wanted in zip(
            torch.autograd.grad(criterion(a, b), (a, b)), torch.autograd.grad(formula(x, y), (x, y))
        ):
            assert relative(actual, wanted) < TOLERANCES["gradient", torch.float32]


def test_barlow_twins_is_a_distillation_loss() -> None:
    criterion = xdfast.create_loss("barlow-twins", weight=0.5)
    assert isinstance(criterion, xdfast.BarlowTwinsLoss)
    assert criterion.on == "features"
    student, teacher = views(8, 12, torch.float64)
    torch.testing.assert_close(criterion(student, teacher.detach()), 0.5 * barlow_twins(student, teacher))


@pytest.mark.parametrize(("criterion", "formula"), CASES)
def test_bad_input(criterion, formula) -> None:
    good = torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"z_a and z_b must have the same shape, got \[4, 5\] and \[4, 6\]"):
        criterion(good, torch.randn(4, 6))
    with pytest.raises(TypeError, match="z_b must be floating point"):
        criterion(good, good.long())
    with pytest.raises(ValueError, match=r"z_a must have shape \[N, D\].*got \[4, 5, 1\]; pool"):
        criterion(good[..., None], good[..., None])
    with pytest.raises(ValueError, match="z_a must have at least 2 samples"):
        criterion(good[:1], good[:1])
    with pytest.raises(ValueError, match="lambda_param must be finite and ≥ 0, got -1"):
        type(criterion)(-1)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match='statistics="global" needs the other ranks.*gather_distributed=True'):
        xdfast.BarlowTwinsLoss(statistics="global")
    with pytest.raises(ValueError, match="precision must be one of.*got 'half'"):
        xdfast.BarlowTwinsLoss(precision="half")
    with pytest.raises(ValueError, match="eps must be finite and > 0, got 0"):
        xdfast.VICRegLoss(eps=0)
    with pytest.raises(TypeError, match="nu_param must be a number, got str"):
        xdfast.VICRegLoss(nu_param="1")


@pytest.mark.parametrize("name", ["BarlowTwinsLoss", "VICRegLoss"])
@pytest.mark.parametrize(("n", "d"), SHAPES[:-1])
def test_equal_to_lightly(name, n, d) -> None:
    lightly = pytest.importorskip("lightly.loss")
    for dtype in (torch.float64, torch.float32):
        a, b = views(n, d, dtype)
        ours, theirs = getattr(xdfast, name)()(a, b), getattr(lightly, name)()(a, b)
        # its float32 products round as ours do
        assert relative(ours, theirs) < 2 * TOLERANCES["value", dtype]
        grads = torch.autograd.grad(ours, (a, b)), torch.autograd.grad(theirs, (a, b))
        for actual, wanted in zip(*grads):
            assert relative(actual, wanted) < 2 * TOLERANCES["gradient", dtype]


@pytest.mark.parametrize("module", ["xdfast.losses.barlow_twins", "xdfast.losses.vicreg", "xdfast.ops.covariance"])
def test_examples_in_docstrings_run(module) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0
