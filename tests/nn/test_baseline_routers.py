"""Routers that do not learn: a fixed choice by influence, and a draw from the input's own numbers that meets the budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import xdfast.nn as xnn
from xdfast.nn.baseline_routers import most_influential


def test_static_choices_are_the_same_for_all_and_kept_by_state() -> None:
    router = xnn.StaticRouter(8, 5, keep=(0, 2, -1))
    on = router(torch.randn(3, 4, 8))[:, :, 0] > 0
    assert on.tolist() == [[True, False, True, False, True]] * 3
    assert not list(router.parameters()) and router.flops(4) == 0
    other = xnn.StaticRouter(8, 5)
    assert bool((other(torch.randn(1, 4, 8)) > 0).all())  # nothing chosen: everything
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.logits, router.logits)
    with pytest.raises(ValueError, match="layer"):
        xnn.StaticRouter(8, 5, keep=(5,))
    with pytest.raises(ValueError, match=r"\[B, T, 8\]"):
        router(torch.randn(3, 4, 9))


@pytest.mark.parametrize(("layers", "target"), [(8, 0.5), (8, 0.45), (12, 0.7), (4, 1.0), (4, 0.5)])
def test_chance_meets_the_budget_and_uses_every_layer(layers: int, target: float) -> None:
    router = xnn.RandomRouter(8, layers, target, always_on=(0, -1))
    on = (router(torch.randn(4000, 3, 8)) > 0).float()[:, :, 0]
    assert float(on.mean()) == pytest.approx(target, abs=0.004)
    assert bool(on[:, [0, -1]].all())
    counts = on.sum(1)
    assert float(counts.max() - counts.min()) <= 1  # the budget holds for every sample, not only on average
    free = (target * layers - 2) / max(layers - 2, 1)
    assert torch.allclose(on[:, 1:-1].mean(0), torch.tensor(free), atol=0.03)  # no layer is favoured


def test_chance_is_a_function_of_the_input_and_the_seed() -> None:
    x = torch.randn(64, 3, 8)
    router = xnn.RandomRouter(8, 8, 0.5)
    assert torch.equal(router(x), router(x)) and torch.equal(router(x)[5:6], router(x[5:6]))
    other = x.clone()
    other[:, 1, 2] += 1e-3
    assert (router(x) != router(other)).any(1).float().mean() > 0.8
    assert not torch.equal(router(x), xnn.RandomRouter(8, 8, 0.5, seed=1)(x))
    with pytest.raises(ValueError, match="less than the 2 that are always on"):
        xnn.RandomRouter(8, 8, 0.2)
    with pytest.raises(ValueError, match="target"):
        xnn.RandomRouter(8, 8, 1.5)


def test_influence_is_the_change_of_direction() -> None:
    h0 = torch.randn(2, 5, 16)
    turned = torch.cat([h0[..., 1:], h0[..., :1]], -1)
    states = [h0, h0 * 3, -h0, turned]
    influence = xnn.block_influence(states)
    assert influence[0] == pytest.approx(0, abs=1e-12) and influence[1] == pytest.approx(2)
    expected = torch.stack(
        [
            1 - torch.dot(a, b) / a.norm() / b.norm()
            for a, b in zip(-h0.double().flatten(0, 1), turned.double().flatten(0, 1))
        ]
    ).mean()
    assert influence[2] == pytest.approx(float(expected))
    assert most_influential(torch.tensor([0.1, 0.5, 0.2, 0.9, 0.3, 0.0]), 0.67, (0, -1)) == (0, 1, 3, 5)
    with pytest.raises(ValueError, match="less than the 2 that are always on"):
        most_influential(influence, 0.5)
    with pytest.raises(ValueError, match="got 1 states"):
        xnn.block_influence(states[:1])


def test_they_run_in_a_stack() -> None:
    from timm.models.vision_transformer import Block

    layers = nn.Sequential(*(Block(16, 2) for _ in range(4))).eval()
    x = torch.randn(3, 5, 16)
    stack = xnn.route(layers, 0.5, tokens=5, router=xnn.StaticRouter(16, 4, (0, 3)))
    with torch.no_grad():
        assert torch.allclose(stack(x), layers[3](layers[0](x)), atol=1e-5)
        chance = xnn.route(layers, 0.5, tokens=5, router=xnn.RandomRouter(16, 4, 0.5))
        assert chance(x).shape == x.shape and chance.decision.gates.sum((1, 2)).tolist() == [2, 2, 2]
