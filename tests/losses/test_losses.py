"""The losses' own options, each against its equation, and the registry."""

from __future__ import annotations

import pytest
import torch

import xdfast
from xdfast.losses import DistillLoss, FeatureMSELoss, KDLoss, RSDLoss, register_loss
from xdfast.ops.rsd.reference import rsd_loss_reference


def test_rsd_defaults_are_the_public_codes() -> None:
    criterion = RSDLoss()
    assert (criterion.kappa, criterion.weight, criterion.eps, criterion.reduction) == (0.01, 1.0, 1e-5, "sum")


@pytest.mark.parametrize("kappa", [0.0, 0.01, 1.0])
def test_rsd_is_weight_times_the_equation(kappa) -> None:
    student, teacher = torch.randn(8, 12, dtype=torch.double), torch.randn(8, 12, dtype=torch.double)
    invariance, decorrelation, diagonal = rsd_loss_reference(student, teacher, 1e-5)
    torch.testing.assert_close(RSDLoss(kappa, weight=0.1)(student, teacher), 0.1 * (invariance + kappa * decorrelation))
    parts = RSDLoss(kappa, weight=0.1, return_components=True)(student, teacher)
    torch.testing.assert_close(parts.loss, 0.1 * (invariance + kappa * decorrelation))
    torch.testing.assert_close(parts.invariance, invariance)
    torch.testing.assert_close(parts.mean_diagonal, diagonal)


def test_rsd_is_zero_for_perfect_uncorrelated_agreement() -> None:
    # columns of a Hadamard matrix (without the constant one) are centred, of unit variance and uncorrelated
    base = torch.tensor([[1.0, 1], [1, -1]], dtype=torch.double)
    matrix = torch.kron(torch.kron(base, base), base)[:, 1:]
    assert RSDLoss(eps=1e-12)(3 * matrix + 5, matrix).item() == pytest.approx(0, abs=1e-18)


def test_kd_is_the_divergence_of_the_softened_probabilities() -> None:
    student, teacher = torch.randn(6, 5, dtype=torch.double), torch.randn(6, 5, dtype=torch.double)
    p, q = (torch.softmax(x / 3, 1) for x in (teacher, student))
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(KDLoss(temperature=3, weight=0.5)(student, teacher), 0.5 * expected)
    assert KDLoss()(teacher, teacher).item() == pytest.approx(0, abs=1e-12)


def test_kd_does_not_overflow_in_half_precision() -> None:
    student, teacher = torch.tensor([[60000.0, -60000]]).half(), torch.tensor([[-60000.0, 60000]]).half()
    assert KDLoss(temperature=1)(student, teacher).isfinite()


def test_feature_mse_and_the_papers_squared_norm() -> None:
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    torch.testing.assert_close(FeatureMSELoss()(student, teacher), torch.nn.functional.mse_loss(student, teacher))
    expected = (student - teacher).norm(dim=1).square().mean()
    torch.testing.assert_close(FeatureMSELoss(reduction="sample", weight=2)(student, teacher), 2 * expected)


def test_registry() -> None:
    assert {"rsd", "rsd-logits", "kd", "mse"} <= set(xdfast.list_losses())
    assert xdfast.list_losses("rsd*") == ["rsd", "rsd-logits"]
    assert xdfast.create_loss("rsd-logits", kappa=0.5).on == "logits"
    assert xdfast.create_loss("rsd").on == "features"
    with pytest.raises(ValueError, match="unknown loss 'rds'.*Did you mean 'rsd'"):
        xdfast.create_loss("rds")
    with pytest.raises(ValueError, match="'rsd' is already registered by RSDLoss"):

        @register_loss("rsd")
        class Other(DistillLoss):
            pass


@pytest.mark.parametrize("name", ["kd", "mse", "rsd"])
def test_bad_input(name) -> None:
    criterion = xdfast.create_loss(name)
    with pytest.raises(ValueError, match=r"same shape, got \[4, 5\] and \[4, 6\]"):
        criterion(torch.randn(4, 5), torch.randn(4, 6))
    with pytest.raises(TypeError, match="floating point"):
        criterion(torch.ones(4, 5, dtype=torch.long), torch.randn(4, 5))
    with pytest.raises(ValueError, match="weight must be finite and ≥ 0, got -1"):
        xdfast.create_loss(name, weight=-1)
