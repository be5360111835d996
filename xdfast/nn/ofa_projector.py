"""OFA's projectors: a student's stage in the space of logits (arXiv 2310.19444)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["OFAProjector"]


class OFAProjector(nn.Module):
    r"""A branch from a stage of the student to class logits; used in training only.

    *Maps* [C, H, W]: a separable convolution of stride 2 (twice depthwise 3×3, pointwise, BatchNorm, ReLU) for each halving
    that remains to ``final_side``, each doubling the channels but the last, which gives max(d_s, d_t); none remaining, one 1×1
    convolution to that width. Mean over places, linear classifier.

    *Tokens* [T, D] or [H, W, D]: for each halving a patch merging (2×2 patches side by side, LayerNorm, linear to d_s; GELU
    but after the last of several), then ``blocks`` transformer blocks of width d_s with 4 heads, and a linear classifier of
    the class token or, where there is none, of the mean. Other widths than d_s that no merging changes get a linear map.

    Args:
        shape: of the stage's output without the batch, ``(C, H, W)``, ``(T, D)`` or, H = W ≠ D, ``(H, W, D)``.
        num_classes: C of the logits.
        student_features: d_s, width of the student's penultimate features.
        teacher_features: d_t, the teacher's.
        blocks: transformer blocks; the paper has max(4 − stage, 1) at stages 1 to 4.
        prefix_tokens: class and register tokens among T.
        final_side: places per side in the end: 7 for images of 224.

    Shape:
        input [N, *shape], output [N, num_classes]. Maps in training: N ≥ 2 (batch statistics).

    Raises:
        ValueError: a size < 1, a shape of another kind, tokens that are no square; in use an input of another shape, or
            N < 2 for maps in training.

    Reference:
        Hao et al., "One-for-All: Bridge the Gap Between Heterogeneous Architectures in Knowledge Distillation", NeurIPS 2023,
        arXiv 2310.19444; sizes of the branches as in its public code.

    Example:
        >>> import torch, xdfast
        >>> xdfast.nn.OFAProjector((64, 28, 28), 10, 256, 384)(torch.randn(2, 64, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        shape: Sequence[int],
        num_classes: int,
        student_features: int,
        teacher_features: int,
        *,
        blocks: int = 1,
        prefix_tokens: int = 0,
        final_side: int = 7,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        named = {
            "num_classes": num_classes, "student_features": student_features, "teacher_features": teacher_features,
            "blocks": blocks, "final_side": final_side,
        }  # fmt: skip
        for name, value in named.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if len(self.shape) not in (2, 3) or min(self.shape) < 1:
            raise ValueError(f"shape must be (C, H, W), (T, D) or (H, W, D), got {self.shape}")
        self.of_maps = len(self.shape) == 3 and not (self.shape[0] == self.shape[1] != self.shape[2])
        if self.of_maps:
            self.branch: nn.Module = _map_branch(self.shape, max(student_features, teacher_features), final_side)
            width = max(student_features, teacher_features)
        else:
            self.branch = _TokenBranch(self.shape, student_features, blocks, prefix_tokens, final_side)
            width = student_features
        self.classifier = nn.Linear(width, num_classes)
        self.apply(_initialise)

    def forward(self, stage: Tensor) -> Tensor:
        if tuple(stage.shape[1:]) != self.shape:
            raise ValueError(f"OFAProjector expects [N, {', '.join(map(str, self.shape))}], got {list(stage.shape)}")
        if self.of_maps and self.training and len(stage) < 2:
            raise ValueError(
                "OFAProjector needs at least 2 samples in training (batch normalisation), got 1; use drop_last=True"
            )
        return self.classifier(self.branch(stage))


def _halvings(side: int, final_side: int) -> int:
    return max(int(math.log2(side / final_side)), 0) if side > final_side else 0


def _map_branch(shape: tuple[int, ...], width: int, final_side: int) -> nn.Sequential:
    channels, halvings = shape[0], _halvings(min(shape[1:]), final_side)
    layers: list[nn.Module] = []
    for index in range(halvings):
        made = width if index == halvings - 1 else 2 * channels
        layers.append(_separable(channels, made))
        channels = made
    if not halvings:
        layers.append(nn.Conv2d(channels, width, 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _separable(channels: int, made: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for out, stride in ((channels, 2), (made, 1)):
        layers += [
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.Conv2d(channels, out, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class _TokenBranch(nn.Module):
    """Merging, blocks, class token or mean: [N, T, D] or [N, H, W, D] → [N, width]."""

    def __init__(self, shape: tuple[int, ...], width: int, blocks: int, prefix_tokens: int, final_side: int) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        self.prefix_tokens = prefix_tokens if len(shape) == 2 else 0
        places = shape[0] * shape[1] if len(shape) == 3 else shape[0] - self.prefix_tokens
        self.side = math.isqrt(max(places, 0))
        if self.side < 1 or self.side**2 != places:
            raise ValueError(
                f"{shape[0]} tokens, {self.prefix_tokens} of them without a place, are no square image; name a stage that "
                "keeps all patches"
            )
        given, halvings = shape[-1], _halvings(self.side, final_side)
        # Tokens without a place are not merged: they need the blocks' width before.
        lifted = given != width and (self.prefix_tokens > 0 or halvings == 0)
        self.lift = nn.Linear(given, width) if lifted else nn.Identity()
        given = width if lifted else given
        self.merge = nn.ModuleList(
            _Merge(given if index == 0 else width, width, index == 0 or index < halvings - 1)
            for index in range(halvings)
        )
        heads = next(heads for heads in (4, 3, 2, 1) if width % heads == 0)
        self.blocks = nn.Sequential(*(Block(dim=width, num_heads=heads) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x.flatten(1, 2) if x.dim() == 4 else x)
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        patches = patches.unflatten(1, (self.side, self.side))
        for merge in self.merge:
            patches = merge(patches)
        patches = patches.flatten(1, 2)
        if not self.prefix_tokens:
            return self.blocks(patches).mean(1)
        return self.blocks(torch.cat((prefix, patches), 1))[:, 0]


class _Merge(nn.Module):
    """2×2 patches side by side, LayerNorm, linear: [N, H, W, D] → [N, H/2, W/2, width]; odd sides are padded by zeros."""

    def __init__(self, dim: int, width: int, active: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, width, bias=False)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        n, h, w, d = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, d).permute(0, 1, 3, 4, 2, 5).reshape(n, h // 2, w // 2, 4 * d)
        x = self.reduce(self.norm(x))
        return F.gelu(x) if self.active else x


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)
