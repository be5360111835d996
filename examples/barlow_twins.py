"""Barlow Twins as lightly's examples write it: backbone, projection head, two views; the loss is xdfast's.

    python examples/barlow_twins.py

With lightly installed the only line that changes in one's own script is the import of the loss:

    from lightly.loss import BarlowTwinsLoss      →      from xdfast import BarlowTwinsLoss

The same holds for VICRegLoss. Under torchrun, `BarlowTwinsLoss(gather_distributed=True)` averages the correlation matrices
of all ranks, as lightly's does; `statistics="global"` makes the batches of all ranks one.
"""

from __future__ import annotations

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast import BarlowTwinsLoss


class BarlowTwins(nn.Module):
    def __init__(self, backbone: nn.Module, width: int, dim: int = 256) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = nn.Sequential(
            nn.Linear(width, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(),
            nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(),
            nn.Linear(dim, dim),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))


def view(images: Tensor) -> Tensor:
    """A random shift, brightness and noise per image; yours: lightly's BYOLTransform or torchvision's v2."""
    n = len(images)
    angle = torch.eye(2, 3).repeat(n, 1, 1) * (0.8 + 0.4 * torch.rand(n, 1, 1))
    angle[:, :, 2] = 0.4 * torch.rand(n, 2) - 0.2
    grid = F.affine_grid(angle, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False)
    return moved * (0.7 + 0.6 * torch.rand(n, 1, 1, 1)) + 0.1 * torch.randn_like(moved)


def main(steps: int = 200, batch: int = 128) -> list[float]:
    """Trains on sklearn's digits without labels; returns the loss of every step."""
    torch.manual_seed(0)
    images = F.interpolate(torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16, 32)
    backbone = timm.create_model("test_resnet", num_classes=0, in_chans=1)
    model = BarlowTwins(backbone, backbone.num_features)
    criterion = BarlowTwinsLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    losses = []
    for step in range(steps):
        x = images[torch.randint(len(images), (batch,))]
        z0, z1 = model(view(x)), model(view(x))
        loss = criterion(z0, z1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:4d}  loss {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
