"""The saved student: a folder that plain timm loads, ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from xdfast.models.checkpoint import atomic_write
from xdfast.models.features import FeatureModel

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "save_student", "weights_hash"]

log = logging.getLogger("xdfast")

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"

#: What timm needs to know to use the weights; the origin of the weights it started from is not among it.
_CFG_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "first_conv", "classifier", "fixed_input_size")


def save_student(
    model: FeatureModel, folder: str | Path, *, classes: list[str] | None = None, extra: dict[str, Any] | None = None
) -> Path:
    """Writes ``model.safetensors`` and ``config.json``.

    ``config.json`` is timm's: architecture, its arguments, normalisation, class names; what is xdfast's own stands under
    ``"xdfast"``. A network that timm cannot rebuild (a module of yours) is saved as weights alone, and the file says so, and from
    what code it came if it was named (``net.py:Net``).

    Args:
        model: only ``model.net`` is saved: no projector, no optimiser.
        folder: made if missing.
        classes: names of the C classes.
        extra: JSON-able facts to keep (settings, metrics).

    Raises:
        CheckpointError: the files cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    net = model.net
    # tied weights share memory, which safetensors refuses: each name gets a copy of its own
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in net.state_dict().items()}
    atomic_write(folder / WEIGHTS_FILE, lambda aside: save_file(tensors, aside, metadata={"format": "pt"}))
    text = json.dumps(_config(model, classes, extra), indent=2)
    atomic_write(folder / CONFIG_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
    return folder


def weights_hash(model: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and buffers: equal for equal weights on any device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _config(model: FeatureModel, classes: list[str] | None, extra: dict[str, Any] | None) -> dict[str, Any]:
    net = model.net
    facts: dict[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    own = {
        "image_size": model.image_size,
        "mean": model.mean,
        "std": model.std,
        "classes": classes or [],
        **(extra or {}),
    }
    architecture = facts.get("architecture")
    options = getattr(net, "xdfast_options", {})
    code = getattr(net, "xdfast_own", None)  # how `net.py:Net` was made; what timm would make of its name may differ
    if code or not architecture or not _rebuilds(architecture, net, options):
        kind = f"{type(net).__module__}.{type(net).__qualname__}"
        log.info("%s is not a model timm can rebuild: the weights are saved, the code stays yours", kind)
        made = {"own": code, "num_classes": model.num_classes} if code and _is_plain(code) else {}
        return {"xdfast": {**own, "module": kind, **made}}
    overlay = {key: facts[key] for key in _CFG_KEYS if facts.get(key) is not None}
    overlay |= {"input_size": (3, model.image_size, model.image_size), "mean": model.mean, "std": model.std}
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "pretrained_cfg": {**overlay, "num_classes": model.num_classes},
        "model_args": options,
        "xdfast": own,
    }
    if classes and len(classes) == model.num_classes:
        config["label_names"] = classes
    return config


def _is_plain(values: Any) -> bool:
    try:
        json.dumps(values)
    except (TypeError, ValueError):
        return False
    return True


def _rebuilds(architecture: str, net: nn.Module, options: dict[str, Any]) -> bool:
    """Whether ``timm.create_model(architecture, **options)`` has the same parameters.

    Asked on the meta device, for free; some models of older timm read values while they are built and need a real one.
    """
    import timm

    def build(device: str) -> nn.Module:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            return timm.create_model(architecture, num_classes=getattr(net, "num_classes", 0), **options)

    try:
        json.dumps(options)
        try:
            twin = build("meta")
        except RuntimeError:
            twin = build("cpu")
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return False
    return {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()}
