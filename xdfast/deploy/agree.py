"""Do an exported file and PyTorch say the same? Compared on inputs of several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from xdfast.deploy.errors import ExportError
from xdfast.deploy.graph import Graph

__all__ = ["Parity", "measure_parity"]


@dataclass(frozen=True)
class Parity:
    """Differences between a file and eager PyTorch, in float32.

    Attributes:
        max_abs: the largest |a − b| over all outputs.
        max_rel: the largest |a − b| over the largest |b| of the same output.
        tolerance: both sides agree if |a − b| ≤ tolerance · max(1, largest |b|) everywhere.
        agrees: whether they do.
        batches: sizes that were compared, each with ``draws`` inputs.
        outputs: name → its max_abs.
    """

    max_abs: float
    max_rel: float
    tolerance: float
    agrees: bool
    batches: tuple[int, ...]
    draws: int
    outputs: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "batches": list(self.batches)}


def measure_parity(
    graph: Graph,
    call: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
    device: torch.device,
    *,
    batches: Sequence[int],
    tolerance: float,
    draws: int = 2,
) -> Parity:
    """Runs both on the same inputs.

    Args:
        graph: with the eager module.
        call: what was loaded.
        device: of both.
        batches: sizes; a graph of a fixed size takes 1.
        tolerance: see :class:`Parity`.
        draws: inputs for each size.

    Raises:
        ExportError: shapes differ, the eager outputs are not finite, or the file cannot be run at one of the sizes.
    """
    worst: dict[str, float] = {port.name: 0.0 for port in graph.outputs}
    relative, agrees = 0.0, True
    for batch in batches:
        for draw in range(draws):
            inputs = graph.inputs_for(batch, device, seed=draw)
            expected = graph.run_eager(inputs)
            try:
                found = call(inputs)
            except Exception as error:  # whatever the runtime raises
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise ExportError(f"the exported {graph.name} does not run at batch {batch}: {first}") from error
            for port, a, b in zip(graph.outputs, found, expected):
                if a.shape != b.shape:
                    raise ExportError(
                        f"the exported {graph.name} gives {port.name} {list(a.shape)} at batch {batch}, PyTorch {list(b.shape)}"
                    )
                if not b.isfinite().all():
                    raise ExportError(
                        f"{graph.name} itself gives {port.name} that is not finite at batch {batch}; look at its weights"
                    )
                difference, largest = (a.double() - b.double()).abs(), float(b.abs().max())
                # NaN compares as false: it counts as infinitely far
                far = float(difference.nan_to_num(nan=float("inf")).max())
                worst[port.name] = max(worst[port.name], far)
                relative = max(relative, far / largest if largest > 0 else far)
                agrees = agrees and far <= tolerance * max(1.0, largest)
    return Parity(max(worst.values()), relative, tolerance, agrees, tuple(batches), draws, worst)
