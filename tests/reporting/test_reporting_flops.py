"""Counted FLOPs: two counters agree, published figures are met, nothing is hidden."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from xdfast.models import create_model
from xdfast.reporting import count_flops

SMALL = {
    "mixer_s32_224": {},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)},
    "convnext_tiny": {"depths": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("name", SMALL)
def test_both_counters_agree(name) -> None:
    count = count_flops(timm.create_model(name, **SMALL[name]))
    # Two independent walks over the same convolutions, linears and attention: whole numbers, so equal.
    assert count.relative_difference == 0
    assert count.unsupported == {}
    assert count.flops == 2 * count.macs


@pytest.mark.parametrize(
    ("name", "giga", "millions"),
    [
        ("resnet18", 1.82, 11.69),  # timm and ptflops
        ("vit_small_patch16_224", 4.61, 22.05),  # DeiT-S: 4.6 GMACs, arXiv 2012.12877 table 5
        ("vit_tiny_patch16_224", 1.26, 5.72),  # DeiT-Ti
    ],
)
def test_published_figures_and_both_counters(name, giga, millions) -> None:
    count = count_flops(timm.create_model(name))
    assert count.macs / 1e9 == pytest.approx(giga, abs=0.005)  # the figures are given to two decimals
    assert count.relative_difference == 0 and count.unsupported == {}
    assert count.params / 1e6 == pytest.approx(millions, abs=0.005)


def test_attention_is_counted_by_its_formula_also_unfused() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", depth=2)
    fused = count_flops(vit)
    assert fused.by_operator["attention"] == 2 * 2 * 197 * 197 * 192  # 2 blocks · (QKᵀ + AV)
    for block in vit.blocks:
        block.attn.fused_attn = False
    assert count_flops(vit).macs == fused.macs


def test_grouped_queries_masks_and_baddbmm() -> None:
    class Grouped(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, is_causal=True)

    q, kv = torch.rand(2, 8, 5, 16), torch.rand(2, 2, 5, 16)
    count = count_flops(Grouped(), inputs=(q, kv, kv))
    assert count.macs == 2 * 8 * 5 * 5 * (16 + 16)  # dense, 8 query heads

    class Biased(nn.Module):
        def forward(self, a, b):
            return torch.baddbmm(torch.zeros(1), a, b)

    assert count_flops(Biased(), inputs=(torch.rand(3, 4, 5), torch.rand(3, 5, 6))).macs == 3 * 4 * 5 * 6


def test_multihead_attention_has_no_hidden_fast_path() -> None:
    x = torch.rand(1, 5, 32)
    count = count_flops(nn.MultiheadAttention(32, 4, batch_first=True), inputs=(x, x, x))
    assert count.relative_difference == 0
    assert torch.backends.mha.get_fastpath_enabled()


def test_unknown_operators_are_listed() -> None:
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.rfft2(x).real + F.gelu(x)[..., :3]

    count = count_flops(Spectrum(), image_size=4)
    assert count.unsupported == {"fft_rfft2": 1}
    assert {"gelu", "add"} <= set(count.elementwise)
    assert count.relative_difference is None


def test_batch_mode_blocks_and_wrapper() -> None:
    model = create_model("test_resnet", pretrained=False, image_size=32).train()
    model.net.layer1.eval()
    one, four = count_flops(model), count_flops(model, batch_size=4)
    assert four.macs == 4 * one.macs
    assert one.input_shapes == ((1, 3, 32, 32),)
    assert one.macs == count_flops(model.net, 32).macs
    assert model.training and model.net.fc.training and not model.net.layer1.training
    assert one.by_module[0].macs == max(row.macs for row in one.by_module)
    assert sum(row.params for row in one.by_module) == one.params


def test_bad_arguments_are_named() -> None:
    vit = timm.create_model("test_vit").train()
    with pytest.raises(ValueError, match=r"image_size=100.*built for 160"):
        count_flops(vit, 100)
    assert vit.training
    with pytest.raises(ValueError, match="image_size must be a whole number ≥ 1, got 0"):
        count_flops(vit, 0)
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        count_flops(vit, batch_size=1.5)
    with pytest.raises(ValueError, match="cannot run on the given inputs"):
        count_flops(nn.Linear(3, 4), inputs=torch.rand(2, 5))
    with pytest.raises(TypeError, match=r"torch.nn.Module, got str"):
        count_flops("resnet18")
