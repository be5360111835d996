"""What a Hugging Face style VLA refuses, and why."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from xdfast.robot.vla.hf_spec import BINS, HuggingFaceSpec

__all__ = ["check_values", "check_vocabulary"]


def check_vocabulary(spec: HuggingFaceSpec, ids: int, words: Any) -> None:
    """Whether the tokenizer's ids, the spec's and the action ids have their places in an embedding.

    Raises:
        ValueError: one has not.
    """
    known = words.num_embeddings
    if ids > known:
        raise ValueError(
            f"the tokenizer has {ids} ids, the backbone {known} (vocab_size); take the backbone's own tokenizer"
        )
    for name, number in {"begin": spec.begin or 0, "suffix": max(spec.suffix, default=0)}.items():
        if not 0 <= number < known:
            raise ValueError(f"{name} must be an id below vocab_size ({known}), got {number}")
    if spec.head != "bins":
        return
    last, own = spec.last_bin or known, len(spec.vocabulary)
    if not BINS <= last <= known or last - BINS < own:
        raise ValueError(
            f"head='bins' needs {BINS} ids of {known} before last_bin={last} that are no words (there are {own}); make "
            "vocab_size larger"
        )
    if words.padding_idx is not None and last - BINS <= words.padding_idx < last:
        raise ValueError(f"padding has id {words.padding_idx}, which is an action id ({last - BINS} to {last - 1})")


def check_values(state: Tensor | None, instruction: Tensor, known: int, pad: int) -> None:
    """Looks at the values, for which a GPU has to be waited.

    Raises:
        ValueError: a state that is not finite, ids outside the vocabulary, an instruction of padding alone.
    """
    if state is not None and not state.isfinite().all():
        raise ValueError("the state is not finite (NaN or infinity)")
    real = instruction != pad
    strange = real & ((instruction < 0) | (instruction >= known))
    if bool(strange.any()):
        raise ValueError(
            f"instruction ids must be 0 to {known - 1} (the vocabulary) or {pad} (padding), got "
            f"{int(instruction[strange][0])}"
        )
    if not bool(real.any(-1).all()):
        rows = (~real.any(-1)).nonzero().flatten().tolist()
        raise ValueError(f"the instructions of samples {rows[:8]} are empty (padding alone); say in words what to do")
