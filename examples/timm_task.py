"""RSD inside a training task of timm: the task's own teacher, student, projection and DDP handling, another loss.

    python examples/timm_task.py

timm's FeatureDistillationTask pulls pooled features together with a mean squared error. Here its projection becomes AAD
and its loss RSD; `task.prepare_distributed()`, `task.compile()` and timm's training script see no difference.
"""

from __future__ import annotations

import timm
import torch
from sklearn.datasets import load_digits
from timm.task import FeatureDistillationTask
from torch import Tensor
from torch.nn import functional as F

import xdfast


class RSDTask(FeatureDistillationTask):
    """timm's feature distillation with `kd_loss` = RSD(AAD(student features), teacher features)."""

    def __init__(self, *args, criterion_kd: xdfast.RSDLoss, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        module = self.trainable_module
        module.projection = xdfast.AAD(module.student.num_features, self.teacher.model.num_features)
        self.criterion_kd = criterion_kd

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        logits, projected = self.trainable_module(input)
        with torch.no_grad():
            normalised = self.teacher.normalize_input(input, self.student_mean, self.student_std)
            features = self.teacher(normalised, return_features=True)
        task_loss, kd_loss = self.criterion(logits, target), self.criterion_kd(projected, features)
        total = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
        return {"loss": total, "output": logits, "task_loss": task_loss, "kd_loss": kd_loss}


def main(steps: int = 200, batch: int = 64) -> list[float]:
    """Distils a (here: untrained) ViT into a ResNet on sklearn's digits; returns the loss of every step."""
    torch.manual_seed(0)
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, 32).repeat(1, 3, 1, 1)
    labels = torch.tensor(digits.target)

    task = RSDTask(
        timm.create_model("test_resnet", num_classes=10),
        timm.create_model("test_vit", num_classes=10, img_size=32),  # yours: a trained teacher
        criterion=torch.nn.CrossEntropyLoss(),
        criterion_kd=xdfast.RSDLoss(),
        distill_loss_weight=0.1,
        verbose=False,
    )
    optimizer = torch.optim.AdamW(task.trainable_module.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        rows = torch.randint(len(images), (batch,))
        result = task(images[rows], labels[rows])
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(result["loss"].item())
        if step % 50 == 0:
            accuracy = (result["output"].argmax(1) == labels[rows]).float().mean()
            print(f"step {step:4d}  loss {losses[-1]:.3f}  kd {result['kd_loss'].item():.3f}  accuracy {accuracy:.2f}")
    return losses


if __name__ == "__main__":
    main()
