"""Hugging Face decoder layers as residual branches around their own modules, and key-value caches with fixed gates.

Nothing is imported from transformers: a layer is known by the names of its parts, and :func:`xdfast.nn.route` compares the
converted model with the original before it hands it out.
"""

from __future__ import annotations

import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.nn.branches import Branch, MLPBranch, ModuleBranch
from xdfast.nn.convert_timm import Chained, Described, Macs, activation_name
from xdfast.nn.steps import CACHES, RoutedBlocks
from xdfast.ops.route import RouteList

__all__ = ["CacheRoute", "RoutedDecoder", "check_version", "decoder_branches", "first_of_each_kind"]

#: Arguments of a decoder layer with one row per sequence (or one for all), and those that pass as they are.
_PER_SEQUENCE = ("attention_mask", "position_ids", "position_embeddings")
_AS_THEY_ARE = (
    *CACHES, "use_cache", "cache_position", "output_attentions", "output_hidden_states", "return_dict",
    "num_items_in_batch",
)  # fmt: skip


def decoder_branches(layer: nn.Module) -> Described | None:
    """The branches of a pre-norm decoder layer (Llama, Qwen, SmolLM, Mistral, Phi-3, Gemma; norms after a branch as in Gemma 2
    or OLMo 2 too), or None."""
    has = set(dict(layer.named_children()))
    parts: Any = layer
    if not {"self_attn", "mlp", "post_attention_layernorm"} <= has:
        return None
    if {"input_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"} <= has:
        norms = (parts.input_layernorm, parts.pre_feedforward_layernorm)
        after = ([parts.post_attention_layernorm], [parts.post_feedforward_layernorm])
    elif "post_feedforward_layernorm" in has and "input_layernorm" not in has:
        norms = (None, None)
        after = ([parts.post_attention_layernorm], [parts.post_feedforward_layernorm])
    elif "input_layernorm" in has:
        norms, after = (parts.input_layernorm, parts.post_attention_layernorm), ([], [])
    else:
        return None
    for rest, name in zip(after, ("resid_attn_dropout", "resid_mlp_dropout")):
        rest += [getattr(parts, name)] if name in has else []
    config = getattr(parts.self_attn, "config", None)
    heads: Any = getattr(config, "num_attention_heads", None) or getattr(parts.self_attn, "num_heads", 0)
    macs = Macs(parts.self_attn, attention=heads * (getattr(parts.self_attn, "head_dim", None) or 0))
    attention = SequenceBranch(norms[0], _Attention(parts.self_attn, after[0]), macs_per_row=macs)
    return Described(
        (attention, _mlp(norms[1], parts.mlp, after[1])),
        next(parts.post_attention_layernorm.parameters()).shape[-1],
        (*_PER_SEQUENCE, *_AS_THEY_ARE),
    )


def check_version(layer: nn.Module) -> None:
    """Decoders of transformers 4 return tuples or collect hidden states in ways that change from release to release.

    Raises:
        ImportError: a layer of transformers before 5.
    """
    if not type(layer).__module__.startswith("transformers."):
        return
    version = str(getattr(sys.modules.get("transformers"), "__version__", "5"))
    if int(version.partition(".")[0]) < 5:
        raise ImportError(f'routed decoders need transformers 5, this is {version}: pip install "transformers>=5"')


def first_of_each_kind(config: Any, layers: int) -> tuple[int, ...]:
    """The first layer of each kind of attention: a model reads its cache's length, and the sizes of its masks, from them."""
    kinds = getattr(config, "layer_types", None) or [""] * layers
    return tuple(sorted({kinds.index(kind) for kind in kinds[:layers]}))


class SequenceBranch(ModuleBranch):
    """Attention of listed sequences: of masks, positions and the like it passes on their rows."""

    def _call(self, y: Tensor, route: RouteList, tokens: int, context: dict[str, Any]) -> Tensor:
        if route.units is None:
            raise RuntimeError("executor='list' does not tell the host which sequences run; use 'planned' or 'auto'")
        sequences = route.index.numel()
        if route.units < sequences:
            rows = route.index[: route.units].long()
            context = {name: _chosen(name, value, rows, sequences) for name, value in context.items()}
        return super()._call(y, route, tokens, context)


def _chosen(name: str, value: Any, rows: Tensor, sequences: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_chosen(name, part, rows, sequences) for part in value)
    if name not in _PER_SEQUENCE or value is None:
        return value
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} is a {type(value).__name__}, of which no rows can be taken; use attn_implementation='sdpa' or 'eager'"
        )
    if value.shape[0] == 1 or value.dim() < 2:
        return value
    if value.shape[0] != sequences:
        raise ValueError(f"{name} has shape {list(value.shape)}, expected {sequences} sequences or 1 first")
    return value.index_select(0, rows)


class _Attention:
    def __init__(self, attn: nn.Module, after: list[nn.Module]) -> None:
        self.attn, self.after = attn, after

    def __call__(self, y: Tensor, **context: Any) -> Tensor:
        y = self.attn(hidden_states=y, **context)[0]
        for module in self.after:
            y = module(y)
        return y


def _mlp(norm: nn.Module | None, mlp: Any, after: list[Any]) -> Branch:
    """SwiGLU behind a plain RMSNorm as routed products; any other by calling it."""
    act = activation_name(getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None))
    inner: Any = None
    if act == "silu" and all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
        inner = (mlp.gate_proj, mlp.up_proj)
    elif act == "silu" and all(hasattr(mlp, name) for name in ("gate_up_proj", "down_proj")):
        inner = mlp.gate_up_proj
    linears = [*(inner if isinstance(inner, tuple) else (inner,)), getattr(mlp, "down_proj", None)]
    if all(type(m) is nn.Linear for m in linears) and all(isinstance(m, nn.Dropout) for m in after):
        try:
            return MLPBranch(norm, inner, "swiglu", mlp.down_proj, whole=[mlp, *after])
        except ValueError:  # a norm that multiplies by 1 + weight, or another that is not plain
            pass
    return ModuleBranch(norm, Chained(mlp, after), rowwise=True, macs_per_row=Macs(mlp))


