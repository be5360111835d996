"""The layers of a transformers decoder as what a teacher VLA calls ``layers``: tokens in, tokens out, routed or not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xdfast._optional import require
from xdfast.nn.convert_hf import check_version, decoder_branches
from xdfast.nn.routed import Decision, RoutedStack
from xdfast.nn.routed_flops import RoutedFlops
from xdfast.ops.route import RoutePlan

__all__ = ["DecoderStack", "build_decoder", "config_of", "kept_layers"]


class DecoderStack(nn.Module):
    r"""A decoder of transformers without its last norm: ``[B, T, D]`` → ``[B, T, D]``, causal, with rotary positions.

    A layer of transformers needs positions, masks and sometimes a cache; the decoder around it makes them, so it is called, and
    ``stack[l]`` is the layer inside, whose output can be tapped. :func:`xdfast.nn.route` puts its routed stack into the decoder
    (``vla.route``), and everything here stays as it was.

    **Padding** travels with the tokens: a token whose D numbers are all 0 is padding. No other token sees it, positions do not
    count it, a router does not read it. So a stack needs no second argument, and states that were saved and come back
    (caches, measurements) mean the same.

    Args:
        model: of :func:`build_decoder`; taken over. Its last norm must have been taken off.

    Attributes:
        model: the decoder.
        norm: is not here: ``decode`` of the VLA has it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def __len__(self) -> int:
        return len(self.model.layers)

    def __getitem__(self, index: int) -> nn.Module:
        return self.model.layers[range(len(self))[index]]

    @staticmethod
    def real(tokens: Tensor) -> Tensor:
        """Which tokens are no padding, bool ``[B, T]``; also the ``mask`` of :class:`xdfast.nn.GraphEncapsulation`."""
        return (tokens != 0).any(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        real = self.real(tokens)
        return self._run(tokens, real, use_cache=False)

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, count: int, pick: Callable[[Tensor], Tensor], embed: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``count`` tokens after a prompt, each once, with a KV cache; a routed stack decides once, at the prompt.

        Its ``decision`` then is that of one pass over all tokens, which is what was computed.

        Args:
            prompt: ``[B, T, D]``; its last token is real.
            count: N.
            pick: last states ``[B, D]`` → ids int64 ``[B]``.
            embed: ids ``[B]`` → tokens ``[B, D]``.

        Returns:
            int64 ``[B, N]``.
        """
        transformers: Any = require("transformers", "vla", purpose="a KV cache")
        cache = transformers.DynamicCache(config=self.model.config)
        x, real, found, decided = prompt, self.real(prompt), [], None
        for number in range(count):
            states = self._run(x, real, past_key_values=cache, use_cache=True)
            decided = self.decision if number == 0 else decided
            found.append(pick(states[:, -1]))
            x = embed(found[-1])[:, None]
            real = torch.cat([real, real.new_ones(len(real), 1)], 1)
        stack = self.routed
        if stack is not None and decided is not None:
            if decided.plan is not None:
                like = prompt.new_empty(len(prompt), prompt.shape[1] + count - 1, 0)
                decided = dataclasses.replace(decided, plan=stack.plan(like, decided.gates))
            stack.decision = decided
        return torch.stack(found, 1)

    def _run(self, x: Tensor, real: Tensor, **options: Any) -> Tensor:
        positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
        output = self.model(inputs_embeds=x, attention_mask=real.long(), position_ids=positions, **options)
        return output.last_hidden_state

    # --- routed

    @property
    def routed(self) -> RoutedStack | None:
        """The routed stack inside, or None."""
        layers = self.model.layers
        return layers if isinstance(layers, RoutedStack) else None

    @property
    def decision(self) -> Decision | None:
        """What the last pass decided; None before it, and of a stack that is not routed."""
        return None if self.routed is None else self.routed.decision

    def flops(self, tokens: int, decided: RoutePlan | Decision | None = None) -> RoutedFlops:
        """As :meth:`xdfast.nn.RoutedStack.flops`.

        Raises:
            ValueError: it is not routed, or decided nothing yet.
        """
        if self.routed is None:
            raise ValueError("these layers are not routed; vla.route(target_flops) gives them gates")
        return self.routed.flops(tokens, decided)


def config_of(backbone: Any) -> dict[str, Any]:
    """A decoder's configuration as plain values.

    Raises:
        ValueError: neither a configuration of transformers nor a dictionary with ``model_type``.
    """
    if hasattr(backbone, "to_json_string"):
        text = backbone.get_text_config() if hasattr(backbone, "get_text_config") else backbone
        return json.loads(text.to_json_string())
    if isinstance(backbone, dict) and "model_type" in backbone:
        return dict(backbone)
    raise ValueError(
        f"backbone must be a configuration of transformers (such as LlamaConfig(...)) or its dictionary with model_type, got "
        f"{backbone!r:.80}"
    )


def build_decoder(config: dict[str, Any], layers: int = 0, dtype: torch.dtype | None = None) -> Any:
    """A decoder of transformers with random weights, without a language head.

    Args:
        config: of :func:`config_of`.
        layers: keep the first ones; 0: all.
        dtype: of the weights.

    Raises:
        ValueError: an unknown type, one whose layers cannot be routed, or fewer layers than asked for.
        ImportError: transformers is missing or older than 5.
    """
    transformers: Any = require("transformers", "vla", purpose="a Hugging Face VLA")
    options = {**config}
    kind = options.pop("model_type")
    try:
        made = transformers.AutoConfig.for_model(kind, **options)
        model = transformers.AutoModel.from_config(made, **({} if dtype is None else {"dtype": dtype}))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"transformers cannot build the backbone {kind!r}: {error}") from error
    return kept_layers(model, layers)


def kept_layers(model: Any, layers: int) -> Any:
    """The first layers of a decoder, checked to be what :func:`xdfast.nn.route` knows; changes the model.

    Raises:
        ValueError: no decoder whose layers can be routed, or fewer layers than asked for.
        ImportError: transformers before 5.
    """
    kind = type(model).__name__
    found = getattr(model, "layers", None)
    if not isinstance(found, nn.ModuleList) or not hasattr(model, "norm") or not hasattr(model, "embed_tokens"):
        raise ValueError(
            f"{kind} is no decoder with layers, norm and embed_tokens as in Llama (Qwen, SmolLM, Mistral, Gemma, Phi-3, OLMo 2), "
            "so it cannot be routed; take one of those as backbone"
        )
    strange = next((layer for layer in found if decoder_branches(layer) is None), None)
    if strange is not None:
        raise ValueError(
            f"{type(strange).__name__} is no pre-norm layer of attention and MLP that xdfast.route knows (Llama, Qwen, SmolLM, "
            "Mistral, Gemma, Phi-3, OLMo 2), so it cannot be routed; take one of those as backbone"
        )
    check_version(found[0])
    if layers > len(found):
        raise ValueError(f"{kind} has {len(found)} layers, asked for {layers}")
    if layers:
        model.layers = found[:layers]
        model.config.num_hidden_layers = layers
        kinds = getattr(model.config, "layer_types", None)
        if kinds:
            model.config.layer_types = kinds[:layers]
    return model
