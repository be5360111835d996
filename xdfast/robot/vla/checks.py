"""What every VLA refuses: states, instructions and actions of another shape or kind than its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["check_actions", "check_told"]


def check_told(spec: Any, state: Tensor, instruction: Tensor, rows: int, *, proprioception: bool = True) -> None:
    """Shapes and dtypes of states (not where the policy does without) and instructions.

    Raises:
        ValueError: another one.
    """
    if proprioception and list(state.shape) != [rows, spec.n_obs, spec.state_dim]:
        raise ValueError(f"expected state [{rows}, {spec.n_obs}, {spec.state_dim}], got {list(state.shape)}")
    if list(instruction.shape) != [rows, spec.text_length]:
        raise ValueError(
            f"expected instruction ids [{rows}, {spec.text_length}], got {list(instruction.shape)}; "
            "vla.tokenizer.encode_all(sentences, vla.spec.text_length) makes them"
        )
    if instruction.dtype != torch.int64:
        raise ValueError(f"expected instruction ids of int64, got {instruction.dtype}")


def check_actions(spec: Any, actions: Tensor, rows: int) -> None:
    """Demonstrated actions.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    wanted = [rows, spec.horizon, spec.action_dim]
    if list(actions.shape) != wanted:
        raise ValueError(f"expected actions {wanted}, got {list(actions.shape)}")
    if not actions.isfinite().all():
        bad = (~actions.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise ValueError(f"actions are not finite (NaN or infinity) in samples {bad[:8]}; check the demonstrations")
