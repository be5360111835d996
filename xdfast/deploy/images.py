"""An image model as a graph: a classifier or encoder with its own normalisation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.deploy.graph import BATCH, Graph, Port
from xdfast.deploy.skipping import skip_layers
from xdfast.errors import nearest
from xdfast.models import FeatureModel
from xdfast.nn import routed_stacks

__all__ = ["OUTPUTS", "PIXELS", "image_graph"]

#: What the pictures are that an exported image model takes.
PIXELS = {
    "unit": "RGB in [0, 1]; the model's mean and std are inside",
    "uint8": "RGB from 0 to 255; the division by 255 and the model's mean and std are inside",
    "normalised": "RGB in [0, 1], minus mean, over std (see preprocessing), channel by channel",
}
OUTPUTS = {"features": "input of the classifier", "logits": "one per class, before the softmax"}


class _Images(nn.Module):
    """The model, its outputs as a tuple."""

    def __init__(self, model: FeatureModel, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, tuple(outputs)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        made = self.model(images)
        return tuple({"features": made.features, "logits": made.logits}[name] for name in self.outputs)


def image_graph(
    model: FeatureModel,
    *,
    pixels: str = "unit",
    outputs: Sequence[str] = (),
    classes: Sequence[str] = (),
    skip: bool = True,
) -> Graph:
    """A student for images ``[B, 3, S, S]`` of its own size S; resizing stays with the caller.

    The weights are copied, so that nothing of the model changes; everything is float32.

    Args:
        model: in any mode.
        pixels: ``"unit"``, ``"uint8"`` or ``"normalised"``: what it is given (:data:`PIXELS`).
        outputs: of ``"features"`` and ``"logits"``; default: both, or what the model has.
        classes: their names, for the record.
        skip: routed layers under conditions (batch 1), or computed and multiplied by their gates (any batch).

    Raises:
        ValueError: an unknown word, or logits of a model without a classifier.
    """
    if pixels not in PIXELS:
        raise ValueError(f"pixels must be one of {', '.join(PIXELS)}, got {pixels!r}.{nearest(pixels, PIXELS)}")
    has = ("features", "logits") if model.num_classes else ("features",)
    chosen = tuple(outputs) or has
    for name in chosen:
        if name not in OUTPUTS:
            raise ValueError(f"outputs are {' and '.join(OUTPUTS)}, got {name!r}.{nearest(name, OUTPUTS)}")
        if name not in has:
            raise ValueError(f"{model.name} has no classifier, so no logits; use outputs=('features',)")
    size = model.image_size
    mine = copy.deepcopy(model).cpu().float().eval()
    mine.requires_grad_(False)
    if pixels == "normalised":  # x − 0 over 1 is x to the bit
        mine._mean.zero_()
        mine._std.fill_(1)
    module = _Images(mine, chosen).eval()
    routed = bool(routed_stacks(module))
    batch: int | str = 1 if routed and skip else BATCH
    widths = {"features": model.num_features, "logits": model.num_classes}

    def example(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
        if pixels == "uint8":
            return (images,)
        unit = images.float() / 255
        return (unit if pixels == "unit" else (unit - _row(model.mean)) / _row(model.std),)

    facts: dict[str, Any] = {
        "kind": "image",
        "model": model.name,
        "preprocessing": {
            "input_size": [3, size, size],
            "resize": "to input_size by bicubic interpolation with antialiasing, before the model",
            "pixels": pixels,
            "mean": list(model.mean),
            "std": list(model.std),
            "normalisation": "stated: apply mean and std before the model" if pixels == "normalised" else "inside",
        },
        "num_features": model.num_features,
        "num_classes": model.num_classes,
        "classes": list(classes),
    }
    eager = None
    if routed:
        eager, module = module, copy.deepcopy(module)
        facts["routing"] = skip_layers(module, skip=skip)
    return Graph(
        name="model",
        module=module,
        eager=eager,
        example=example,
        inputs=(Port("images", (batch, 3, size, size), "uint8" if pixels == "uint8" else "float32", PIXELS[pixels]),),
        outputs=tuple(Port(name, (batch, widths[name]), "float32", OUTPUTS[name]) for name in chosen),
        facts=facts,
    )


def _row(values: Sequence[float]) -> Tensor:
    return torch.tensor(tuple(values)).view(1, 3, 1, 1)
