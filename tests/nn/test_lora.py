"""Adapters: nothing changes at first, they alone learn, and merged they are the plain layer again, under the plain names."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from xdfast.nn import route
from xdfast.nn.lora import LoRALinear, add_lora, merge_lora


def make() -> nn.Sequential:
    return nn.Sequential(*(Block(16, 2) for _ in range(3))).eval()


def test_adapters_start_as_nothing_and_merge_into_the_weights() -> None:
    layers, x = make(), torch.randn(2, 5, 16)
    before, names = layers(x), set(layers.state_dict())
    assert add_lora(layers, 4) == 12
    assert torch.equal(layers(x), before)
    learn = {name for name, p in layers.named_parameters() if p.requires_grad}
    assert len(learn) == 24 and all(name.endswith(("lora_a", "lora_b")) for name in learn)
    optimizer = torch.optim.SGD([p for p in layers.parameters() if p.requires_grad], lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        layers(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        changed = layers(x)
        assert (changed - before).abs().max() > 1e-3
        merge_lora(layers)
        assert torch.allclose(layers(x), changed, atol=1e-5)
    assert set(layers.state_dict()) == names
    plain = make()
    plain.load_state_dict(layers.state_dict())
    assert torch.allclose(plain(x), changed, atol=1e-5)
    merge_lora(layers)  # a second time changes nothing
    assert torch.allclose(layers(x), changed, atol=1e-5)


def test_routed_layers_learn_through_them_and_run_merged() -> None:
    layers, x = make(), torch.randn(4, 5, 16)
    add_lora(layers, 2)
    stack = route(layers, 0.7, tokens=5, copy=False)
    stack.train()
    stack(x).square().mean().backward()
    assert all(layer.mlp.fc1.lora_b.grad.abs().sum() > 0 for layer in layers)
    with torch.no_grad():
        for layer in layers:
            layer.mlp.fc1.lora_b.normal_()
        wanted = stack.requires_grad_(False)  # dense_mask sees the adapters as they are
        stack.executor = "dense_mask"
        expected = wanted(x)
        merge_lora(stack)
        stack.executor = "cpu"
        assert torch.allclose(stack(x), expected, atol=1e-5)
        assert stack.decision.executor == "cpu"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="1 to 3 for a map from 8 to 3, got 4"):
        LoRALinear(nn.Linear(8, 3), 4)
    with pytest.raises(ValueError, match="no linear map"):
        add_lora(nn.Sequential(nn.ReLU()), 2)
    assert "rank=2" in repr(LoRALinear(nn.Linear(4, 4, bias=False), 2))
