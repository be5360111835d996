"""RSDLoss takes the place of the loss in a training loop of the public RSD code's style, and the curves stay equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import xdfast


class LiteralRSD(nn.Module):
    """The method's equations written out as research code has them: two BatchNorms, the D×D matrix, a mask over it."""

    def __init__(self, dim: int, kappa: float) -> None:
        super().__init__()
        # BatchNorm1d normalises by sqrt(var + eps); the paper's z adds ε to the std. With ε = 1e-5 and features of unit
        # scale the two differ by less than 1e-5, so eps is set for each to vanish.
        self.norm_s = nn.BatchNorm1d(dim, affine=False, eps=1e-12)
        self.norm_t = nn.BatchNorm1d(dim, affine=False, eps=1e-12)
        self.kappa = kappa

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        p = self.norm_t(teacher).T @ self.norm_s(student) / len(student)
        identity = torch.eye(p.shape[0], dtype=p.dtype)
        difference = (p - identity).pow(2)
        difference[~identity.bool()] *= self.kappa
        return difference.sum()


class XDFast(nn.Module):
    def __init__(self, dim: int, kappa: float) -> None:
        super().__init__()
        self.loss = xdfast.RSDLoss(kappa=kappa, eps=1e-12)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.loss(student, teacher)


class Student(nn.Module):
    """A small CNN with the projector of the method, written out: Linear, BatchNorm, ReLU, Linear."""

    def __init__(self, width: int, teacher_width: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, width, 3, 2, 1),
            nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.projector = nn.Sequential(
            nn.Linear(width, 2 * width), nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Linear(2 * width, teacher_width)
        )
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.fc(features), self.projector(features)


def train(make_loss, dim: int, steps: int, dtype: torch.dtype) -> list[float]:
    """total = ce + 0.1 · rsd, SGD with momentum and cosine rate, teacher under no_grad: the loop of the public code."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, dim, 4, 4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval().to(dtype)
    student = Student(32, dim, 10).to(dtype)
    criterion = make_loss(dim, 0.01).to(dtype)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images, labels = torch.randn(256, 3, 16, 16, dtype=dtype), torch.randint(10, (256,))
    curve = []
    for step in range(steps):
        rows = torch.randperm(256, generator=torch.Generator().manual_seed(step))[:64]
        with torch.no_grad():
            target = teacher(images[rows])
        logits, projected = student(images[rows])
        loss = F.cross_entropy(logits, labels[rows]) + 0.1 * criterion(projected, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
    return curve


# Below and above the batch size: the op takes the N×N and the D×D way.
@pytest.mark.parametrize("dim", [48, 192])
def test_equal_loss_curves_in_the_training_loop_of_the_public_code(dim) -> None:
    theirs, ours = (train(make, dim, 60, torch.float64) for make in (LiteralRSD, XDFast))
    assert theirs[-1] < 0.9 * theirs[0]  # it learns, so that equality says something
    # float64: only the order of the sums differs, and 60 steps of SGD amplify it little.
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-9, atol=0)


def test_equal_loss_curves_in_single_precision() -> None:
    theirs, ours = (train(make, 192, 60, torch.float32) for make in (LiteralRSD, XDFast))
    # float32: rounding (1e-7) grows over 60 steps; measured 2e-6.
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=0)
