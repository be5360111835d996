"""Which implementation of an op runs, and why: a ladder that explains itself.

Each op lists its backends in order of preference for a device. The first that is available for the tensor at hand
runs; ``xdfast.backend("torch")`` or the environment variable ``XDFAST_BACKEND`` forces one, and a forced backend that
cannot run is an error, never a silent fallback. ``xdfast doctor`` prints :func:`explain`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from xdfast.errors import nearest

__all__ = ["Backend", "OpReport", "Rung", "backend", "explain", "forced", "register_table", "select"]

log = logging.getLogger("xdfast")

#: The only mutable state of the package: the backend forced by the user, for the whole process.
_forced: str | None = os.environ.get("XDFAST_BACKEND") or None
_tables: dict[str, tuple[Backend, ...]] = {}
_announced: set[tuple[str, str, str]] = set()


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: ``"reference"``, ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.
        available: maps a device type (``"cpu"``, ``"cuda"``, …) to (can it run there, the reason in words).
        run: the implementation: a function, or an object with several.
        automatic: False for a backend that runs only when forced (with the reason in ``available``).
    """

    name: str
    available: Callable[[str], tuple[bool, str]]
    run: Any
    automatic: bool = True


@dataclass(frozen=True)
class Rung:
    """One step of the ladder as :func:`explain` reports it."""

    backend: str
    available: bool
    reason: str
    chosen: bool


@dataclass(frozen=True)
class OpReport:
    """The ladder of one op on one device type."""

    op: str
    device: str
    rungs: tuple[Rung, ...]


def register_table(op: str, backends: Sequence[Backend]) -> None:
    """Sets the ladder of ``op``, best first."""
    _tables[op] = tuple(backends)


def forced() -> str | None:
    """The backend forced by :func:`backend` or ``XDFAST_BACKEND``, or None."""
    return _forced


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Forces one backend for every op called inside the block (process-wide, not per thread).

    Args:
        name: ``"reference"`` (the equation, literally), ``"torch"``, ``"cpp"``, ``"triton"``; None restores the ladder.

    Raises:
        ValueError: no op has a backend of that name.
        RuntimeError: raised by the op itself if the backend cannot run on the tensor's device.

    Example:
        >>> import torch, xdfast
        >>> with xdfast.backend("reference"):
        ...     loss = xdfast.rsd_loss(torch.randn(8, 4), torch.randn(8, 4))
    """
    global _forced
    _check_name(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def _check_name(name: str | None) -> None:
    import xdfast.ops  # noqa: F401  (fills the tables)

    known = sorted({b.name for table in _tables.values() for b in table})
    if name is not None and name not in known:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(known)}.{nearest(name, known)}")


def select(op: str, device: str) -> Backend:
    """The backend that runs ``op`` on ``device`` now.

    Raises:
        ValueError: ``XDFAST_BACKEND`` names no backend.
        RuntimeError: the forced backend cannot run there; the message says why and what can.
    """
    table = _tables[op]
    if _forced is not None:
        _check_name(_forced)
        for candidate in table:
            if candidate.name == _forced:
                ok, reason = candidate.available(device)
                if ok:
                    return candidate
                others = [b.name for b in table if b.available(device)[0]]
                raise RuntimeError(
                    f"backend {_forced!r} was forced but cannot run xdfast::{op} on {device}: {reason}. "
                    f"Backends that can: {', '.join(others)}; or unset XDFAST_BACKEND / leave xdfast.backend(...)"
                )
        raise RuntimeError(f"xdfast::{op} has no backend {_forced!r}; it has {', '.join(b.name for b in table)}")
    for candidate in table:
        if candidate.automatic:
            ok, reason = candidate.available(device)
            if ok:
                key = (op, device, candidate.name)
                if key not in _announced:
                    _announced.add(key)
                    log.debug("xdfast::%s on %s runs backend %r (%s)", op, device, candidate.name, reason)
                return candidate
    raise RuntimeError(f"no backend of xdfast::{op} can run on {device}; `xdfast doctor` says why")


def explain(devices: Sequence[str] | None = None) -> list[OpReport]:
    """The ladder of every op on every device type of this machine, with reasons.

    Args:
        devices: device types; default: the CPU, and CUDA if there is one.
    """
    import xdfast.ops  # noqa: F401  (fills the tables)

    devices = devices or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    reports = []
    for op, table in sorted(_tables.items()):
        for device in devices:
            try:
                chosen = select(op, device).name
            except (RuntimeError, ValueError):
                chosen = ""
            rungs = tuple(Rung(b.name, *b.available(device), chosen=b.name == chosen) for b in table)
            reports.append(OpReport(op, device, rungs))
    return reports
