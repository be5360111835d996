"""Small policies and demonstrations for tests; no simulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from xdfast.robot import DiffusionPolicy, DiffusionSettings, PolicySpec, build_encoder
from xdfast.robot.demos.episode import Episode
from xdfast.robot.demos.format import DemoWriter

SIZE = 24


def write_demos(folder: Path, *, episodes: int = 3, steps: int = 12, cameras=("dp3",), task="metaworld/drawer-open-v3"):
    """Episodes whose actions can be read off the state: a_t = (state_t[:4] halved)."""
    writer = DemoWriter(
        folder,
        task=task,
        cameras={name: (SIZE, SIZE) for name in cameras},
        fps=80,
        action_dim=4,
        state_dim=9,
    )
    rng = np.random.default_rng(0)
    for index in range(episodes):
        length = steps + index
        swing = 0.5 * np.arange(length)[:, None] + np.arange(9) + index
        state = np.sin(swing).astype(np.float32)  # what comes next can be told from it
        images = {name: rng.integers(0, 256, (length, SIZE, SIZE, 3), dtype=np.uint8) for name in cameras}
        success = np.arange(length) == length - 1
        writer.write(Episode(images, state, state[:, :4] / 2, success, seed=index), index=index)
    return folder


def make_policy(*, norm="auto", prediction="sample", scheduler="ddim", cameras=("dp3",), **spec) -> DiffusionPolicy:
    """With a ResNet of 0.1 M parameters."""
    encoder, facts = build_encoder("test_resnet", norm=norm, image_size=20)
    settings = DiffusionSettings(scheduler, prediction, 20, 4)
    sizes = {"image_size": (SIZE, SIZE), "crop": 20, "unet_widths": (16, 32), "feature_dim": 8, **spec}
    return DiffusionPolicy(PolicySpec(4, 9, cameras, encoder=facts, diffusion=settings, **sizes), encoder).eval()
