"""The layers of a model, from its input to its features, whose outputs can be compared with another model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xdfast.models.features import FeatureModel

__all__ = ["FEATURES", "stage_names", "stage_outputs"]

#: What the input of the classifier is called among the stages; no module can have this name.
FEATURES = "pooled features"


@torch.no_grad()
def stage_names(model: FeatureModel, most: int = 16) -> list[str]:
    """Sub-modules of ``model.net`` in order of execution, ``"pooled features"`` (the input of the classifier) last.

    A timm model's stages are those of its ``feature_info``; of any other module, its children. A stage of several blocks stands
    for each of them (``layer1.0``, ``layer1.1``). Only what gives one tensor ``[B, ...]`` per pass is a stage.

    Args:
        model: one forward pass of two grey pictures tells the order; its mode is left as it was.
        most: more than this are thinned evenly; the first and the last stay.

    Raises:
        ValueError: ``most`` below 2.
    """
    if most < 2:
        raise ValueError(f"most must be ≥ 2 stages, got {most!r}")
    net: nn.Module = model.net
    modules = dict(net.named_modules())
    info = getattr(net, "feature_info", None)
    named = [entry["module"] for entry in info if entry.get("module") in modules] if isinstance(info, list) else []
    tops = named or [name for name, _ in net.named_children()]
    if not named and tops == ["blocks"]:
        tops = _blocks(modules, "blocks")
    wanted = {part for top in tops for part in _blocks(modules, top)}
    order: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and 2 <= output.ndim <= 4 and len(output) == 2:
                order.append(name)

        return hook

    was_training = model.training
    model.eval()
    handles = [modules[name].register_forward_hook(note(name)) for name in wanted]
    try:
        weight = next(net.parameters(), torch.zeros(()))
        model(torch.full((2, 3, model.image_size, model.image_size), 0.5, device=weight.device))
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    once = [name for name in order if order.count(name) == 1]
    classifier = model.classifier
    once = [name for name in once if modules[name] is not classifier]
    if len(once) > most - 1:
        once = [once[i] for i in np.linspace(0, len(once) - 1, most - 1).round().astype(int)]
    return [*once, FEATURES]


@contextmanager
def stage_outputs(
    model: FeatureModel, names: Sequence[str], reduce: Callable[[Tensor], Tensor]
) -> Iterator[Callable[[Tensor], list[Tensor]]]:
    """A function that passes images through the model and gives ``reduce(output)`` for each of the stages, in their order.

    What is reduced goes at once, within the pass: memory holds one layer's activations, not all of them.

    Args:
        model: its mode is left to the caller.
        names: from :func:`stage_names`.
        reduce: ``[B, ...]`` → what to keep of it.

    Raises:
        AttributeError: the model has no such module.
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            kept[name] = reduce(output)

        return hook

    def run(images: Tensor) -> list[Tensor]:
        kept.clear()
        features = model(images).features
        if FEATURES in names:
            kept[FEATURES] = reduce(features)
        return [kept[name] for name in names]

    handles = [model.net.get_submodule(name).register_forward_hook(keep(name)) for name in names if name != FEATURES]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def _blocks(modules: dict[str, nn.Module], name: str) -> list[str]:
    """The blocks of a stage: those of its ``blocks``, or its own children where it is a sequence; else itself."""
    inner = f"{name}.blocks" if f"{name}.blocks" in modules else name
    holder = modules[inner]
    children = [f"{inner}.{child}" for child, _ in holder.named_children()]
    return children if isinstance(holder, (nn.Sequential, nn.ModuleList)) and children else [name]
