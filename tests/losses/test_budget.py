"""Budget loss: its equation, what counts, gradients, components, bad input."""

from __future__ import annotations

import pytest
import torch

from xdfast.losses import BudgetLoss

COSTS = torch.tensor([[1.0, 2.0], [3.0, 0.0], [1.0, 5.0]], dtype=torch.double)


def test_loss_is_the_equation() -> None:
    gates, p = torch.rand(7, 3, 2, dtype=torch.double), torch.rand(7, 3, 2, dtype=torch.double)
    mean = gates.mean(0)
    fraction = (COSTS * mean).sum() / COSTS.sum()
    variance = (mean - mean.mean()).square().mean()
    expected = 0.3 * ((fraction - 0.6) ** 2 + 0.2 * variance + 0.1 * (4 * p * (1 - p)).mean())
    criterion = BudgetLoss(0.6, COSTS, weight=0.3, balance=0.2, decisive=0.1)
    # shares are kept in float32
    torch.testing.assert_close(criterion(gates, p), expected, rtol=1e-6, atol=0)


def test_hinge_is_one_sided() -> None:
    criterion = BudgetLoss(0.5, norm="hinge")
    assert criterion(torch.full((4, 3, 1), 0.4)) == 0
    assert criterion(torch.full((4, 3, 1), 0.7)).item() == pytest.approx(0.2)
    assert BudgetLoss(0.5)(torch.full((4, 3, 1), 0.4)).item() == pytest.approx(0.01)


def test_all_layers_on_is_not_free_as_it_is_for_the_balance_alone() -> None:
    parts = BudgetLoss(0.5, balance=1.0, return_components=True)(torch.ones(4, 12, 1))
    assert parts.balance == 0
    assert parts.loss.item() == pytest.approx(0.25)


def test_always_on_layers_count_as_on_and_get_no_gradient() -> None:
    gates = torch.rand(5, 3, 2, dtype=torch.double, requires_grad=True)
    parts = BudgetLoss(0.9, COSTS, always_on=(-1,), balance=1.0, return_components=True)(gates)
    mean = gates.mean(0).detach()
    assert parts.fraction.item() == pytest.approx(((COSTS[:2] * mean[:2]).sum() + 6).item() / 12, rel=1e-6)
    assert parts.balance.item() == pytest.approx(mean[:2].var(correction=0).item())
    parts.loss.backward()
    assert (gates.grad[:, 2] == 0).all()
    assert (gates.grad[:, :2] != 0).all()
    assert BudgetLoss(1.0, always_on=range(3), return_components=True)(gates).fraction == 1


def test_shapes_of_gates() -> None:
    gates = torch.rand(2, 5, 3, 2)
    criterion = BudgetLoss(0.5, COSTS)
    torch.testing.assert_close(criterion(gates), criterion(gates.flatten(0, 1)))
    one = BudgetLoss(0.5, [1.0, 2.0, 3.0])
    torch.testing.assert_close(one(gates[0, :, :, 0]), one(gates[0, :, :, :1]))
    half = BudgetLoss(0.5)(gates.bfloat16())
    assert half.dtype == torch.float32
    # a mean over many units in float32: bfloat16 would stop counting
    assert BudgetLoss(0.5, return_components=True)(torch.ones(1000, 3, 1).bfloat16()).fraction == 1


def test_gradients() -> None:
    gates, p = (torch.rand(4, 3, 2, dtype=torch.double, requires_grad=True) for _ in range(2))
    criterion = BudgetLoss(0.5, always_on=(0,), balance=0.5, decisive=0.5, weight=2)
    assert torch.autograd.gradcheck(criterion, (gates, p))


def test_components_without_probabilities() -> None:
    parts = BudgetLoss(0.5, return_components=True)(torch.rand(4, 3, 2, requires_grad=True))
    assert parts.decisive.isnan()
    assert parts.loss.requires_grad
    assert not any(part.requires_grad for part in parts[1:])
    torch.testing.assert_close(parts.loss.detach(), parts.budget)
    seen = BudgetLoss(0.5, return_components=True)(torch.rand(4, 3, 2), torch.full((4, 3, 2), 0.5))
    assert seen.decisive == 1
    assert BudgetLoss(0.5, COSTS).state_dict() == {}


