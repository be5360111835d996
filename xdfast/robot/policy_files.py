"""A policy on disk: ``policy.safetensors`` and ``policy.json``, enough to rebuild it without the run it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdfast.models import create_model
from xdfast.robot.encoder import rebuild_encoder
from xdfast.robot.model_files import find_folder, load_weights, read_spec, write_model
from xdfast.robot.policy import DiffusionPolicy, PolicySpec

__all__ = ["load_policy", "save_policy"]

_NAME = "policy"


def save_policy(policy: DiffusionPolicy, folder: str | Path, *, extra: dict[str, Any] | None = None) -> Path:
    """Writes weights (normalisation of states and actions included) and spec; each file whole or not at all.

    Args:
        policy: what to save.
        folder: made if missing.
        extra: JSON-able facts to keep, such as settings and metrics.

    Raises:
        CheckpointError: the files cannot be written.
    """
    return write_model(policy, policy.spec.to_dict(), folder, _NAME, extra or {})


def load_policy(
    folder: str | Path, *, encoder: nn.Module | None = None, device: torch.device | str = "cpu"
) -> DiffusionPolicy:
    """A policy from the folder of a run, or from its ``policy/``; in eval mode.

    Args:
        folder: where it is.
        encoder: needed only if the policy was trained with a module of yours as its encoder.
        device: where it is put.

    Raises:
        FileNotFoundError: no policy there.
        CheckpointError: damaged files, or weights that do not fit the spec.
        ValueError: the encoder is a module of yours and was not passed.
    """
    folder = find_folder(folder, _NAME, "policy")
    spec = read_spec(folder / f"{_NAME}.json", PolicySpec.from_dict)
    model = (
        rebuild_encoder(spec.encoder) if encoder is None else create_model(encoder, image_size=spec.encoder.image_size)
    )
    policy = DiffusionPolicy(spec, model)
    load_weights(policy, folder / f"{_NAME}.safetensors", "policy")
    return policy.to(device).eval()
