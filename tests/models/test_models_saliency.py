"""Grad-CAM and occlusion of image models: the equation by hand, the right place found, frozen models left as they were."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("captum", reason="captum is not installed: pip install xdfast[analysis]")

from xdfast.models import create_model
from xdfast.models.gradcam import find_layer
from xdfast.models.saliency import grad_cam, occlusion


class Corner(nn.Module):
    """Knows nothing but how bright the upper left quarter of a 32 px picture is."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 2)
        self.head.weight.data = torch.tensor([[4.0], [-4.0]])

    def forward(self, x):
        return self.head(x[:, :, :16, :16].mean((1, 2, 3))[:, None])


def logits_of(model):
    return lambda pixels: model(pixels).logits


def test_layers() -> None:
    resnet = create_model("resnet18", pretrained=False, image_size=84)
    assert (find_layer(resnet).name, find_layer(resnet).side) == ("layer3", 6)  # layer4 has 3 x 3 cells
    assert find_layer(resnet, least_side=1).name == "layer4"
    assert find_layer(resnet, "layer4").side == 3
    vit = find_layer(create_model("test_vit", pretrained=False, image_size=64))
    assert (vit.layout, vit.side, vit.prefix) == ("tokens", 4, 1)
    from timm.models.swin_transformer import SwinTransformer

    net = SwinTransformer(
        img_size=32, patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=0
    )
    swin = find_layer(create_model(net, image_size=32))
    assert (swin.layout, swin.side) == ("NHWC", 8)
    with pytest.raises(ValueError, match="has no module 'layer9'"):
        find_layer(resnet, "layer9")
    with pytest.raises(ValueError, match="gives no map"):
        find_layer(resnet, "global_pool")


def test_grad_cam_is_the_equation() -> None:
    model = create_model("test_resnet", pretrained=False, num_classes=5, image_size=64).eval()
    images, target = torch.rand(3, 3, 64, 64), torch.tensor([0, 3, 2])
    found = grad_cam(model, images, logits_of(model), target=target, layer="layer2")
    kept = []
    handle = model.net.layer2.register_forward_hook(lambda module, args, output: kept.append(output))
    logits = model(images).logits  # fills kept
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), kept)
    handle.remove()
    by_hand = (gradient.mean((2, 3), keepdim=True) * kept[-1]).sum(1, keepdim=True).relu()
    by_hand = F.interpolate(by_hand, (64, 64), mode="bilinear")[:, 0].detach()
    by_hand = by_hand / by_hand.amax((1, 2), keepdim=True).clamp(min=1e-30)
    assert by_hand.max() > 0.9  # of three pictures at least one has a map
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_a_frozen_teacher_is_explained_and_stays_frozen(name) -> None:
    model = create_model(name, pretrained=False, num_classes=4, image_size=64)
    teacher = create_model(model.net, frozen=True)
    images = torch.rand(2, 3, 64, 64)
    first, again = (grad_cam(teacher, images, logits_of(teacher), target=torch.tensor([1, 2])) for _ in range(2))
    assert first.shape == (2, 64, 64) and first.min() >= 0 and first.max() <= 1
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert teacher.frozen and not teacher.training and not teacher(images).logits.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_occlusion_finds_what_a_model_without_places_looks_at() -> None:
    model = create_model(Corner(), image_size=32).train()
    images = torch.zeros(2, 3, 32, 32)
    images[:, :, 4:12, 4:12] = 1  # bright where class 0 looks
    maps = occlusion(model, images, logits_of(model), target=torch.tensor([0, 0]))
    assert maps.shape == (2, 32, 32) and torch.allclose(maps.amax((1, 2)), torch.ones(2)) and model.training
    assert maps[:, 4:12, 4:12].mean() > 0.8 and maps[:, 20:, 20:].max() == 0
    other = occlusion(model, images, logits_of(model), target=torch.tensor([1, 1]))  # hiding the light helps class 1
    assert other[:, 4:12, 4:12].max() == 0
    with pytest.raises(ValueError, match="no module that gives a map"):
        grad_cam(model, images, logits_of(model), target=torch.tensor([0, 0]))


def test_bad_input(monkeypatch) -> None:
    model = create_model(Corner(), image_size=32)
    score = logits_of(model)
    with pytest.raises(
        ValueError, match=r"expected images \[N, 3, H, W\], floating point in \[0, 1\], got torch.uint8"
    ):
        grad_cam(model, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), score)
    with pytest.raises(ValueError, match=r"got torch.float32 \[0, 3, 32, 32\]"):
        occlusion(model, torch.zeros(0, 3, 32, 32), score)
    with pytest.raises(ValueError, match=r"one target for each of 2 images, got \[3\]"):
        occlusion(model, torch.zeros(2, 3, 32, 32), score, target=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="cells must be 2 to 32"):
        occlusion(model, torch.zeros(2, 3, 32, 32), score, cells=40)
    monkeypatch.setitem(sys.modules, "captum.attr", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install \"xdfast\[analysis\]\""):
        occlusion(model, torch.zeros(2, 3, 32, 32), score)
