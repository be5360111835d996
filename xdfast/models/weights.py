"""Weights files of others: reading them without running code, and saying what does not fit."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from xdfast.models.checkpoint import CheckpointError

__all__ = ["fetch_failed", "read_weights", "state_dict_misfit"]

#: Where training code keeps the network in its checkpoints; timm knows state_dict, model and their EMA forms itself.
_WRAPPERS = ("teacher", "student", "net", "network", "backbone", "weights")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Name → tensor from a .safetensors, .pt or .pth file; wrappers (``state_dict``, ``model``, ``module.``) are taken off.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: damaged, or it holds no tensors by name.
    """
    from safetensors import SafetensorError
    from timm.models import load_state_dict

    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    try:
        # weights_only: a pickle must not run code, whatever the default
        state: Any = load_state_dict(str(path), use_ema=True, weights_only=True)
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        AttributeError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} cannot be read as weights ({first}); it is damaged, cut short, or holds more than tensors "
            "(save it again as {name: tensor} with safetensors.torch.save_file)"
        ) from error
    for wrapper in _WRAPPERS:
        inner = state.get(wrapper)
        if isinstance(inner, dict) and any(isinstance(value, Tensor) for value in inner.values()):
            state = {name.removeprefix("module."): value for name, value in inner.items()}
            break
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors by name; its keys are {sorted(map(str, state))[:8]}")
    return tensors


def state_dict_misfit(name: str, source: str, error: Exception) -> str:
    """load_state_dict's long list, cut to what tells the architectures apart."""
    text = str(error)
    parts = []
    for title, pattern in (
        ("missing", r"Missing key\(s\) in state_dict: (.*?)\.\s"),
        ("not known to it", r"Unexpected key\(s\) in state_dict: (.*?)\.\s"),
    ):
        found = re.search(pattern, text + " ", re.DOTALL)
        if found:
            keys = re.findall(r'"([^"]+)"', found.group(1))
            parts.append(f"{len(keys)} {title} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})")
    sizes = re.findall(
        r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)", text, re.DOTALL
    )
    if sizes:
        key, there, here = sizes[0]
        parts.append(f"{len(sizes)} of another shape ({key}: {there} in the file, {here} in the model)")
    facts = "; ".join(parts) or text.splitlines()[0]
    return f"the weights in {source} do not fit {name}: {facts}. They belong to another architecture or other options"


def fetch_failed(name: str, error: Exception) -> Exception:
    """What to raise when the published weights of a timm name cannot be had."""
    import timm

    base = name.partition(".")[0]
    if "No pretrained weights" in str(error) or "Invalid pretrained tag" in str(error):
        tags = timm.list_pretrained(f"{base}.*")
        known = f"there are {', '.join(tags)}" if tags else "none are published for this architecture"
        return ValueError(
            f"{name}: {error}. Of published weights {known}; or give a file: {base}@/path/to/weights; or pretrained=False"
        )
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ConnectionError(
        f"the published weights of {name} could not be fetched ({reason}). Either connect this machine to the Hugging Face hub "
        f"(or fill its cache: `hf download timm/{name}` where there is a connection, then copy ~/.cache/huggingface), or pass a "
        f"local file: {base}@/path/to/weights.safetensors"
    )
