"""The counted cost of a decision, against figures worked out by hand and torch's own counter."""

from __future__ import annotations

import pytest
import torch
from policy_parts import SIZE, make_policy
from torch.utils.flop_counter import FlopCounterMode

from xdfast.reporting import count_flops
from xdfast.robot import DiffusionPolicy
from xdfast.robot.cost import count_decision

pytestmark = pytest.mark.usefixtures("one_thread")


def test_parts_add_up_and_agree_with_torch() -> None:
    policy = make_policy(cameras=("a", "b"), n_obs=2)
    policy.train()
    cost = count_decision(policy)
    assert policy.training
    assert (cost.pictures, cost.steps) == (4, 4)
    assert cost.encoder_macs == count_flops(policy.encoders[0], 20).macs
    assert cost.macs == 4 * cost.encoder_macs + cost.condition_macs + 4 * cost.step_macs
    assert cost.encoder_params == sum(p.numel() for p in policy.encoders.parameters())
    images = torch.zeros(1, 2, 2, SIZE, SIZE, 3, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        policy.eval().act(images, torch.zeros(1, 2, 9))
    # torch counts products alone; fvcore adds its estimate for normalisation
    assert counter.get_total_flops() <= 2 * cost.macs < 1.15 * counter.get_total_flops()


def test_a_policy_without_cameras() -> None:
    spec = make_policy().spec
    values = {**spec.to_dict(), "cameras": (), "image_size": (0, 0)}
    policy = DiffusionPolicy(type(spec).from_dict(values), make_policy().encoders[0])
    cost = count_decision(policy)
    assert cost.encoder_macs == cost.pictures == cost.encoder_params == 0
    assert cost.macs == cost.condition_macs + cost.steps * cost.step_macs > 0