class RoutedDecoder(RoutedBlocks):
    """Routed layers of a decoder: the gates of a sequence are fixed when its prompt is read, and kept with the cache.

    A layer that a sequence skips holds none of its keys, one that it takes holds all of them, so decoding a token is one
    full pass over the sequence with the same gates, cut in pieces. The gates live on the cache object.

    Raises:
        ValueError: in use: gates that differ from those the cache was filled with, another number of sequences than in the
            cache, a cache that another model filled.
    """

    def begin(
        self, x: Tensor, gates: Tensor | None, mask: Tensor | None, context: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, str]:
        cache = next((context[name] for name in CACHES if context.get(name) is not None), None)
        held: CacheRoute | None = getattr(cache, "xdfast_route", None)
        if cache is not None and int(cache.get_seq_length()) > 0:
            return self._continued(x, gates, held)
        if mask is None and gates is None:
            mask = _real_tokens(context.get("attention_mask"), x)
        gates, probabilities, executor = super().begin(x, gates, mask, context)
        if executor == "list":
            raise RuntimeError("executor='list' does not tell the host which sequences run; use 'planned' or 'auto'")
        if cache is not None:
            CacheRoute(cache, gates.detach(), self.active(gates), executor == "dense_mask")
        return gates, probabilities, executor

    def _continued(self, x: Tensor, given: Tensor | None, held: CacheRoute | None) -> tuple[Tensor, Tensor | None, str]:
        if held is None or held.gates.shape[1] != self.num_layers:
            raise ValueError(
                "the KV cache was filled without this routed model, so nobody knows which layers hold which sequences; "
                "start with an empty cache"
            )
        if held.gates.shape[0] != x.shape[0]:
            raise ValueError(f"the KV cache holds {held.gates.shape[0]} sequences, the input has {x.shape[0]}")
        if given is not None:
            differs = self.active(self._forced_on(self._checked(given, x))) != held.active
            if bool(differs.any()):
                sequence, layer = differs.nonzero()[0, :2].tolist()
                word = "off" if held.active[sequence, layer].any() else "on"
                raise ValueError(
                    f"layer {layer} cannot be turned {word} for sequence {sequence} in mid-sequence: the KV cache was filled "
                    "with other gates, and a layer holds all of a sequence's keys or none; start with an empty cache"
                )
        executor, _ = self.choose(x)
        if held.dense:
            executor = "dense_mask"  # all layers hold keys of all sequences
        elif executor == "dense_mask":
            executor = "planned"
        return held.gates, None, executor


class CacheRoute:
    """What a cache must remember: the gates of its sequences. It also keeps rows and gates together when beams are reordered.

    Attributes:
        gates: [B, L, S].
        active: which of them are on, bool [B, L, S].
        dense: every layer holds keys of all sequences (``dense_mask`` filled it).
    """

    def __init__(self, cache: Any, gates: Tensor, active: Tensor, dense: bool) -> None:
        # weak: a cycle would keep keys (and in training their graph) alive until the next garbage collection
        self.cache = weakref.ref(cache)
        self.gates, self.active, self.dense = gates, active, dense
        cache.xdfast_route = self
        # a cache believes that all its layers hold the same sequences; these three would take wrong rows
        for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
            if hasattr(cache, name):
                setattr(cache, name, types.MethodType(getattr(CacheRoute, name), self))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence j becomes what sequence ``beam_idx[j]`` was."""
        self._each(beam_idx, lambda layer, rows: layer.reorder_cache(rows))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences ``indices``."""
        self._each(indices, lambda layer, rows: layer.batch_select_indices(rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times, next to each other."""
        for layer in self._layers():
            layer.batch_repeat_interleave(repeats)
        self.gates, self.active = (t.repeat_interleave(repeats, 0) for t in (self.gates, self.active))

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheRoute:
        twin = CacheRoute.__new__(CacheRoute)
        memo[id(self)] = twin
        # a copy of the cache is being made, and is known by now
        twin.cache = weakref.ref(memo.get(id(self.cache()), self.cache()))
        twin.gates, twin.active, twin.dense = self.gates.clone(), self.active.clone(), self.dense
        return twin

    def _layers(self) -> list[Any]:
        cache: Any = self.cache()
        return cache.layers

    def _each(self, chosen: Tensor, move: Callable[[Any, Tensor], None]) -> None:
        chosen = chosen.to(self.gates.device)
        for number, layer in enumerate(self._layers()):
            active = self.active[:, number, 0]  # attention is the first branch
            active = torch.ones_like(active) if self.dense else active
            place = active.long().cumsum(0) - 1
            if getattr(layer, "is_initialized", True):
                move(layer, place[chosen[active[chosen]]])
        self.gates, self.active = self.gates[chosen], self.active[chosen]


def _real_tokens(mask: Any, x: Tensor) -> Tensor | None:
    """[B, T] bool of what is no padding, as an attention mask over the prompt tells; None: all."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ValueError(
            f"routed decoders read padding from a tensor [B, T] or [B, 1, T, T], got {type(mask).__name__}; use "
            "attn_implementation='sdpa' or 'eager'"
        )
    if mask.dim() == 4:  # a key that no query may look at is padding
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = allowed[:, 0].any(-2)
    return mask[:, : x.shape[1]].bool().expand(x.shape[0], -1)
