"""Which layers of a model are compared with another's, and what they give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xdfast.models import create_model
from xdfast.models.stages import FEATURES, stage_names, stage_outputs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_resnet", ["act1", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
        ("test_vit", [f"blocks.{i}" for i in range(6)]),
        ("test_convnext", ["stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1"]),
    ],
)
def test_stages_of_timm_models_in_order(name, expected) -> None:
    found = stage_names(create_model(name, pretrained=False, image_size=32 if name == "test_resnet" else 64))
    assert found[: len(expected)] == expected and found[-1] == FEATURES


def test_many_stages_are_thinned_but_not_at_the_ends() -> None:
    model = create_model("resnet50", pretrained=False, image_size=32)
    assert len(stage_names(model, 50)) == 18  # act1, 16 blocks, features
    few = stage_names(model, 6)
    assert len(few) == 6 and few[0] == "act1" and few[-2:] == ["layer4.2", FEATURES]
    with pytest.raises(ValueError, match="most must be ≥ 2"):
        stage_names(model, 1)


class Own(nn.Module):
    """Not timm's: a layer used twice, one that gives a tuple, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self.split = Split()
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x, _ = self.split(self.act(self.stem(x)))
        return self.head(self.act(self.body(x)).mean((2, 3)))


class Split(nn.Module):
    def forward(self, x):
        return x, x


def test_modules_of_ones_own() -> None:
    model = create_model(Own(), image_size=16).train()
    assert stage_names(model) == ["stem", "body.0", "body.1", FEATURES]
    assert model.training


def test_outputs_are_those_of_the_layers_and_the_hooks_go() -> None:
    model = create_model(Own(), image_size=16).eval()
    images = torch.rand(5, 3, 16, 16)
    with stage_outputs(model, ["stem", "body.1", FEATURES], lambda x: x.flatten(1)) as run:
        stem, body, features = run(images)
    torch.testing.assert_close(stem, model.net.stem(model.prepare(images)).flatten(1))
    assert body.shape == (5, 6 * 10 * 10)
    torch.testing.assert_close(features, model(images).features)
    assert not any(module._forward_hooks for module in model.net.modules() if module is not model.classifier)
    with pytest.raises(AttributeError), stage_outputs(model, ["nothing"], torch.Tensor.sum):
        pass
