"""Checkpoint files that are whole or not there, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xdfast.atomic import write_whole

__all__ = ["CheckpointError", "atomic_write", "load_resume", "save_resume"]


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, or belongs to another model. The message names the file and the way out."""


def atomic_write(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Makes ``path`` hold what ``write(aside)`` puts into ``aside``, a file beside it; all of it, or nothing changes.

    Whatever stops the writing (disk full, a kill, an exception), an older file at ``path`` stays as it was.

    Raises:
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    try:
        write_whole(path, write)
    # torch.save reports a full disk as a RuntimeError, safetensors as an error of its own
    except (OSError, RuntimeError, _safetensors_error()) as error:
        kept = "; the file that was there before is unharmed" if path.exists() else ""
        raise CheckpointError(
            f"cannot write {path}: {error}{kept}. Free some space, or choose another folder"
        ) from error


def save_resume(path: str | Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values atomically.

    Raises:
        CheckpointError: the file cannot be written; an earlier one is unharmed.
    """
    atomic_write(path, lambda aside: torch.save(state, aside))


def load_resume(path: str | Path) -> dict[str, Any]:
    """What :func:`save_resume` wrote, on the CPU. Only tensors and plain values are read: no code in the file runs.

    Raises:
        CheckpointError: damaged, or not a file of this kind.
        FileNotFoundError: there is none.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle makes torch.load raise almost any type
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        raise CheckpointError(
            f"{path} is damaged or not a resume file ({reason}); delete it to start the run again"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path} is not a resume file (it holds a {type(state).__name__}); delete it to start the run again"
        )
    return state


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError
