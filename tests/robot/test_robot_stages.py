"""Stages of demonstrations, and how well features tell them apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from xdfast.models import create_model
from xdfast.robot.demos.episode import Episode
from xdfast.robot.stages import PROGRESS_STAGES, TIME_STAGES, frame_stages, stage_separation


def demonstration(brightness=None, *, told=True) -> Episode:
    """20 steps: the hand gets within 5 cm at 6, progress begins at 10, solved by the action of step 14."""
    state = np.zeros((20, 9), np.float32)
    state[:6, 0] = np.linspace(0.5, 0.1, 6)
    progress = np.full(20, 0.1, np.float32)
    progress[9:] = np.minimum(1, 0.3 + 0.2 * np.arange(11))  # after the action of step 9, so seen at 10
    images = np.zeros((20, 16, 16, 3), np.uint8)
    if brightness is not None:
        images += np.asarray(brightness, np.uint8)[:, None, None, None]
    return Episode(
        {"front": images},
        state,
        np.zeros((20, 4), np.float32),
        success=np.arange(20) >= 14 if told else None,
        info={"in_place_reward": progress} if told else {},
    )


class Demos:
    """Episodes in memory, as an opened folder gives them."""

    cameras = ("front",)

    def __init__(self, *episodes: Episode) -> None:
        self._episodes = episodes

    def __len__(self) -> int:
        return len(self._episodes)

    def episode(self, i: int) -> Episode:
        return self._episodes[i]


def test_stages_from_the_simulators_scalars() -> None:
    stages, names = frame_stages(demonstration())
    assert names == PROGRESS_STAGES
    assert stages.tolist() == [0] * 6 + [1] * 4 + [2] * 5 + [3] * 5


def test_without_scalars_three_parts_of_equal_time() -> None:
    stages, names = frame_stages(demonstration(told=False))
    assert names == TIME_STAGES and np.bincount(stages).tolist() == [7, 7, 6]


def test_odd_demonstrations_have_stages() -> None:
    episode = demonstration()
    episode.success = np.zeros(20, bool)  # never solved
    assert frame_stages(episode)[0].max() == 2
    episode.success = np.ones(20, bool)  # from the start
    assert set(frame_stages(episode)[0]) <= {0, 1, 2, 3}
    episode.info["in_place_reward"][3] = np.nan
    assert frame_stages(episode)[1] == TIME_STAGES


class Mean(nn.Module):
    """The mean of each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x.mean((2, 3)))


def test_separated_stages_score_high_and_mixed_ones_do_not() -> None:
    encoder = create_model(Mean(), image_size=16)
    stages = frame_stages(demonstration())[0]
    apart = stage_separation(encoder, Demos(*[demonstration(60 * stages)] * 2))
    noise = np.random.default_rng(0).integers(0, 200, 20)
    mixed = stage_separation(encoder, Demos(*[demonstration(noise)] * 2))
    assert apart["silhouette"] == pytest.approx(1) and mixed["silhouette"] < 0.3
    assert apart["counts"] == [12, 8, 10, 10] and apart["frames"] == len(apart["labels"]) == len(apart["points"]) == 40
    assert apart["stages"] == list(PROGRESS_STAGES) and apart["metric"] == "Euclidean" and apart["rule"] == "progress"


def test_one_demonstration_without_scalars_makes_it_thirds_for_all() -> None:
    found = stage_separation(
        create_model(Mean(), image_size=16), Demos(demonstration(np.arange(20)), demonstration(told=False))
    )
    assert found["stages"] == list(TIME_STAGES) and found["rule"] == "time"


def test_a_policy_and_its_encoder_alone_agree_on_the_same_crop() -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install xdfast[robot]")
    from xdfast.robot import DiffusionPolicy, PolicySpec, build_encoder

    torch.manual_seed(0)
    encoder, facts = build_encoder("test_resnet", image_size=12)
    spec = PolicySpec(4, 9, ("front",), (16, 16), crop=12, encoder=facts, unet_widths=(8, 16))
    policy = DiffusionPolicy(spec, encoder).train()
    demos = Demos(demonstration(np.arange(20) * 9), demonstration(np.arange(20) * 8))
    of_policy = stage_separation(policy, demos, frames=24)
    assert policy.training and of_policy["frames"] == 24
    assert of_policy["silhouette"] == stage_separation(policy.encoders[0], demos, frames=24, crop_size=12)["silhouette"]


def test_bad_input() -> None:
    encoder = create_model(Mean(), image_size=16)
    with pytest.raises(ValueError, match="no camera 'top'; they have: front"):
        stage_separation(encoder, Demos(demonstration()), cameras=("top",))
    with pytest.raises(ValueError, match="the same features for every frame"):
        stage_separation(encoder, Demos(demonstration()))
    with pytest.raises(ValueError, match="frames must be ≥ 8, got 3"):
        stage_separation(encoder, Demos(demonstration()), frames=3)
