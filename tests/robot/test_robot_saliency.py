"""Grad-CAM of a policy's encoder: it finds what the encoder looks at, and leaves the policy as it was."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("captum", reason="captum is not installed: pip install xdfast[analysis]")
pytest.importorskip("diffusers", reason="diffusers is not installed: pip install xdfast[robot]")

from sim_process import needs_renderer

from xdfast.robot import DiffusionPolicy, PolicySpec, build_encoder
from xdfast.robot.saliency import film_strip, saliency_maps


class Corner(nn.Module):
    """Sees the upper left quarter of a 48 px picture alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4, padding=1)
        self.head = nn.Linear(8, 5)
        mask = torch.zeros(12, 12)
        mask[:6, :6] = 1
        self.register_buffer("mask", mask)

    def forward(self, x):
        return self.head((self.conv(x).relu() * self.mask).mean((2, 3)))


def make_policy(model="test_resnet", *, size=48, cameras=("front",), **settings) -> DiffusionPolicy:
    torch.manual_seed(0)
    encoder, facts = build_encoder(model, image_size=size)
    spec = PolicySpec(
        4, 9, cameras, (size + 8, size + 8), crop=size, encoder=facts, feature_dim=8, unet_widths=(8, 16), **settings
    )
    return DiffusionPolicy(spec, encoder)


def episode(policy, count=5) -> list[dict[str, np.ndarray]]:
    spec, rng = policy.spec, np.random.default_rng(0)
    shape = (len(spec.cameras), spec.n_obs, *spec.image_size, 3)
    return [
        {"images": rng.integers(0, 256, shape, dtype=np.uint8), "state": np.zeros((spec.n_obs, spec.state_dim))}
        for _ in range(count)
    ]


def test_an_encoder_that_sees_one_corner_has_its_saliency_there() -> None:
    policy = make_policy(Corner())
    maps = saliency_maps(policy, episode(policy), layer="conv")
    assert maps.shape == (5, 48, 48) and maps.dtype == np.float32
    assert maps.min() >= 0 and np.allclose(maps.max((1, 2)), 1)
    # Grad-CAM weighs channels, not places: the activations outside the corner stay, so only what comes after the mask tells
    policy = make_policy(pooled())
    maps = saliency_maps(policy, episode(policy))
    assert (maps[:, :24, :24].sum((1, 2)) > 0.85 * maps.sum((1, 2))).all()


class MaskedStem(Corner):
    """The map behind the mask."""

    def forward(self, x):
        return self.conv(x).relu() * self.mask


def pooled() -> nn.Module:
    """Its last map is averaged and goes to a linear layer, so that its Grad-CAM is never empty."""
    return nn.Sequential(MaskedStem(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


@pytest.mark.parametrize("model", ["test_resnet", "test_vit", "test_convnext"])
def test_a_frozen_policy_keeps_its_modes_and_has_no_gradients(model) -> None:
    policy = make_policy(model, size=64)
    policy.requires_grad_(False)
    policy.train()
    policy.diffusion.eval()  # modes may differ below
    modes = [part.training for part in policy.modules()]
    maps = saliency_maps(policy, episode(policy, 3))
    assert maps.shape == (3, 64, 64) and set(maps.max((1, 2)).tolist()) <= {
        0.0,
        1.0,
    }  # random weights: a map may be empty
    assert [part.training for part in policy.modules()] == modes
    assert all(p.grad is None and not p.requires_grad for p in policy.parameters())
    again = saliency_maps(policy, episode(policy, 3))
    np.testing.assert_array_equal(maps, again)  # hooks of the first call are gone, and nothing is drawn at random


def test_trained_parameters_get_no_gradients_either() -> None:
    policy = make_policy().train()
    saliency_maps(policy, episode(policy, 2))
    assert all(p.grad is None and p.requires_grad for p in policy.parameters())


def test_each_camera_has_its_own_maps() -> None:
    policy = make_policy(pooled(), cameras=("front", "wrist"), n_obs=2, share_encoder=False)
    seen = episode(policy, 2)
    front, wrist = (saliency_maps(policy, seen, camera=camera) for camera in ("front", "wrist"))
    assert front.shape == wrist.shape and not np.array_equal(front, wrist)
    with pytest.raises(ValueError, match="no camera 'top'; it has front, wrist"):
        saliency_maps(policy, seen, camera="top")


def test_film_strip_is_a_picture_with_a_column_per_frame() -> None:
    from PIL import Image

    policy = make_policy(fps=80)
    wide, narrow = (
        Image.open(io.BytesIO(film_strip(policy, episode(policy, 9), count, title="a < b"))) for count in (6, 3)
    )
    assert wide.format == "PNG" and wide.size[0] == pytest.approx(2 * narrow.size[0], abs=2)
    short = Image.open(io.BytesIO(film_strip(policy, episode(policy, 2), 8)))
    assert short.size[0] < narrow.size[0]  # two observations, two columns


def test_bad_input() -> None:
    policy = make_policy()
    with pytest.raises(ValueError, match="no observations"):
        saliency_maps(policy, [])
    with pytest.raises(ValueError, match="count must be ≥ 1"):
        film_strip(policy, episode(policy), 0)
    with pytest.raises(ValueError, match=r"observation 1: expected images uint8 \[1, 1, 56, 56, 3\], got float64"):
        first = episode(policy, 1)[0]
        saliency_maps(policy, [first, {"images": first["images"] / 255.0}])
    with pytest.raises(ValueError, match="has no module that gives a map"):
        blind = make_policy(nn.Sequential(nn.Flatten(), nn.Linear(3 * 48 * 48, 4), nn.ReLU(), nn.Linear(4, 3)))
        saliency_maps(blind, episode(blind))
    state_only = DiffusionPolicy(
        PolicySpec(4, 9, (), (0, 0), crop=1, encoder=policy.spec.encoder, unet_widths=(8, 16)), policy.encoders[0]
    )
    with pytest.raises(ValueError, match="no camera"):
        saliency_maps(state_only, episode(policy))


@pytest.mark.slow
@needs_renderer
def test_evaluate_leaves_the_film_strip_even_without_videos(tmp_path, monkeypatch, caplog) -> None:
    from xdfast.pipeline.evaluate_policy import evaluate_policy
    from xdfast.pipeline.policy_config import EvaluatePolicyConfig

    torch.manual_seed(0)
    encoder, facts = build_encoder("test_resnet", image_size=40)
    spec = PolicySpec(4, 9, ("dp3",), (48, 48), crop=40, encoder=facts, feature_dim=8, unet_widths=(8, 16))
    policy = DiffusionPolicy(spec, encoder).eval()
    settings = {"model": "-", "task": "drawer-open", "episodes": 1, "max_steps": 16, "device": "cpu", "progress": False}
    config = EvaluatePolicyConfig(**settings, videos=0, out=str(tmp_path))
    result = evaluate_policy(config, policy)
    assert result.saliency == "saliency.png" and result.videos == {} and not (tmp_path / "videos").exists()
    assert (tmp_path / "saliency.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "captum", None)  # as if it were not installed
    with caplog.at_level("WARNING", "xdfast"):
        without = evaluate_policy(config, policy)
    assert without.saliency == "" and 'pip install "xdfast[analysis]"' in caplog.text
