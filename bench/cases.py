"""Inputs of the benchmarks, with their floors: FLOPs and bytes that no implementation can avoid."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["RSD_CASES", "RSDCase"]


@dataclass(frozen=True)
class RSDCase:
    """Student and teacher embeddings of N samples and D features; gradient for the student."""

    n: int
    d: int

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
        """student [N, D] that requires a gradient, teacher [N, D]."""
        generator = torch.Generator().manual_seed(0)
        student = torch.randn(self.n, self.d, generator=generator)
        teacher = 0.5 * student + torch.randn(self.n, self.d, generator=generator)
        return student.to(dtype).requires_grad_(), teacher.to(dtype)

    @property
    def flops(self) -> int:
        """The two products of loss and gradient in the cheaper order, 2 FLOPs per multiply-add."""
        return 4 * self.n * self.d * min(self.n, self.d)

    @property
    def bytes(self) -> int:
        """Read both inputs, write one gradient, fp32."""
        return 3 * self.n * self.d * 4

    def __str__(self) -> str:
        return f"{self.n}x{self.d}"


RSD_CASES = [
    RSDCase(128, 768),
    RSDCase(128, 2048),
    RSDCase(256, 4096),
    RSDCase(128, 100),
    RSDCase(512, 768),
    RSDCase(1024, 768),
]
