"""Pictures as tokens: the grid of features inside any timm model, before it is pooled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xdfast.models import FeatureModel

__all__ = ["GridEncoder"]


class GridEncoder(nn.Module):
    """A timm model up to one of its feature maps, each cell of which is a token: patches of a ViT, places of a CNN.

    What comes after that map (pooling, and with ``level=-2`` the last stage) is removed, so that nothing is computed or
    trained in vain. The model is taken over, not copied.

    Args:
        encoder: of :func:`xdfast.robot.build_encoder`; its own normalisation and input size are kept.
        level: which of timm's feature maps: -1 the last, -2 the last but one (of a ResNet-18 at 84 px: 3 × 3 cells of 512
            numbers, and 6 × 6 of 256), and so on; of a ViT, the tokens after that block.

    Attributes:
        grid: (h, w) cells.
        channels: C.

    Shape:
        [N, 3, S, S] in [0, 1] → [N, h·w, C].

    Raises:
        ValueError: no timm model with feature maps, or no such level.
    """

    def __init__(self, encoder: FeatureModel, level: int = -1) -> None:
        super().__init__()
        net: Any = encoder.net
        if not hasattr(net, "forward_intermediates"):
            raise ValueError(
                f"{encoder.name} has no feature maps that timm knows (forward_intermediates), so its pictures cannot become "
                "tokens; use a timm model"
            )
        if level >= 0:
            raise ValueError(f"level counts from the last feature map: -1, -2, …; got {level}")
        self.encoder = encoder
        with torch.no_grad():
            count = len(self._maps(self._blank(), None))
            if -level > count:
                raise ValueError(
                    f"{encoder.name} has {count} feature maps, level={level} asks for one before the first"
                )
            self._index = count + level
            if hasattr(net, "prune_intermediate_layers"):
                net.prune_intermediate_layers([self._index], prune_head=True)
            found = self._maps(self._blank(), [self._index])[0]
        self.channels, self.grid = found.shape[1], (found.shape[2], found.shape[3])
        self._freeze_unused()

    @property
    def tokens(self) -> int:
        """h·w."""
        return self.grid[0] * self.grid[1]

    def forward(self, pixels: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder.frozen):
            return self._maps(pixels, [self._index])[0].flatten(2).transpose(1, 2)

    def _maps(self, pixels: Tensor, indices: list[int] | None) -> list[Tensor]:
        return self.encoder.net.forward_intermediates(
            self.encoder.prepare(pixels),
            indices=indices,
            norm=True,
            stop_early=indices is not None,
            output_fmt="NCHW",
            intermediates_only=True,
        )

    def _blank(self) -> Tensor:
        size = self.encoder.image_size
        weight = next(self.encoder.parameters(), None)
        return torch.zeros(1, 3, size, size, device=None if weight is None else weight.device)

    def _freeze_unused(self) -> None:
        """Weights that do not reach the map get no gradient, on which DistributedDataParallel would wait."""
        wanted = [p for p in self.parameters() if p.requires_grad]
        if not wanted:
            return
        with torch.enable_grad():
            reached = torch.autograd.grad(self(self._blank()).sum(), wanted, allow_unused=True)
        for parameter, gradient in zip(wanted, reached):
            parameter.requires_grad_(gradient is not None)
