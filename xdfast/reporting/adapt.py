"""Any image model as a plain function of tensors, in eval mode, on inputs made for it."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "TensorsOut",
    "check_size",
    "device_name",
    "eval_mode",
    "example_images",
    "model_dtype",
    "network",
    "out_of_memory",
    "own_image_size",
    "run_once",
]

_DEFAULT_SIZE = 224


class TensorsOut(nn.Module):
    """Calls a network and gives its output as a flat tuple of tensors: tracing knows no dataclasses."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(_tensors(self.net(*inputs)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def network(model: nn.Module) -> nn.Module:
    """The network inside a wrapper that resizes and normalises (``.net`` and ``.prepare``), else the model itself.

    Raises:
        TypeError: not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    inner = getattr(model, "net", None)
    return inner if isinstance(inner, nn.Module) and callable(getattr(model, "prepare", None)) else model


def own_image_size(model: nn.Module) -> int:
    """The size a model was built for, in pixels: its ``image_size``, timm's patch grid or config; 224 if it names none."""
    if isinstance(getattr(model, "image_size", None), int):
        return int(model.image_size)  # type: ignore[arg-type]
    net = network(model)
    grid = getattr(getattr(net, "patch_embed", None), "img_size", None)
    if isinstance(grid, (tuple, list)):
        return int(grid[-1])
    facts = getattr(net, "pretrained_cfg", None) or {}
    return int((facts.get("input_size") or (3, 0, _DEFAULT_SIZE))[-1])


def check_size(name: str, value: Any) -> int:
    """``value`` if it is a positive whole number.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number ≥ 1, got {value!r}")
    return value


def model_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point type of the weights; float32 if there are none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def example_images(net: nn.Module, image_size: int, batch_size: int, device: torch.device | None = None) -> Tensor:
    """``[B, 3, S, S]`` noise as a normalised image would be, in the network's precision and on its device."""
    where = device or next((p.device for p in net.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size, generator=generator)
    return images.to(where, model_dtype(net))


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine ran out of memory (on the CPU, torch has no class of its own for it)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def device_name(place: torch.device) -> str:
    """What a human calls the device: the GPU's or the processor's name."""
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            named = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        named = []
    return f"{named[0] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards each sub-module is back in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def run_once(name: str, net: nn.Module, inputs: tuple[Any, ...], image_size: int | None, own_size: int) -> None:
    """One forward pass, so that a wrong size is told in our words and not in a tracer's.

    Raises:
        ValueError: the network cannot take these inputs.
    """
    try:
        with torch.no_grad():
            net(*inputs)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        if out_of_memory(error):  # nothing is wrong with the size
            raise
        if image_size is None:
            raise ValueError(f"{name} cannot run on the given inputs: {error}") from error
        raise ValueError(
            f"{name} cannot run with image_size={image_size} (images [B, 3, {image_size}, {image_size}]); it was built for "
            f"{own_size}: {error}"
        ) from error
