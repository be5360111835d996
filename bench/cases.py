"""Inputs of the benchmarks, with their floors: FLOPs and bytes that no implementation can avoid."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["RSD_CASES", "RSDCase"]


@dataclass(frozen=True)
class RSDCase:
    """Two embeddings of N samples and D features; a gradient for the first, or for both.

    Attributes:
        n, d: N and D.
        both: whether both inputs get a gradient (Barlow Twins) or only the student (distillation).
    """

    n: int
    d: int
    both: bool = False

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """student [N, D] that requires a gradient, teacher [N, D] that does if ``both``."""
        generator = torch.Generator().manual_seed(0)
        student = torch.randn(self.n, self.d, generator=generator)
        teacher = 0.5 * student + torch.randn(self.n, self.d, generator=generator)
        student, teacher = student.to(device, dtype), teacher.to(device, dtype)
        return student.requires_grad_(), teacher.requires_grad_(self.both)

    @property
    def flops(self) -> int:
        """Products of loss and gradients in the cheaper order, 2 FLOPs per multiply-add, symmetry not exploited."""
        one = 4 * self.n * self.d * min(self.n, self.d)
        return min(8 * self.n**2 * self.d, 6 * self.n * self.d**2) if self.both else one

    def bytes(self, size: int = 4) -> int:
        """Read both inputs, write the gradients; ``size`` bytes an element."""
        return (4 if self.both else 3) * self.n * self.d * size

    def __str__(self) -> str:
        return f"{self.n}x{self.d}" + ("-both" if self.both else "")


_SHAPES = [
    (128, 100),
    (128, 768),
    (128, 1000),
    (256, 1024),
    (128, 2048),
    (256, 4096),
    (512, 768),
    (1024, 768),
    (4096, 512),
    (1024, 8192),
]

RSD_CASES = [RSDCase(n, d, both) for both in (False, True) for n, d in _SHAPES]
