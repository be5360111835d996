"""Where in an image encoder Grad-CAM looks: the spatial map of a CNN, or the tokens of a ViT laid out as one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xdfast.errors import nearest
from xdfast.models.features import FeatureModel

__all__ = ["SpatialLayer", "find_layer", "tapped"]

#: A map of fewer cells a side tells only which third of the picture matters: ResNet-18's last one has 3 x 3 at 84 px.
LEAST_SIDE = 5


@dataclass(frozen=True)
class SpatialLayer:
    """A place in an encoder that keeps positions.

    Attributes:
        name: of the module in ``encoder.net``.
        layout: ``"NCHW"`` or ``"NHWC"`` output of a module, or ``"tokens"``: the input ``[B, P + h·w, C]`` of a ViT's block.
        side: h = w, cells.
        prefix: P tokens that are no place in the picture (class token, registers).
    """

    name: str
    layout: Literal["NCHW", "NHWC", "tokens"]
    side: int
    prefix: int = 0


@torch.no_grad()
def find_layer(encoder: FeatureModel, name: str | None = None, *, least_side: int = LEAST_SIDE) -> SpatialLayer:
    """The layer for Grad-CAM; one pass over two grey pictures tells the shapes.

    CNN: the last module (in order of execution) whose output is a map of at least ``least_side`` x ``least_side`` cells; the
    last map at all where none is that large. ViT: the input of the last block. Its output will not do: what the class token
    reads from the patches it reads inside that block, so the gradient at the patches behind it is zero.

    Args:
        encoder: in the state in which it is used.
        name: of a module in ``encoder.net`` instead, such as ``"layer4"``; of a ViT a block, such as ``"blocks.3"``.
        least_side: cells.

    Raises:
        ValueError: no such module, or none with a spatial output.
    """
    net: nn.Module = encoder.net
    modules = dict(net.named_modules())
    if name is not None and name not in modules:
        raise ValueError(f"{encoder.name} has no module {name!r}.{nearest(name, [m for m in modules if m])}")
    blocks = getattr(net, "blocks", None)
    is_vit = isinstance(blocks, (nn.Sequential, nn.ModuleList)) and hasattr(net, "num_prefix_tokens")
    last = f"blocks.{len(blocks) - 1}" if is_vit and len(blocks) else None  # type: ignore[arg-type]
    seen: list[SpatialLayer] = []
    calls: dict[str, int] = {}

    def look(module_name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[module_name] = calls.get(module_name, 0) + 1
            found = _map_of(module_name, output)
            if found is not None and not isinstance(module, (nn.Dropout, nn.Softmax)):  # of attention: no places
                seen.append(found)

        return hook

    def look_tokens(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].ndim == 3:
            prefix = int(net.num_prefix_tokens)  # type: ignore[arg-type]
            side = math.isqrt(args[0].shape[1] - prefix)
            if side * side == args[0].shape[1] - prefix:
                seen.append(SpatialLayer(name or str(last), "tokens", side, prefix))

    chosen = name or last
    if last is not None and chosen is not None and chosen.rpartition(".")[0] == "blocks":
        handles = [modules[chosen].register_forward_pre_hook(look_tokens)]
    else:
        watched = {name: modules[name]} if name is not None else {n: m for n, m in modules.items() if n}
        handles = [module.register_forward_hook(look(n)) for n, module in watched.items()]
    try:
        weight = next(net.parameters(), torch.zeros(()))
        encoder(torch.full((2, 3, encoder.image_size, encoder.image_size), 0.5, device=weight.device))
    finally:
        for handle in handles:
            handle.remove()
    maps = [m for m in seen if calls.get(m.name, 1) == 1]  # a module used twice is no place of its own
    if not maps:
        what = f"module {name!r} of {encoder.name} gives no" if name else f"{encoder.name} has no module that gives a"
        raise ValueError(
            f"{what} map [B, C, h, h] (or a ViT's tokens on a square grid), which Grad-CAM needs; name another"
        )
    fine = [m for m in maps if m.side >= least_side]
    return (fine or [max(reversed(maps), key=lambda m: m.side)])[-1]


@contextmanager
def tapped(encoder: FeatureModel, layer: SpatialLayer) -> Iterator[nn.Module]:
    """A module that, while the context lasts, the layer's values pass through as ``[B, C, h, w]``, for captum to hook."""
    tap = nn.Identity()
    module = encoder.net.get_submodule(layer.name)

    def through_tokens(_: nn.Module, args: Any) -> Any:
        tokens: Tensor = args[0]
        kept, places = tokens[:, : layer.prefix], tokens[:, layer.prefix :]
        grid = tap(places.transpose(1, 2).unflatten(2, (layer.side, layer.side)))
        return (torch.cat([kept, grid.flatten(2).transpose(1, 2)], dim=1), *args[1:])

    def through_map(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        if layer.layout == "NHWC":
            return tap(output.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return tap(output)

    if layer.layout == "tokens":
        handle = module.register_forward_pre_hook(through_tokens)
    else:
        handle = module.register_forward_hook(through_map)
    try:
        yield tap
    finally:
        handle.remove()


def _map_of(name: str, output: Any) -> SpatialLayer | None:
    """What a module's output is a map of, for two pictures; None if it has no places."""
    if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[0] != 2:
        return None
    _, a, b, c = output.shape
    if b == c and b > 1:
        return SpatialLayer(name, "NCHW", b)
    return SpatialLayer(name, "NHWC", a) if a == b and a > 1 else None
