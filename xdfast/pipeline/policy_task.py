"""What a policy's training minimises: the denoiser's error on windows of demonstrations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdfast.pipeline.task import TrainingTask
from xdfast.robot.policy import DiffusionPolicy
from xdfast.robot.windows import WindowBatch

__all__ = ["PolicyTask"]


class PolicyTask(TrainingTask):
    """The diffusion loss of a policy.

    Args:
        policy: what learns; its normalisation is fitted.
        draws: of noise and diffusion step per sample.
        frozen: the encoder gets no gradient; batches then hold its features instead of pictures.
    """

    student: DiffusionPolicy
    unit = "samples"

    def __init__(self, policy: DiffusionPolicy, draws: int, frozen: bool = False) -> None:
        super().__init__(policy)
        self.draws, self.frozen = draws, frozen
        if frozen:
            policy.encoders.requires_grad_(False)

    def parameter_groups(self, config: Any) -> list[dict[str, Any]]:
        """The encoder, at its own rate, and the rest."""
        encoder = [p for p in self.student.encoders.parameters() if p.requires_grad]
        mine = {id(p) for p in self.student.encoders.parameters()}
        rest = [p for p in self.student.parameters() if id(p) not in mine and p.requires_grad]
        groups = [{"params": rest, "lr": config.lr, "weight_decay": config.weight_decay}]
        if encoder:
            rate = config.lr if config.encoder_lr is None else config.encoder_lr
            groups.append({"params": encoder, "lr": rate, "weight_decay": config.weight_decay})
        return groups

    def inputs(self, batch: WindowBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pictures (or features) and actions."""
        return batch.images.to(device, non_blocking=True), batch.actions.to(device, non_blocking=True)

    def teach(self, images: Tensor, batch: WindowBatch) -> dict[str, Tensor]:
        return {"state": batch.state.to(images.device, non_blocking=True)}

    def forward(self, images: Tensor, targets: Tensor | None, state: Tensor | None = None) -> dict[str, Tensor]:
        assert targets is not None and state is not None  # every rank has rows in every step: see WindowLoader
        policy = self.student
        features = None
        if policy.spec.cameras:
            features = images if self.frozen else policy.features(images)
        # The denoiser is small: on a CPU bfloat16 costs it more in conversions than it saves
        with torch.autocast(
            targets.device.type, enabled=targets.device.type == "cuda" and torch.is_autocast_enabled("cuda")
        ):
            condition = policy.condition(features, state)
            loss = policy.diffusion.loss(policy.action_norm(targets), condition, self.draws)
        return {"loss": loss}

    def train(self, mode: bool = True) -> PolicyTask:
        super().train(mode)
        if self.frozen:
            self.student.encoders.eval()
        return self
