"""A compact VLA on disk: ``vla.safetensors`` and ``vla.json``, enough to rebuild it without the run it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdfast.models import create_model
from xdfast.models.checkpoint import CheckpointError
from xdfast.robot.encoder import rebuild_encoder
from xdfast.robot.model_files import find_folder, load_weights, read_entry, read_spec, write_model
from xdfast.robot.vla.compact import CompactVLA
from xdfast.robot.vla.spec import VLASpec
from xdfast.robot.vla.students import rebuild_route, route_facts

__all__ = ["load_vla", "save_vla"]

_NAME = "vla"


def save_vla(vla: Any, folder: str | Path, *, extra: dict[str, Any] | None = None) -> Path:
    """Writes weights (normalisation included), spec and vocabulary; of a routed one its router; each file whole or not at all.

    Args:
        vla: what to save; of a :class:`xdfast.robot.vla.HuggingFaceVLA` the files are those of
            :func:`xdfast.robot.vla.save_hf_vla`.
        folder: made if missing.
        extra: JSON-able facts to keep, such as settings and metrics.

    Raises:
        ValueError: its router is of a class of yours.
        CheckpointError: the files cannot be written.
    """
    if not isinstance(vla, CompactVLA):
        from xdfast.robot.vla.hf_pretrained import save_hf_vla

        return save_hf_vla(vla, folder, extra=extra)
    routed = {"route": route_facts(vla)} if hasattr(vla, "xdfast_route") else {}
    return write_model(vla, vla.spec.to_dict(), folder, _NAME, {**(extra or {}), **routed})


def load_vla(folder: str | Path, *, encoder: nn.Module | None = None, device: torch.device | str = "cpu") -> Any:
    """A VLA from the folder of a run, or from its ``vla/``, routed if it was; in eval mode. A :class:`CompactVLA`, or what
    :func:`xdfast.robot.vla.save_hf_vla` wrote.

    Args:
        folder: where it is.
        encoder: needed only if the VLA was trained with a module of yours as its encoder; taken over.
        device: where it is put.

    Raises:
        FileNotFoundError: no VLA there.
        CheckpointError: damaged files, or weights that do not fit the spec.
        ValueError: the encoder is a module of yours and was not passed.
    """
    folder = Path(folder).expanduser()
    for place in (folder, folder / _NAME, folder / "hf_vla"):
        if (place / "hf_vla.json").is_file():
            from xdfast.robot.vla.hf_pretrained import load_hf_vla

            return load_hf_vla(place, device=device)
    folder = find_folder(folder, _NAME, "VLA")
    spec = read_spec(folder / f"{_NAME}.json", VLASpec.from_dict)
    if encoder is None and not spec.encoder.architecture:
        raise ValueError(
            f"the encoder of {folder} was a module of yours ({spec.encoder.source}), which timm cannot build; pass it: "
            "load_vla(folder, encoder=module)"
        )
    model = (
        rebuild_encoder(spec.encoder) if encoder is None else create_model(encoder, image_size=spec.encoder.image_size)
    )
    vla = CompactVLA(spec, model)
    options = read_entry(folder / f"{_NAME}.json", "route")
    if options is not None:
        try:
            rebuild_route(vla, options)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / _NAME}.json is damaged (route: {error}); copy or train it again"
            ) from error
    load_weights(vla, folder / f"{_NAME}.safetensors", "VLA")
    return vla.to(device).eval()
