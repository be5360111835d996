"""What the training of a compact VLA minimises: its own loss of action chunks, regression or diffusion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdfast.pipeline.task import TrainingTask
from xdfast.robot.vla import CompactVLA, VLABatch

__all__ = ["VLATask"]


class VLATask(TrainingTask):
    """The loss of a VLA.

    Args:
        vla: what learns; its normalisation is fitted.
        draws: of noise and diffusion step per sample, where it learns by diffusion.
    """

    student: CompactVLA
    unit = "samples"

    def __init__(self, vla: CompactVLA, draws: int = 8) -> None:
        super().__init__(vla)
        self.draws = draws

    def parameter_groups(self, config: Any) -> list[dict[str, Any]]:
        """The encoder, at its own rate, and the rest."""
        encoder = [p for p in self.student.encoder.parameters() if p.requires_grad]
        mine = {id(p) for p in encoder}
        rest = [p for p in self.student.parameters() if id(p) not in mine and p.requires_grad]
        rate = config.lr if config.encoder_lr is None else config.encoder_lr
        return [
            {"params": rest, "lr": config.lr, "weight_decay": config.weight_decay},
            {"params": encoder, "lr": rate, "weight_decay": config.weight_decay},
        ]

    def inputs(self, batch: VLABatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pictures and actions."""
        return batch.images.to(device, non_blocking=True), batch.actions.to(device, non_blocking=True)

    def teach(self, images: Tensor, batch: VLABatch) -> dict[str, Tensor]:
        return {
            "state": batch.state.to(images.device, non_blocking=True),
            "instruction": batch.instruction.to(images.device, non_blocking=True),
        }

    def forward(
        self, images: Tensor, targets: Tensor | None, state: Tensor | None = None, instruction: Tensor | None = None
    ) -> dict[str, Tensor]:
        # every rank has rows in every step: see MultiTaskLoader
        assert targets is not None and state is not None and instruction is not None
        vla = self.student
        tokens = vla.layers(vla.tokens(vla.features(images), state, instruction))
        return {"loss": vla.chunk_loss(tokens, targets, self.draws)}
