"""A policy on disk: ``policy.safetensors`` and ``policy.json``, enough to rebuild it without the run it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from xdfast._version import __version__
from xdfast.models import create_model
from xdfast.models.checkpoint import CheckpointError, atomic_write
from xdfast.robot.encoder import rebuild_encoder
from xdfast.robot.policy import DiffusionPolicy, PolicySpec

__all__ = ["load_policy", "save_policy"]

WEIGHTS_FILE = "policy.safetensors"
SPEC_FILE = "policy.json"


def save_policy(policy: DiffusionPolicy, folder: str | Path, *, extra: dict[str, Any] | None = None) -> Path:
    """Writes weights (normalisation of states and actions included) and spec; each file whole or not at all.

    Args:
        policy: what to save.
        folder: made if missing.
        extra: JSON-able facts to keep, such as settings and metrics.

    Raises:
        CheckpointError: the files cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in policy.state_dict().items()}
    atomic_write(folder / WEIGHTS_FILE, lambda aside: save_file(tensors, aside, metadata={"format": "pt"}))
    text = json.dumps({"xdfast": __version__, "spec": policy.spec.to_dict(), **(extra or {})}, indent=2)
    atomic_write(folder / SPEC_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
    return folder


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
    folder = Path(folder).expanduser()
    if (folder / "policy" / SPEC_FILE).is_file():
        folder = folder / "policy"
    file = folder / SPEC_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no policy in {folder} (no {SPEC_FILE}); pass the folder of a policy's run")
    try:
        spec = PolicySpec.from_dict(json.loads(file.read_text(encoding="utf-8"))["spec"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}: {error}); copy or train it again") from error
    model = (
        rebuild_encoder(spec.encoder) if encoder is None else create_model(encoder, image_size=spec.encoder.image_size)
    )
    policy = DiffusionPolicy(spec, model)
    weights = folder / WEIGHTS_FILE
    try:
        state = load_file(weights)
    except FileNotFoundError:
        raise FileNotFoundError(f"{weights} is missing; the folder holds only the spec of a policy") from None
    except Exception as error:  # safetensors has an error class of its own
        raise CheckpointError(f"{weights} is damaged ({error}); copy or train it again") from error
    try:
        policy.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(f"{weights} does not fit {file.name}: {first[0].strip()}") from error
    return policy.to(device).eval()
