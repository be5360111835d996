"""Randomness as a function of numbers, not of history.

Every random choice of the data side is drawn from ``hash64(seed, epoch, id, …)``: no stream is advanced, so the number of
workers, the batch size and the place where a run was resumed cannot change a pixel.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["hash64", "hash_int", "hash_name", "preserved_rng", "reseed", "uniform"]

_MASK = (1 << 64) - 1


def _splitmix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*keys: int | np.ndarray) -> np.ndarray:
    """64 well-mixed bits of the keys, element by element.

    Args:
        keys: integers (any sign and size; the low 64 bits count) or integer arrays ``[N]``. Their order matters.

    Returns:
        uint64 array, 0-d if every key is a plain integer, else ``[N]``.
    """
    value = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        for key in keys:
            bits = key.astype(np.uint64) if isinstance(key, np.ndarray) else np.uint64(int(key) & _MASK)
            value = _splitmix(value ^ _splitmix(bits))
    return value


def hash_int(*keys: int) -> int:
    """``hash64`` of plain integers as a Python integer, without numpy's overhead on single values."""
    value = 0
    for key in keys:
        value = _splitmix_int(value ^ _splitmix_int(int(key) & _MASK))
    return value


def _splitmix_int(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(bits: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 bits of ``hash64``."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash_name(seed: int, name: str, purpose: str) -> int:
    """64 bits of (seed, name); ``purpose`` keeps two uses of the same name independent."""
    text = f"{int(seed)}\0{purpose}\0{name}".encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@contextmanager
def preserved_rng(device: torch.device | None = None) -> Iterator[None]:
    """Puts the global generators of ``random``, ``numpy`` and ``torch`` back as found, also after an exception.

    Args:
        device: a CUDA device whose generator is kept as well (its state lives on the host: no synchronisation).
    """
    python, numpy_, torch_ = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    cuda = _cuda_generator(device)
    cuda_state = cuda.get_state() if cuda is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)
        torch.default_generator.set_state(torch_)
        if cuda is not None:
            cuda.set_state(cuda_state)


def reseed(seed: int, device: torch.device | None = None) -> None:
    """Seeds the global generators from 64 bits; use inside :func:`preserved_rng`.

    ``torch.manual_seed`` is avoided on purpose: it would also reseed every CUDA device.
    """
    seed = int(seed) & _MASK
    random.seed(seed)
    np.random.seed(hash_int(seed) & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    cuda = _cuda_generator(device)
    if cuda is not None:
        cuda.manual_seed(seed)


def _cuda_generator(device: torch.device | None) -> Any:
    if device is None or device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