def test_no_look_at_values_where_looking_waits() -> None:
    # a meta tensor has no values: any look would raise, as it would wait on a GPU
    gates = torch.empty(4, 3, 2, device="meta")
    assert BudgetLoss(0.6, COSTS, always_on=(0,), balance=1.0, decisive=1.0).to("meta")(gates, gates).shape == ()


@pytest.mark.parametrize("target", [0, -0.1, 1.01, float("nan")])
def test_bad_targets(target) -> None:
    with pytest.raises(ValueError, match="target_flops"):
        BudgetLoss(target)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="target_flops must be a number, got str"):
        BudgetLoss("half")
    for wrong in ([], [[[1.0]]]):
        with pytest.raises(ValueError, match="costs must have shape"):
            BudgetLoss(0.5, wrong)
    for wrong in ([1.0, -1.0], [0.0, 0.0], [1.0, float("inf")], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="costs must be finite, ≥ 0 and not all zero"):
            BudgetLoss(0.5, wrong)
    with pytest.raises(ValueError, match=r"costs are of \[3, 2\] .* but gates of \[4, 2\]"):
        BudgetLoss(0.5, COSTS)(torch.rand(5, 4, 2))
    with pytest.raises(ValueError, match=r"always_on names layers of 0 to 2, or negative, got \[3\]"):
        BudgetLoss(0.5, COSTS, always_on=[3])
    with pytest.raises(ValueError, match=r"target_flops=0.4 cannot be reached.*\[2\], alone are 0.5 of the FLOPs"):
        BudgetLoss(0.4, COSTS, always_on=[-1])
    with pytest.raises(ValueError, match=r"cannot be reached.*\[0, 3\], alone are 0.5"):
        BudgetLoss(0.4, always_on=(0, -1))(torch.rand(2, 4, 1))
    with pytest.raises(ValueError, match="norm must be one of 'squared', 'hinge', got 'l1'"):
        BudgetLoss(0.5, norm="l1")
    with pytest.raises(ValueError, match="balance must be finite and ≥ 0"):
        BudgetLoss(0.5, balance=-1)
    criterion, gates = BudgetLoss(0.5, decisive=0.1), torch.rand(2, 3, 1)
    with pytest.raises(ValueError, match="decisive needs the probabilities"):
        criterion(gates)
    with pytest.raises(ValueError, match=r"shape of the gates, \[2, 3, 1\], got \[2, 3\]"):
        criterion(gates, gates[..., 0])
    with pytest.raises(TypeError, match="floating-point tensor, got torch.bool"):
        criterion(gates > 0.5)
    for shape in ((3,), (0, 3, 1), (1, 1, 1, 1, 1)):
        with pytest.raises(ValueError, match="gates must have shape"):
            criterion(torch.zeros(shape))
    gates[1, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 6 gates are NaN"):
        criterion(gates)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_probabilities_of_half_precision_are_multiplied_in_float32(dtype) -> None:
    """Found by tests/hardening: the products were rounded to 8 bits before their mean."""
    gates, p = torch.rand(2, 47, 5, 3).to(dtype)
    criterion = BudgetLoss(0.5, decisive=1.0)
    expected = criterion(gates.double(), p.double())
    assert criterion(gates, p).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.ones(2, 3, 1, dtype=torch.int64), TypeError, "floating-point tensor like the gates, got torch.int64"),
        ([0.5], TypeError, "floating-point tensor like the gates, got list"),
        (torch.ones(2, 3, 1, device="meta"), ValueError, "probabilities must be on cpu like the gates, got meta"),
    ],
)
def test_bad_probabilities(bad, error, message) -> None:
    with pytest.raises(error, match=message):
        BudgetLoss(0.5, decisive=1.0)(torch.ones(2, 3, 1), bad)
