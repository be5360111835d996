"""A policy's two files, whatever its kind: weights as safetensors, and its spec as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import nn

from xdfast._version import __version__
from xdfast.models.checkpoint import CheckpointError, atomic_write

__all__ = ["find_folder", "load_weights", "read_entry", "read_spec", "write_model"]

S = TypeVar("S")


def write_model(model: nn.Module, spec: dict[str, Any], folder: str | Path, name: str, extra: dict[str, Any]) -> Path:
    """Writes ``NAME.safetensors`` and ``NAME.json`` (version, spec, extra); each file whole or not at all.

    Raises:
        CheckpointError: the files cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    atomic_write(folder / f"{name}.safetensors", lambda aside: save_file(tensors, aside, metadata={"format": "pt"}))
    text = json.dumps({"xdfast": __version__, "spec": spec, **extra}, indent=2)
    atomic_write(folder / f"{name}.json", lambda aside: aside.write_text(text, encoding="utf-8"))
    return folder


def find_folder(folder: str | Path, name: str, what: str) -> Path:
    """The folder of ``NAME.json``: ``folder``, or ``NAME/`` in it.

    Raises:
        FileNotFoundError: it is in neither.
    """
    folder = Path(folder).expanduser()
    if (folder / name / f"{name}.json").is_file():
        folder = folder / name
    if not (folder / f"{name}.json").is_file():
        raise FileNotFoundError(f"no {what} in {folder} (no {name}.json); pass the folder of a {what}'s run")
    return folder


def read_spec(file: Path, make: Callable[[dict[str, Any]], S]) -> S:
    """``make`` of the spec in a JSON file.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return make(json.loads(file.read_text(encoding="utf-8"))["spec"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error}); copy or train it again") from error


def read_entry(file: Path, name: str) -> Any:
    """What :func:`write_model` was given as ``extra[name]``; None if it was not. The spec was read before, so the file is sound."""
    return json.loads(file.read_text(encoding="utf-8")).get(name)


def load_weights(model: nn.Module, file: Path, what: str) -> None:
    """Puts the weights of ``NAME.safetensors`` into a model that was built from ``NAME.json``.

    Raises:
        FileNotFoundError: the file is missing.
        CheckpointError: it is damaged, or does not fit the model.
    """
    try:
        state = load_file(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing; the folder holds only the spec of a {what}") from None
    except Exception as error:  # safetensors has an error class of its own
        raise CheckpointError(f"{file} is damaged ({error}); copy or train it again") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(f"{file} does not fit {file.stem}.json: {first[0].strip()}") from error
