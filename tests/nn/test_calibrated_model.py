"""Calibration of a whole model: its threshold is set so that the budget holds on the data it saw."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from xdfast.nn import calibrate_model, route, routed_stacks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model() -> nn.Module:
    made = route(timm.create_model("test_vit", img_size=64).eval(), 0.6)
    (stack,) = routed_stacks(made)
    nn.init.normal_(stack.router.head.weight, std=1.0)  # decisions that differ
    return made


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64)


@pytest.mark.parametrize("scope", ["global", "branch"])
def test_the_model_keeps_the_flops_it_was_calibrated_for(model, scope) -> None:
    batches = [images(6), images(5)]
    found = calibrate_model(model, batches, target_flops=0.6, scope=scope)
    (stack,) = routed_stacks(model)
    assert 0.4 < found.expected_flops <= 0.6 and not model.training
    spent = []
    with torch.no_grad():
        for batch in batches:
            model(batch)
            counts = torch.tensor(stack.decision.plan.host_counts, dtype=torch.float64) / len(batch)
            costs = stack.costs(17)
            spent += [float((counts * costs).sum() / costs.sum())] * len(batch)
    assert sum(spent) / len(spent) == pytest.approx(found.expected_flops, abs=1e-6)


def test_a_latency_budget_is_measured_on_the_first_batch(model) -> None:
    found = calibrate_model(model, [images(4)], budget_ms=1e4)
    assert found.calibration.expected_flops == 1 and found.ms < 1e4
    (stack,) = routed_stacks(model)
    assert float(stack.gate.threshold) == pytest.approx(found.calibration.threshold)
    before = stack.gate.threshold.clone()
    with pytest.raises(ValueError, match=r"the cheapest path, .* above budget_ms=1e-06"):
        calibrate_model(model, [images(4)], budget_ms=1e-6)
    assert torch.equal(stack.gate.threshold, before)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {"target_flops": 0.6}, "at least one batch"),
        ([images(2)], {}, "target_flops or budget_ms"),
        ([images(2)], {"target_flops": 0.6, "budget_ms": 3.0}, "target_flops or budget_ms"),
        ([images(2)], {"target_flops": 0.6, "scope": "sample"}, "no threshold that could be set"),
        ([images(2)], {"target_flops": 0.1}, "0.1"),
        ([images(2)], {"target_flops": 1.5}, "1.5"),
    ],
)
def test_budgets_that_make_no_sense_are_told(model, batches, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate_model(model, batches, **options)
    with pytest.raises(ValueError, match="one routed stack and its router, this one has 0"):
        calibrate_model(nn.Linear(2, 2), [images(2)], target_flops=0.5)
