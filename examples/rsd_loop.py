"""A training loop in the style of the published RSD code: student, frozen teacher, projector, SGD with a cosine rate.

    python examples/rsd_loop.py
    torchrun --nproc-per-node 2 examples/rsd_loop.py      # the same loss, of the batches of both processes together

total = cross entropy + 0.1 · RSD(projector(student features), teacher features). In one process `statistics="global"` is the
same as the default; under torchrun it makes the loss and the gradient those of one process with the whole batch.
"""

from __future__ import annotations

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import xdfast
from xdfast import distributed


class Student(nn.Module):
    """Backbone and projector in one module: DDP averages the gradients of what is inside."""

    def __init__(self, backbone: nn.Module, teacher_width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = xdfast.AAD(backbone.num_features, teacher_width)  # training only: drop it afterwards

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.backbone.forward_features(x)
        features = self.backbone.forward_head(maps, pre_logits=True)
        return self.backbone.get_classifier()(features), self.projector(features)


def main(steps: int = 200, batch: int = 64) -> list[float]:
    """Distils a (here: untrained) ViT into a ResNet on sklearn's digits; returns the loss of every step."""
    distributed.init()
    torch.manual_seed(0)
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, 32).repeat(1, 3, 1, 1)
    labels = torch.tensor(digits.target)

    teacher = timm.create_model("test_vit", num_classes=0, img_size=32).eval().requires_grad_(False)
    student: nn.Module = Student(timm.create_model("test_resnet", num_classes=10), teacher.num_features)
    if distributed.world_size() > 1:
        student = DistributedDataParallel(student)
    criterion = xdfast.RSDLoss(kappa=0.01, weight=0.1, statistics="global")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    torch.manual_seed(1 + distributed.rank())  # from here on every rank draws its own samples
    losses = []
    for step in range(steps):
        rows = torch.randint(len(images), (batch,))
        with torch.no_grad():
            target = teacher(images[rows])
        logits, projected = student(images[rows])
        loss = F.cross_entropy(logits, labels[rows]) + criterion(projected, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 and distributed.is_main():
            print(f"step {step:4d}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
