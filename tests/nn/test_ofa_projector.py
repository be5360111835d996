"""OFA's branches: sizes as published, shapes for every kind of stage; maps of every architecture; heads and regressors."""

from __future__ import annotations

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer

import xdfast
from xdfast.nn import AAD, ContrastHeads, HintRegressor, OFAProjector, to_grid, to_map


def parameters(*modules: torch.nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def test_extra_parameters_of_rsd_and_ofa_from_convnext_t_to_swin_n() -> None:
    # Swin-N of the public OFA code; ImageNet classes; ConvNeXt-T's features have 768 dimensions
    student = SwinTransformer(embed_dim=64, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16), window_size=7)
    assert parameters(student) / 1e6 == pytest.approx(9.60, abs=0.005)  # the paper's 9.6 M
    stages = [(56, 56, 64), (28, 28, 128), (14, 14, 256), (7, 7, 512)]
    blocks = [3, 2, 1, 1]
    ofa = [OFAProjector(shape, 1000, 512, 768, blocks=n) for shape, n in zip(stages, blocks, strict=True)]
    assert parameters(*ofa) / 1e6 == pytest.approx(28.19, abs=0.005)  # the paper's 28.2 M
    # The paper says about 2.8 M for RSD; AAD as it is defined, γ = 2, has half of that (γ = 4: 2.63 M).
    assert parameters(AAD(512, 768)) == 2 * 512**2 + 2 * 512 * 768 + 4 * 512 == 1_312_768
    assert parameters(AAD(512, 768, 4)) == 2_625_536


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((64, 56, 56), {}), ((256, 14, 14), {}), ((512, 7, 7), {}), ((24, 1, 1), {"final_side": 1}),
        ((28, 28, 24), {}), ((196, 32), {}), ((50, 32), {"prefix_tokens": 1}), ((201, 24), {"prefix_tokens": 5}),
        ((15 * 15, 32), {"blocks": 2}), ((64, 30), {"final_side": 2}),
    ],
)  # fmt: skip
def test_every_kind_of_stage_becomes_logits_with_gradients_everywhere(shape, options) -> None:
    projector = OFAProjector(shape, 10, 32, 48, **options)
    logits = projector(torch.randn(3, *shape))
    assert logits.shape == (3, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in projector.parameters())


def test_separable_convolutions_halve_down_to_7_places() -> None:
    projector = OFAProjector((64, 56, 56), 10, 256, 384)
    convolutions = [m for m in projector.modules() if isinstance(m, torch.nn.Conv2d)]
    assert sum(m.stride == (2, 2) for m in convolutions) == 3
    assert [m.out_channels for m in convolutions if m.kernel_size == (1, 1)] == [64, 128, 128, 256, 256, 384]


def test_what_cannot_be_projected_is_named() -> None:
    with pytest.raises(ValueError, match="shape must be"):
        OFAProjector((5,), 10, 8, 8)
    with pytest.raises(ValueError, match="are no square image"):
        OFAProjector((50, 8), 10, 8, 8)
    with pytest.raises(ValueError, match="blocks must be a positive integer, got 0"):
        OFAProjector((49, 8), 10, 8, 8, blocks=0)
    with pytest.raises(ValueError, match=r"expects \[N, 8, 7, 7\], got \[2, 8, 6, 6\]"):
        OFAProjector((8, 7, 7), 10, 8, 8)(torch.randn(2, 8, 6, 6))
    with pytest.raises(ValueError, match="at least 2 samples in training"):
        OFAProjector((8, 14, 14), 10, 8, 8)(torch.randn(1, 8, 14, 14))
    assert OFAProjector((8, 14, 14), 10, 8, 8).eval()(torch.randn(1, 8, 14, 14)).shape == (1, 10)


def test_outputs_of_every_kind_become_maps() -> None:
    picture = torch.randn(2, 5, 4, 4)
    tokens = picture.flatten(2).transpose(1, 2)
    for output, prefix in (
        (picture, 0), (picture.permute(0, 2, 3, 1), 0), (tokens, 0), (torch.cat([torch.ones(2, 3, 5), tokens], 1), 3)
    ):  # fmt: skip
        torch.testing.assert_close(to_map(output, prefix), picture)
        torch.testing.assert_close(to_grid(output, 2, prefix)[:, :, 1, 0], picture[:, :, 2:, :2].mean((2, 3)))
    assert to_map(torch.randn(2, 5)).shape == (2, 5, 1, 1)
    with pytest.raises(ValueError, match="5 tokens, 0 of them without a place, are no square image"):
        to_map(torch.randn(2, 5, 3))
    with pytest.raises(ValueError, match="got tuple"):
        to_map((picture,))  # type: ignore[arg-type]


def test_hint_regressor_is_one_linear_map_of_every_place() -> None:
    regressor = HintRegressor(5, 7, grid=2)
    picture = torch.randn(2, 5, 4, 4)
    expected = torch.einsum("oc,nchw->nohw", regressor.regress.weight[:, :, 0, 0], to_grid(picture, 2))
    torch.testing.assert_close(regressor(picture), expected)
    with pytest.raises(ValueError, match="HintRegressor expects 5 channels"):
        regressor(torch.randn(2, 6, 4, 4))
    with pytest.raises(ValueError, match="grid must be a positive integer"):
        HintRegressor(5, 7, grid=0)


def test_contrast_heads() -> None:
    heads = ContrastHeads(5, 7, 3)
    a, b = heads(torch.randn(2, 5), torch.randn(2, 7))
    assert a.shape == b.shape == (2, 3) and parameters(heads) == (5 + 7 + 2) * 3
    with pytest.raises(ValueError, match=r"teacher features of shape \[N, 7\], got \[2, 5\]"):
        heads(torch.randn(2, 5), torch.randn(2, 5))
    with pytest.raises(ValueError, match="dim must be a positive integer"):
        ContrastHeads(5, 7, 0)
    assert xdfast.nn.ContrastHeads is ContrastHeads
