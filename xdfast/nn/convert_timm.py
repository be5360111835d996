"""timm's transformer and MLP blocks as residual branches, by pointing at their own modules."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xdfast.nn.branches import AttentionBranch, Branch, MLPBranch, ModuleBranch
from xdfast.ops.routed.reference import activate

__all__ = ["Described", "activation_name", "block_branches", "linear_macs", "whole_block"]

#: Keyword arguments that timm's attentions take besides their input and that are the same for every sample.
_SHARED = ("rope", "shared_rel_pos_bias")


class Described(NamedTuple):
    """A layer as residual branches.

    Attributes:
        branches: in order.
        dim: D.
        takes: keyword arguments that they understand.
    """

    branches: tuple[Branch, ...]
    dim: int
    takes: tuple[str, ...] = ()


def block_branches(block: nn.Module) -> Described | None:
    """The branches of a block with timm's names, or None: ``norm1, attn, norm2, mlp`` (ViT, DeiT, DINOv2, EVA, BEiT), MLP-Mixer,
    ResMLP and gMLP. Blocks of your own with these names are understood too."""
    has = set(dict(block.named_children()))
    if {"norm1", "attn", "norm2", "mlp"} <= has:
        attention, takes = _attention(block)
        after = _after(block, 2)
        mlp = _mlp(block.norm2, block.mlp, _scale(block, 2), after)  # type: ignore[arg-type]
        return Described((attention, mlp), _width(block.norm1, block), takes)  # type: ignore[arg-type]
    tokens = "mlp_tokens" if "mlp_tokens" in has else "linear_tokens"
    if {"norm1", tokens, "norm2", "mlp_channels"} <= has:
        drop = [block.drop_path] if "drop_path" in has else []
        mixing = getattr(block, tokens)
        inner = Chained(mixing, _known([_scale(block, 1), *drop]), transposed=True)
        width = _width(block.norm1, block)  # type: ignore[arg-type]
        first = ModuleBranch(block.norm1, inner, macs_per_row=Macs(mixing, width=width))  # type: ignore[arg-type]
        scale = _scale(block, 2)
        second = _mlp(block.norm2, block.mlp_channels, scale, _known([scale, *drop]))  # type: ignore[arg-type]
        return Described((first, second), width)
    if {"norm", "mlp_channels"} <= has and not {"attn", "norm1"} & has:
        inner = Chained(block.mlp_channels, [block.drop_path] if "drop_path" in has else [])  # type: ignore[arg-type]
        macs = Macs(block.mlp_channels)  # type: ignore[arg-type]
        only = ModuleBranch(block.norm, inner, macs_per_row=macs)  # type: ignore[arg-type]
        return Described((only,), _width(block.norm, block))  # type: ignore[arg-type]
    return None


def whole_block(block: nn.Module) -> tuple[Branch, ...]:
    """A block of any kind as one branch, f(x) = block(x) − x: for ``route(..., describe=whole_block)``.

    For blocks that map [B, T, D] to [B, T, D] and take whole samples; what is off is the identity. The difference costs one
    rounding of x, where branches given apart cost none.
    """
    return (ModuleBranch(None, _Change(block), macs_per_row=Macs(block)),)


def activation_name(act: Any) -> str | None:
    """Which of :data:`xdfast.ops.routed.ACTIVATIONS` a module or function computes, found by asking it; None: no one."""
    x = torch.linspace(-4, 4, 33)
    try:
        with torch.no_grad():
            y = act(x.clone())
    except (RuntimeError, TypeError, ValueError):  # it has parameters of its own, on another device or of another shape
        return None
    for name in ("gelu", "gelu_tanh", "silu", "relu", "none"):
        if torch.allclose(y, activate(x, name), rtol=0, atol=2e-6):
            return name
    return None


def linear_macs(module: nn.Module) -> int:
    """Multiply-accumulates per row of all linear maps in a module."""
    return sum(m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear))


class Macs:
    """Multiply-accumulates per row of a module called on samples with T tokens."""

    def __init__(self, module: nn.Module, *, width: int | None = None, attention: int = 0) -> None:
        self.module, self.width, self.attention = module, width, attention

    def __call__(self, tokens: int) -> int:
        own = linear_macs(self.module)
        # maps over the tokens run once per channel, and a row is a token
        return own * self.width // tokens if self.width is not None else own + 2 * tokens * self.attention


class Chained:
    """A module and what follows it up to the sum; keyword arguments reach the first alone, and only those it takes."""

    def __init__(
        self, first: nn.Module, rest: Sequence[Any], *, takes: Sequence[str] = (), transposed: bool = False
    ) -> None:
        self.first, self.rest, self.takes, self.transposed = first, list(rest), tuple(takes), transposed

    def __call__(self, y: Tensor, **context: Any) -> Tensor:
        known = {name: context[name] for name in self.takes if context.get(name) is not None}
        if known.get("rope") is not None and known["rope"].dim() == 4:
            raise ValueError("rotary embeddings that differ between samples cannot be routed; use images of one size")
        y = self.first(y.transpose(1, 2)).transpose(1, 2) if self.transposed else self.first(y, **known)
        for module in self.rest:
            y = module(y)
        return y


class Gamma:
    """A scale that is a parameter of the block itself, as LayerScale: ``gamma`` [D]."""

    def __init__(self, block: nn.Module, name: str) -> None:
        self.block, self.name = block, name

    @property
    def gamma(self) -> Tensor:
        return getattr(self.block, self.name)

    def __call__(self, y: Tensor) -> Tensor:
        return self.gamma * y


class _Change:
    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        return self.block(x, **context) - x


def _width(norm: nn.Module, block: nn.Module) -> int:
    found = next(norm.parameters(), None)
    if found is not None:
        return found.shape[-1]
    return next(m.in_features for m in block.modules() if isinstance(m, nn.Linear))


def _known(modules: Sequence[Any]) -> list[Any]:
    return [m for m in modules if m is not None and not isinstance(m, nn.Identity)]


def _scale(block: nn.Module, number: int) -> Any:
    """LayerScale of branch 1 or 2: a module, a parameter of the block, or None."""
    for name in (f"ls{number}", f"gamma_{number}"):
        found = getattr(block, name, None)
        if isinstance(found, nn.Parameter):
            return Gamma(block, name)
        if isinstance(found, nn.Module) and not isinstance(found, nn.Identity):
            return found
    return None


def _after(block: nn.Module, number: int) -> list[Any]:
    return _known([_scale(block, number), getattr(block, f"drop_path{number}", None)])


def _attention(block: Any) -> tuple[Branch, tuple[str, ...]]:
    attn, scale, after = block.attn, _scale(block, 1), _after(block, 1)
    linears = type(getattr(attn, "qkv", None)) is type(getattr(attn, "proj", None)) is nn.Linear
    if _is_timm(attn, "Attention") and linears and getattr(attn, "gate", None) is None:
        norms: dict[str, Any] = {
            name: None if isinstance(m, nn.Identity) else m for name, m in _inner_norms(attn).items()
        }
        try:
            branch = AttentionBranch(
                block.norm1, attn.qkv, attn.proj, attn.num_heads, scale=scale, whole=[attn, *after], **norms
            )
            return branch, ()
        except ValueError:  # an unknown norm
            pass
    parameters = inspect.signature(attn.forward).parameters
    takes = tuple(name for name in _SHARED if name in parameters)
    heads = getattr(attn, "num_heads", 0)
    width = heads * getattr(attn, "head_dim", 0) or _width(block.norm1, block)
    return ModuleBranch(block.norm1, Chained(attn, after, takes=takes), macs_per_row=Macs(attn, attention=width)), takes


def _inner_norms(attn: Any) -> dict[str, Any]:
    return {"q_norm": attn.q_norm, "k_norm": attn.k_norm, "between": getattr(attn, "norm", None)}


def _is_timm(module: nn.Module, name: str) -> bool:
    """Exactly timm's shared layer: a subclass, or a model's own of the same name, may compute something else.

    Known by name, so that timm is not imported here.
    """
    kind = type(module)
    return kind.__name__ == name and kind.__module__.startswith("timm.layers.")


def _mlp(norm: nn.Module, mlp: Any, scale: Any, after: list[Any]) -> Branch:
    """timm's Mlp, GluMlp and SwiGLU as routed products; any other by calling it."""
    options: dict[str, Any] = {"scale": scale, "whole": [mlp, *after]}
    plain = isinstance(getattr(mlp, "norm", None), nn.Identity)
    act = activation_name(mlp.act) if plain and hasattr(mlp, "act") else None
    inner: Any = None
    if _is_timm(mlp, "Mlp") and act is not None:
        inner = mlp.fc1
    elif _is_timm(mlp, "GluMlp") and act == "silu" and not mlp.gate_last:
        inner, act = mlp.fc1, "swiglu"
    elif _is_timm(mlp, "SwiGLU") and act == "silu":
        inner, act = (mlp.fc1_g, mlp.fc1_x), "swiglu"
    linears = [*(inner if isinstance(inner, tuple) else (inner,)), getattr(mlp, "fc2", None)]
    if act is not None and all(type(linear) is nn.Linear for linear in linears):
        try:
            return MLPBranch(norm, inner, act, mlp.fc2, **options)
        except ValueError:  # an unknown norm
            pass
    return ModuleBranch(norm, Chained(mlp, after), rowwise=_rowwise(mlp), macs_per_row=Macs(mlp))


def _rowwise(mlp: nn.Module) -> bool:
    """Whether it treats every token alone, as far as its parts tell."""
    alone = (nn.Linear, nn.Dropout, nn.Identity, nn.LayerNorm)
    leaves = [m for m in mlp.modules() if not list(m.children())]
    return all(isinstance(m, alone) or activation_name(m) is not None for m in leaves)
