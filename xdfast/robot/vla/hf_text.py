"""Instructions as ids: a tokenizer of transformers, or our own list of words, with a prompt around the sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xdfast.robot.vla.instructions import PAD, Tokenizer, words_of

__all__ = ["PromptTokenizer"]


class PromptTokenizer:
    """Sentences → int64 ``[B, T_text]``, padding in front, as the backbone of a :class:`xdfast.robot.vla.HuggingFaceVLA` reads
    them.

    Args:
        source: a tokenizer of transformers, or :class:`xdfast.robot.vla.Tokenizer`.
        prompt: what is read, with ``{instruction}``.
        suffix: ids after it.
        lower_case: of the instruction.

    Attributes:
        pad: id of padding: the tokenizer's own; -1 where it has none or uses it for something else (unknown words, the end).
    """

    def __init__(
        self, source: Any, prompt: str = "{instruction}", suffix: Sequence[int] = (), lower_case: bool = False
    ) -> None:
        self.source, self.prompt, self.suffix, self.lower_case = source, prompt, tuple(suffix), lower_case
        if isinstance(source, Tokenizer):
            self.pad = 0
            return
        if not callable(source) or not hasattr(source, "decode"):
            raise TypeError(
                f"tokenizer must be one of transformers (or xdfast.robot.vla.Tokenizer), got {type(source).__name__}"
            )
        pad = getattr(source, "pad_token_id", None)
        others = [getattr(source, f"{name}_token_id", None) for name in ("unk", "bos", "eos")]
        self.pad = -1 if pad is None or pad in others else int(pad)

    def __len__(self) -> int:
        return len(self.source)

    def encode(self, text: str, length: int) -> Tensor:
        """Ids of an instruction in its prompt, int64 ``[length]``.

        Raises:
            ValueError: no word in it, more tokens than ``length``, or (list of words) none that is known.
            TypeError: no string.
        """
        if not isinstance(text, str):
            raise TypeError(f"an instruction is a string, got {type(text).__name__}")
        if not words_of(text):
            raise ValueError(f"the instruction {text!r} is empty; say in words what to do")
        asked = self.prompt.replace("{instruction}", text.strip().lower() if self.lower_case else text.strip())
        if isinstance(self.source, Tokenizer):
            found = self.source.encode(asked, length - len(self.suffix))
            ids = found[found != 0].tolist()
        else:
            ids = [int(i) for i in self.source(asked, add_special_tokens=False)["input_ids"]]
        if not ids:
            raise ValueError(f"the tokenizer makes no token of {asked!r:.120}; it is not the backbone's")
        ids += self.suffix
        if len(ids) > length:
            raise ValueError(
                f"the instruction with its prompt has {len(ids)} tokens, the policy takes {length} (text_length): {text!r:.120}"
            )
        return torch.tensor([self.pad] * (length - len(ids)) + ids)

    def encode_all(self, texts: Sequence[str], length: int) -> Tensor:
        """Several sentences, int64 ``[B, length]``; errors as in :meth:`encode`."""
        if not texts:
            raise ValueError("there is no instruction to encode")
        return torch.stack([self.encode(text, length) for text in texts])

    def decode(self, ids: Any) -> str:
        """The words behind some ids, for people; without padding."""
        kept = [int(i) for i in ids if int(i) != self.pad]
        return self.source.decode(kept).replace(PAD, "").strip()
