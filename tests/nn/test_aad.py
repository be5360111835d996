"""AAD: structure, initialisation, parameter count, ablation, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xdfast import AAD


def test_structure_is_the_papers() -> None:
    aad = AAD(8, 12)
    kinds = [type(layer) for layer in aad]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.GELU, nn.Linear]
    assert [layer.bias for layer in aad if isinstance(layer, nn.Linear)] == [None, None]
    assert aad[0].weight.shape == (16, 8)
    assert aad[3].weight.shape == (12, 16)


def test_forward_is_the_equation() -> None:
    aad, x = AAD(8, 12).double(), torch.randn(5, 8, dtype=torch.double)
    hidden = x @ aad[0].weight.T
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, correction=0) + aad[1].eps).sqrt()
    torch.testing.assert_close(aad(x), nn.functional.gelu(hidden) @ aad[3].weight.T)


@pytest.mark.parametrize(("d_s", "d_t", "gamma"), [(512, 768, 2), (8, 12, 1.5), (16, 4, 4)])
def test_parameter_count(d_s, d_t, gamma) -> None:
    hidden = int(gamma * d_s)
    assert sum(p.numel() for p in AAD(d_s, d_t, gamma).parameters()) == hidden * (d_s + d_t + 2)


def test_weights_are_truncated_normal() -> None:
    weight = AAD(256, 512)[0].weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(weight.mean().item()) < 1e-3


def test_without_aad_is_one_linear_map() -> None:
    aad = AAD(8, 12, expansion=0)
    assert len(aad) == 1
    x = torch.randn(1, 8)
    torch.testing.assert_close(aad(x), x @ aad[0].weight.T)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="in_features must be a positive integer.*0"):
        AAD(0, 4)
    with pytest.raises(ValueError, match="expansion must be a finite number ≥ 0.*-1"):
        AAD(4, 4, expansion=-1)
    with pytest.raises(ValueError, match="leaves no hidden unit"):
        AAD(4, 4, expansion=0.1)
    with pytest.raises(ValueError, match=r"shape \[N, 4\], got \[2, 5\]"):
        AAD(4, 4)(torch.randn(2, 5))
    with pytest.raises(ValueError, match="at least 2 samples in training"):
        AAD(4, 4)(torch.randn(1, 4))
    assert AAD(4, 4).eval()(torch.randn(1, 4)).shape == (1, 4)
