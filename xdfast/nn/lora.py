"""Low-rank adapters for linear maps, that routed layers understand: they stay ``nn.Linear`` and can be merged."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LoRALinear", "add_lora", "merge_lora"]


class LoRALinear(nn.Linear):
    r"""A linear map with a trainable change of low rank: :math:`y = W x + b + \frac{\alpha}{r} B A x`.

    W and b are frozen and shared with the map it is made from. B starts at 0: at first nothing changes. (``peft`` has this, but
    its layers are no ``nn.Linear``: :func:`xdfast.nn.route` would not find the maps in them.)

    Args:
        base: what is adapted; its parameters are taken over.
        rank: r.
        alpha: α; default: 2 r.

    Shape:
        [..., in] → [..., out]; A [r, in], B [out, r].

    Raises:
        ValueError: rank < 1 or larger than the map.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685.
    """

    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        if not 1 <= rank <= min(self.in_features, self.out_features):
            raise ValueError(
                f"the rank of an adapter must be 1 to {min(self.in_features, self.out_features)} for a map from "
                f"{self.in_features} to {self.out_features}, got {rank}"
            )
        base.requires_grad_(False)
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.scale = (2.0 * rank if alpha is None else alpha) / rank
        self.lora_a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.lora_a is None or self.lora_b is None:
            return y
        return y + F.linear(F.linear(x, self.lora_a), self.lora_b) * self.scale

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the change to W and lets go of A and B: a plain linear map, with the plain names in its state."""
        if self.lora_a is None or self.lora_b is None:
            return
        self.weight.add_((self.lora_b.float() @ self.lora_a.float() * self.scale).to(self.weight.dtype))
        self.lora_a = self.lora_b = None

    def extra_repr(self) -> str:
        rank = "merged" if self.lora_a is None else f"rank={len(self.lora_a)}"
        return f"{super().extra_repr()}, {rank}"


def add_lora(module: nn.Module, rank: int, alpha: float | None = None) -> int:
    """Replaces every linear map inside a module by a :class:`LoRALinear` and freezes the module's other parameters.

    To be called before :func:`xdfast.nn.route`: routed branches hold on to the maps they were made of.

    Returns:
        How many maps.

    Raises:
        ValueError: no linear map inside; a rank out of range.
    """
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]
    if not found:
        raise ValueError(f"{type(module).__name__} has no linear map to adapt")
    module.requires_grad_(False)
    for parent, name, child in found:
        setattr(parent, name, LoRALinear(child, rank, alpha))
    return len(found)


def merge_lora(module: nn.Module) -> nn.Module:
    """Merges every adapter inside a module, in place; its state then has the names it had before; returns it."""
    for child in module.modules():
        if isinstance(child, LoRALinear):
            child.merge()
    return module
