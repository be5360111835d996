"""What is exported: a module from tensors to tensors, with the names, shapes and meanings of both ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BATCH", "Graph", "Port"]

#: The free size in a :class:`Port`'s shape.
BATCH = "batch"


@dataclass(frozen=True)
class Port:
    """An input or output.

    Attributes:
        name: the same in every format.
        shape: sizes; :data:`BATCH` where the size is free.
        dtype: such as ``"float32"``, ``"uint8"``, ``"int64"``.
        about: what the numbers mean, for whoever feeds them.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    about: str = ""

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape for a batch."""
        return tuple(batch if size == BATCH else int(size) for size in self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class Graph:
    """One file to be.

    Attributes:
        name: stem of its files.
        module: tensors → tuple of tensors, in eval mode, of its own: nothing else uses it.
        example: (batch, generator) → inputs on the CPU that look like the real ones.
        inputs, outputs: in the order of the module's.
        eager: what it is compared with; default: the module. Another one where the exported graph computes the same by other
            means, as layers under a condition do.
        facts: what a user has to know besides, JSON-able.
    """

    name: str
    module: nn.Module
    example: Callable[[int, torch.Generator], tuple[Tensor, ...]]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    eager: nn.Module | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def free_batch(self) -> bool:
        """Whether the number of samples is free."""
        return any(BATCH in port.shape for port in self.inputs)

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """For ``torch.export``: one symbol for every free size."""
        free = torch.export.Dim(BATCH, min=1)
        return tuple({i: free for i, size in enumerate(port.shape) if size == BATCH} for port in self.inputs)

    def inputs_for(self, batch: int, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
        """Example inputs on a device (of a graph of a fixed size: one sample); the same seed gives the same ones."""
        made = self.example(batch if self.free_batch else 1, torch.Generator().manual_seed(seed))
        return tuple(tensor.to(device) for tensor in made)

    def run_eager(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What PyTorch makes of the inputs."""
        with torch.no_grad():
            return (self.eager or self.module)(*inputs)
