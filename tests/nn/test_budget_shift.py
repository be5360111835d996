"""A router that keeps its budget batch by batch: exact in training, the same decisions once it is folded."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import xdfast.nn
from xdfast.models import hold_budget, load_routed, save_routed
from xdfast.nn import BudgetShift, LayerRouter, budget_shift, routed_stacks


def spent(logits: torch.Tensor, costs: torch.Tensor, on: tuple[int, ...]) -> float:
    """Mean share of the FLOPs of what is above 0, one decision at a time, in float64."""
    total = 0.0
    for unit in logits.tolist():
        for layer, row in enumerate(unit):
            total += sum(float(costs[layer, s]) for s, z in enumerate(row) if layer in on or z > 0)
    return total / (len(logits) * float(costs.sum()))


@pytest.mark.parametrize("on", [(), (0, 5)])
@pytest.mark.parametrize("target", [0.4, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("branches", [1, 2])
def test_every_batch_costs_as_much_as_the_budget_allows(on, target, branches) -> None:
    torch.manual_seed(0)
    costs = torch.rand(6, branches, dtype=torch.double) + 0.5
    hold = BudgetShift(target, costs, on)
    for _ in range(5):
        out = hold(torch.randn(32, 6, branches) * 3 + torch.randn(()) * 10)
        reached = spent(out, costs, on)
        # the next decision would not fit: one unit's dearest decision is what may be left over
        assert reached <= target + 1e-9
        assert target - reached < float(costs.max() / costs.sum()) / 32 + 1e-9


def test_the_cut_lies_between_what_fits_and_what_does_not() -> None:
    z = torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    assert budget_shift(z, torch.ones(2), 2.0).item() == 1.5
    assert budget_shift(z, torch.ones(2), 2.9).item() == 1.5
    assert budget_shift(z, torch.ones(2), 0.5).item() == 4.0  # nothing fits: above the largest
    assert budget_shift(z, torch.ones(2), 4.0).item() == -1.0  # everything does: below the smallest
    assert budget_shift(z, torch.tensor([2.0, 1.0]), 3.0).item() == 2.5  # the second, of cost 2, does not fit


def test_equal_logits_at_the_cut_are_off() -> None:
    out = BudgetShift(0.5, [1.0] * 4, ())(torch.ones(3, 4, 1))
    assert bool((out <= 0).all())


def test_the_cut_has_no_gradient_and_common_growth_changes_nothing() -> None:
    hold, z = BudgetShift(0.5, [1.0] * 4, ()), torch.randn(8, 4, 1, requires_grad=True)
    out = hold(z)
    out.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
    assert torch.allclose(hold(z + 100), out, atol=1e-4)


def test_evaluation_takes_the_running_mean() -> None:
    torch.manual_seed(0)
    hold = BudgetShift(0.5, [1.0] * 4, (), momentum=0.25)
    first, second = torch.randn(8, 4, 1), torch.randn(8, 4, 1) + 2
    cuts = [float((z - hold(z))[0, 0, 0]) for z in (first, second)]
    expected = cuts[0] + 0.25 * (cuts[1] - cuts[0])
    assert hold.shift.item() == pytest.approx(expected, abs=1e-6)
    hold.eval()
    z = torch.randn(5, 4, 1)
    assert torch.allclose(hold(z), z - expected, atol=1e-6)
    assert hold.shift.item() == pytest.approx(expected, abs=1e-6)


def test_half_logits_are_cut_in_float32_and_other_layers_refused() -> None:
    hold = BudgetShift(0.5, [1.0] * 4, ())
    assert hold(torch.randn(8, 4, 1, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(ValueError, match="4 layers with 1 decisions each, got logits"):
        hold(torch.randn(8, 5, 1))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"target_flops": 0}, "target_flops"),
        ({"target_flops": 1.1}, "target_flops"),
        ({"target_flops": 0.3}, "cannot be reached"),
        ({"momentum": 0}, "momentum"),
        ({"momentum": 1.5}, "momentum"),
        ({"costs": [1.0, float("nan")]}, "costs"),
        ({"always_on": (7,)}, "always_on"),
    ],
)
def test_bad_options(arguments, match) -> None:
    with pytest.raises(ValueError, match=match):
        BudgetShift(**{"target_flops": 0.5, "costs": [1.0] * 4, "always_on": (0, -1), **arguments})


@pytest.mark.parametrize("standardise", [False, True])
def test_a_folded_router_decides_the_same(standardise) -> None:
    torch.manual_seed(0)
    router = LayerRouter(8, 6, hidden=4, standardise=standardise)
    router.hold = BudgetShift(0.5, [1.0] * 6)
    for _ in range(3):
        router(torch.randn(16, 5, 8))
    router.eval()
    x = torch.randn(64, 5, 8)
    before = router(x)
    router.fold_budget()
    assert router.hold is None
    assert torch.allclose(router(x), before, atol=1e-5)
    assert not any(name.startswith("hold") for name in router.state_dict())


def test_a_routed_model_learns_within_its_budget_and_is_saved_once_folded(tmp_path) -> None:
    torch.manual_seed(0)
    model = xdfast.nn.route(timm.create_model("test_vit"), 0.5).train()
    hold, stack = hold_budget(model), routed_stacks(model)[0]
    x = torch.randn(16, 3, 160, 160)
    model(x).square().mean().backward()
    costs = torch.tensor(model.xdfast_route.costs, dtype=torch.double)
    assert spent(stack.decision.gates - 0.5, costs, stack.always_on) <= 0.5
    assert stack.router.head.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="fold_budget"):
        save_routed(model, tmp_path)
    resumed = copy.deepcopy(model)
    assert torch.equal(resumed.state_dict()["blocks.router.hold.shift"], hold.shift)
    stack.router.fold_budget()
    model.eval()
    save_routed(model, tmp_path)
    with torch.no_grad():
        assert torch.allclose(load_routed(tmp_path)(x), model(x), atol=1e-5)


def test_a_router_that_does_not_learn_holds_nothing() -> None:
    router = xdfast.nn.StaticRouter(64, 6, keep=(0, 5))
    model = xdfast.nn.route(timm.create_model("test_vit"), 0.5, router=router)
    with pytest.raises(ValueError, match="StaticRouter"):
        hold_budget(model)
    with pytest.raises(ValueError, match="not routed"):
        hold_budget(timm.create_model("test_vit"))


def test_compiles_without_a_break() -> None:
    torch.manual_seed(0)
    hold, z = BudgetShift(0.5, [1.0] * 6), torch.randn(16, 6, 1)
    expected = copy.deepcopy(hold)(z)
    assert torch.allclose(torch.compile(hold, fullgraph=True, backend="aot_eager")(z), expected, atol=1e-6)
