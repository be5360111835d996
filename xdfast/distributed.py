"""``torchrun`` in a few lines: process group, rank, and what every rank must agree on."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

__all__ = [
    "all_equal",
    "any_rank",
    "barrier",
    "broadcast",
    "device_for_rank",
    "init",
    "is_main",
    "rank",
    "sum_over_ranks",
    "world_size",
]


def init() -> None:
    """Joins the process group that ``torchrun`` describes in the environment; does nothing in a single process."""
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl")
        else:
            dist.init_process_group("gloo")


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    """True on rank 0, the one that writes files and talks."""
    return rank() == 0


def barrier() -> None:
    """Waits for all ranks; does nothing in a single process."""
    if _active():
        dist.barrier()


def broadcast(tensors: list[torch.Tensor]) -> None:
    """Gives every rank the values of rank 0, in place; does nothing in a single process."""
    if _active():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)


def device_for_rank(device: str) -> torch.device:
    """``"auto"`` → this rank's GPU, or the CPU; ``"cuda"`` under ``torchrun`` → this rank's GPU; anything else as written.

    Raises:
        RuntimeError: a CUDA device is asked for and there is none.
    """
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"device {device!r} was asked for but torch {torch.__version__} sees no CUDA device; "
            "use device='cpu' (`xdfast doctor` shows the devices)"
        )
    return torch.device(device)


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Element-wise sum over ranks (float64 where the device has it)."""
    if not _active():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def any_rank(value: bool) -> bool:
    """Whether ``value`` holds on any rank; every rank gets the same answer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return sum_over_ranks([float(value)], device)[0] > 0


def all_equal(value: Any, what: str) -> None:
    """Every rank must hold the same ``value``.

    Raises:
        RuntimeError: they differ; the message lists what each rank holds.
    """
    if _active():
        held: list[Any] = [None] * world_size()
        dist.all_gather_object(held, value)
        if any(other != held[0] for other in held):
            raise RuntimeError(
                f"ranks disagree on {what}: {dict(enumerate(held))}; start every rank with the same command and files"
            )
