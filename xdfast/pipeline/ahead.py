"""Batches made ready for the student: on the device, augmented, with what the teacher says; on a GPU one step ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from xdfast.data import Batch

__all__ = ["CudaLane", "Lane", "Ready", "ahead", "lane_for"]


@dataclass
class Ready:
    """What a step needs.

    Attributes:
        batch: as it was read.
        images: float ``[B, 3, S, S]`` in [0, 1] on the device.
        targets: labels ``[B]``, or probabilities ``[B, C]``; None on a rank without rows.
        taught: what the teacher says, and whatever else the task's forward pass takes by name.
    """

    batch: Batch
    images: Tensor
    targets: Tensor | None
    taught: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """All of them that the step will use."""
        taught = [value for value in self.taught.values() if isinstance(value, Tensor)]
        return [self.images, *([] if self.targets is None else [self.targets]), *taught]


class Lane:
    """Where work ahead is done: at once, on the same queue."""

    def run(self, make: Callable[[], Ready]) -> tuple[Ready, Any]:
        """Starts the work; a token tells when it is done."""
        return make(), None

    def take(self, started: tuple[Ready, Any]) -> Ready:
        """The result, safe to use on the caller's queue."""
        return started[0]


class CudaLane(Lane):
    """A CUDA stream of its own: the teacher's kernels fill what the student's leave free. Nothing waits on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))  # the teacher's weights are there

    def run(self, make: Callable[[], Ready]) -> tuple[Ready, Any]:
        with torch.cuda.stream(self._stream):
            return make(), self._stream.record_event()

    def take(self, started: tuple[Ready, Any]) -> Ready:
        ready, done = started
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        for tensor in ready.tensors():
            tensor.record_stream(current)  # its memory belongs to the other stream's pool
        return ready


def ahead(
    batches: Iterable[Batch], make: Callable[[int, Batch], Ready], lane: Lane | None, start: int
) -> Iterator[Ready]:
    """``make(number, batch)`` of every batch, in order; with a lane the next one is started before this one is handed out.

    Args:
        batches: of an epoch.
        make: a function of its arguments alone, so that it does not matter when it runs.
        lane: where it runs ahead; None: nothing does.
        start: number of the first batch.
    """
    waiting: tuple[Ready, Any] | None = None
    for number, batch in enumerate(batches, start):
        if lane is None:
            yield make(number, batch)
            continue
        started = lane.run(lambda number=number, batch=batch: make(number, batch))  # type: ignore[misc]
        if waiting is not None:
            yield lane.take(waiting)
        waiting = started
    if lane is not None and waiting is not None:
        yield lane.take(waiting)


def lane_for(overlap: bool, device: torch.device) -> Lane | None:
    """The lane of a run: a stream of its own on a GPU if asked for, else none."""
    return CudaLane(device) if overlap and device.type == "cuda" else None
