"""Reduced precision where the hardware has it, and float32, told, where it would only be slower."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

__all__ = ["autocast", "computed_precision", "cpu_computes"]

log = logging.getLogger("xdfast")


def autocast(config: Any, device: torch.device) -> Any:
    """The mixed precision of a run (``config.amp``), as a context; float32 on a CPU without instructions for it (told once)."""
    dtype = torch.bfloat16 if config.amp == "bf16" else torch.float16
    enabled = config.amp != "none" and (device.type != "cpu" or cpu_computes(config.amp))
    return torch.autocast(device.type, dtype=dtype, enabled=enabled)


def computed_precision(wanted: str, device: torch.device) -> tuple[str, torch.dtype | None]:
    """(name, dtype of the weights; None: as they are) in which a frozen teacher runs that should run in ``wanted``:
    ``"float32"``, ``"bf16"`` or ``"fp16"``."""
    if wanted == "float32" or (device.type == "cpu" and not cpu_computes(wanted)):
        return "float32", None
    return wanted, {"bf16": torch.bfloat16, "fp16": torch.float16}[wanted]


@functools.lru_cache
def cpu_computes(precision: str) -> bool:
    """Whether oneDNN has kernels for ``"bf16"`` or ``"fp16"`` here (x86: AVX-512, AMX). PyTorch's own, which would run
    instead, take ten times as long as float32: ResNet-18 at 84 px, 16 images forward and backward, 15 s instead of 1.5 s on
    one AVX2 core."""
    ask = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)  # a torch without oneDNN lacks it
    supported = ask is not None and bool(ask())
    if not supported:
        log.info(
            "%s: this CPU has no instructions for it, it would be slower than float32; computing in float32", precision
        )
    return supported
