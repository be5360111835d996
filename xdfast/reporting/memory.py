"""Peak activation memory of one forward pass: measured, not estimated from layer sizes."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["CPU_METHOD", "CUDA_METHOD", "activation_bytes", "parameter_bytes"]

CPU_METHOD = "largest sum of live tensor storages made during one forward pass (a dispatch mode follows their lifetime)"
CUDA_METHOD = "torch.cuda.max_memory_allocated during one forward pass, minus what was allocated before it"


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def activation_bytes(net: nn.Module, images: Tensor) -> int:
    """Bytes that one forward pass needs at its worst moment, beside weights and input.

    On the CPU the scratch memory inside an operator is not seen; on CUDA it is.
    """
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
        torch.cuda.reset_peak_memory_stats(images.device)
        before = torch.cuda.memory_allocated(images.device)
        net(images)
        torch.cuda.synchronize(images.device)
        return torch.cuda.max_memory_allocated(images.device) - before
    known = [images, *net.parameters(), *net.buffers()]
    with _LiveStorages(known) as live:
        output = net(images)
    del output
    return live.peak


class _LiveStorages(TorchDispatchMode):
    """Adds each new storage when an operator returns it and takes it off when it is freed."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Weights and input are there anyway. Views share a storage, which counts once.
        self._seen: set[int] = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or size == 0:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        # torch keeps one Python object per storage alive as long as the storage itself.
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
