"""Residual branches f(norm(x)) of a transformer layer, as views of existing modules: densely, or for listed rows alone.

A branch owns no parameters: it points into the layer it describes, so that names, devices, dtypes and optimisers are the
layer's. ``dense`` calls the layer's own modules; ``routed`` computes the same with the ops of :mod:`xdfast.ops.routed`;
``infer`` is ``routed`` for the CPU without gradients, with prepared weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from xdfast.nn.packed import Folded, PackedLinear
from xdfast.ops.route import RouteList
from xdfast.ops.routed import (
    routed_attention,
    routed_linear_residual,
    routed_linear_residual_,
    routed_ln_linear,
    routed_norm,
    routed_residual,
    routed_residual_,
)
from xdfast.ops.routed.reference import activate, norm_reference
from xdfast.ops.routed.rows import RowPasses
from xdfast.ops.routed.triton import carried_ln_linear, carried_residual_, carried_statistics, fold_norm

__all__ = ["AttentionBranch", "Branch", "MLPBranch", "ModuleBranch", "Norm"]


class Branch(Protocol):
    """One residual branch."""

    def dense(self, x: Tensor, *, seen: Tensor | None = None, **context: Any) -> Tensor:
        """f(norm(x)) [B, T, D] by the layer's own modules; ``seen`` [B, T] bool: tokens whose keys others see."""

    def routed(
        self, x: Tensor, route: RouteList, tokens: int, *, keys: str = "active", in_place: bool = False, **context: Any
    ) -> Tensor:
        """x [R, D] with g · f(norm(x)) added to the listed rows; differentiable unless ``in_place``."""

    def infer(
        self, x: Tensor, route: RouteList, tokens: int, rows: RowPasses, *, keys: str = "active", **context: Any
    ) -> None:
        """The same in place, on the CPU, without gradients."""

    def carried(self, x: Tensor, statistics: Tensor, route: RouteList, tokens: int, *, keys: str = "active") -> None:
        """The same in place, by Triton, with the statistics of x's rows carried along (:mod:`xdfast.ops.routed.triton`)."""

    def macs(self, rows: int, tokens: int) -> int:
        """Multiply-accumulates of the products for ``rows`` rows of samples with ``tokens`` tokens."""

    def refold(self) -> None:
        """Forgets what was prepared from weights."""


class Norm:
    """What the ops need of a normalisation module: LayerNorm, RMSNorm (torch's, timm's, Hugging Face's), or none."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module
        name = type(module).__name__
        if module is None or isinstance(module, nn.Identity):
            self.kind = "none"
        elif isinstance(module, nn.LayerNorm) or name in ("LayerNorm", "LayerNormFp32"):
            self.kind = "layer"
        elif name.endswith("RMSNorm") or name in ("RmsNorm", "RmsNormFast", "SimpleNorm"):
            self.kind = "rms"
        else:
            raise ValueError(
                f"{name} is neither LayerNorm nor RMSNorm; give the branch as a ModuleBranch with norm=None"
            )
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", 1e-6))
        self.eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
        if module is not None and self.kind != "none" and not _computes(module, self.kind, self.eps):
            raise ValueError(
                f"{name} computes something else than {self.kind} norm · weight + bias with eps={self.eps:g} (Gemma's multiplies "
                "by 1 + weight); give the branch as a ModuleBranch, which calls the module itself"
            )

    @property
    def weight(self) -> Tensor | None:
        return getattr(self.module, "weight", None)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of :func:`xdfast.ops.routed.routed_ln_linear`."""
        return {"norm_weight": self.weight, "norm_bias": self.bias, "norm": self.kind, "eps": self.eps}

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.module is None else self.module(x)

    def gather(self, rows: RowPasses, x: Tensor, route: RouteList) -> Tensor:
        """norm(x[rows]), exactly the listed ones."""
        assert route.units is not None
        return rows.gather_norm(
            x, self.weight, self.bias, route.index, route.units, route.rows_per_unit, self.kind, self.eps, False
        )[0]


@torch.no_grad()
def _computes(module: nn.Module, kind: str, eps: float) -> bool:
    """Whether a normalisation is what its name says, found by asking it: names and attributes do not tell."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is None:
        width = int(getattr(module, "normalized_shape", (8,))[-1])
        x = torch.empty(2, width)
    elif weight.is_meta or weight.dim() != 1:
        return weight.dim() == 1 and "Gemma" not in type(module).__name__
    else:
        x = weight.new_empty(2, weight.shape[0])
    points = torch.linspace(-1, 2, x.shape[1], dtype=torch.float64)
    # mean and variance are not 0 and 1; the second row is so small that eps matters
    x.copy_(torch.stack((points, 2e-3 * (7 * points).sin() + 1e-3)))
    expected, found = norm_reference(x.double(), weight, bias, kind, eps), module(x).double()
    half = x.dtype.itemsize < 4
    return torch.allclose(found, expected, rtol=4e-2 if half else 1e-4, atol=4e-2 if half else 1e-4)


def _scaled(linear: nn.Linear, scale: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """LayerScale (``gamma`` [D]) multiplied into the linear map before it."""
    if scale is None:
        return linear.weight, linear.bias
    gamma: Tensor = scale.gamma  # type: ignore[assignment]
    return linear.weight * gamma[:, None], None if linear.bias is None else linear.bias * gamma


def _joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Linear maps of one input as one."""
    if len(linears) == 1:
        return linears[0].weight, linears[0].bias
    weight = torch.cat([linear.weight for linear in linears])  # type: ignore[arg-type]  # stubs: no Parameters
    if all(linear.bias is None for linear in linears):
        return weight, None
    biases = [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias for x in linears]
    return weight, torch.cat(biases)  # type: ignore[arg-type]


def _sources(linears: Sequence[nn.Linear], scale: nn.Module | None) -> list[Tensor]:
    found = [t for linear in linears for t in (linear.weight, linear.bias) if t is not None]
    return found if scale is None else [*found, scale.gamma]  # type: ignore[list-item]


class _Packs:
    """The prepared linear maps of a branch, made on first use; copies of a model make their own."""

    def __init__(self) -> None:
        self._made: dict[str, PackedLinear] = {}
        self._folded: dict[str, Folded] = {}

    def get(
        self, name: str, linears: Sequence[nn.Linear], scale: nn.Module | None, act: str, rows: int
    ) -> PackedLinear:
        if name not in self._made:

            def parts() -> tuple[Tensor, Tensor | None]:
                return _joined(linears) if scale is None else _scaled(linears[0], scale)

            self._made[name] = PackedLinear(parts, lambda: _sources(linears, scale), act, rows)
        return self._made[name]

    def inner(self, linears: Sequence[nn.Linear], norm: Norm) -> Any:
        """The joined linear maps with the norm's weights folded in; see :func:`xdfast.ops.routed.triton.fold_norm`."""
        if "inner" not in self._folded:

            def sources() -> list[Tensor]:
                return _sources(linears, None) + [t for t in (norm.weight, norm.bias) if t is not None]

            self._folded["inner"] = Folded(lambda: fold_norm(*_joined(linears), norm.weight, norm.bias), sources)
        return self._folded["inner"]()

    def joined(self, linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
        """Linear maps of one input as one: joined anew where a gradient is recorded, else once."""
        if len(linears) == 1 or torch.is_grad_enabled():
            return _joined(linears)
        if "joined" not in self._folded:
            self._folded["joined"] = Folded(lambda: _joined(linears), lambda: _sources(linears, None))
        return self._folded["joined"]()

    def outer(self, linear: nn.Linear, scale: nn.Module | None) -> tuple[Tensor, Tensor | None]:
        """The last linear map with LayerScale multiplied in."""
        if scale is None:
            return linear.weight, linear.bias
        if "outer" not in self._folded:
            self._folded["outer"] = Folded(lambda: _scaled(linear, scale), lambda: _sources([linear], scale))
        return self._folded["outer"]()

    def clear(self) -> None:
        """Forgets all of them."""
        self._made.clear()
        self._folded.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packs:
        return _Packs()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Packs, ()


class MLPBranch:
    """scale · W₂ act(W₁ norm(x)); SwiGLU with two inner maps (gate, up).

    Args:
        norm: the normalisation, or None.
        inner: one linear map, or (gate, up) of SwiGLU.
        act: activation of :data:`xdfast.ops.routed.ACTIVATIONS`.
        outer: the last linear map.
        scale: LayerScale, a module with ``gamma`` [D], or None.
        whole: the layer's own modules between norm and sum, in order, for ``dense``; empty: the parts above.
    """

    def __init__(
        self,
        norm: nn.Module | None,
        inner: nn.Linear | tuple[nn.Linear, nn.Linear],
        act: str,
        outer: nn.Linear,
        *,
        scale: nn.Module | None = None,
        whole: Sequence[nn.Module] = (),
    ) -> None:
        self.norm = Norm(norm)
        self.inner = list(inner) if isinstance(inner, tuple) else [inner]
        self.act, self.outer, self.scale, self._whole = act, outer, scale, tuple(whole)
        self._packs = _Packs()

    def dense(self, x: Tensor, *, seen: Tensor | None = None, **context: Any) -> Tensor:
        y = self.norm(x)
        if self._whole:
            return _through(self._whole, y)
        h = activate(functional.linear(y, *_joined(self.inner)), self.act)
        return functional.linear(h, *_scaled(self.outer, self.scale))

    def routed(
        self, x: Tensor, route: RouteList, tokens: int, *, keys: str = "active", in_place: bool = False, **context: Any
    ) -> Tensor:
        h = routed_ln_linear(x, *self._packs.joined(self.inner), route, **self.norm.options(), act=self.act)
        add = routed_linear_residual_ if in_place else routed_linear_residual
        return add(x, h, *_scaled(self.outer, self.scale), route)

    def infer(
        self, x: Tensor, route: RouteList, tokens: int, rows: RowPasses, *, keys: str = "active", **context: Any
    ) -> None:
        swiglu = self.act == "swiglu"
        inner = self._packs.get("inner", self.inner, None, "none" if swiglu else self.act, x.shape[0])
        outer = self._packs.get("outer", [self.outer], self.scale, "none", x.shape[0])
        h = inner(self.norm.gather(rows, x, route).to(self.outer.weight.dtype))
        _add(rows, x, outer(rows.swiglu(h) if swiglu else h), route)

    def carried(self, x: Tensor, statistics: Tensor, route: RouteList, tokens: int, *, keys: str = "active") -> None:
        folded = self._packs.inner(self.inner, self.norm)
        h = carried_ln_linear(x, statistics, folded, route, self.norm.kind, self.norm.eps, self.act)
        carried_residual_(x, statistics, h, *self._packs.outer(self.outer, self.scale), route)

    def macs(self, rows: int, tokens: int) -> int:
        return rows * sum(x.in_features * x.out_features for x in (*self.inner, self.outer))

    def refold(self) -> None:
        self._packs.clear()


class AttentionBranch:
    """scale · W_o attention(q, k, v) of norm(x), inside each sample.

    Args:
        norm: the normalisation before it, or None.
        qkv: one linear map to [q | k | v], or three.
        proj: the output map.
        heads, kv_heads: of queries, and of keys and values.
        q_norm, k_norm: normalisations per head, or None.
        between: a normalisation between attention and ``proj``, or None.
        scale: LayerScale, a module with ``gamma`` [D], or None.
        softmax_scale: factor of the scores; None: 1 / √(head width).
        causal: a token sees itself and those before it.
        whole: the layer's own modules between norm and sum, in order, for ``dense``; empty: the parts above.
    """

    def __init__(
        self,
        norm: nn.Module | None,
        qkv: nn.Linear | tuple[nn.Linear, nn.Linear, nn.Linear],
        proj: nn.Linear,
        heads: int,
        *,
        kv_heads: int | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        between: nn.Module | None = None,
        scale: nn.Module | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        whole: Sequence[nn.Module] = (),
    ) -> None:
        self.norm = Norm(norm)
        self.qkv = list(qkv) if isinstance(qkv, tuple) else [qkv]
        self.proj, self.heads, self.kv_heads = proj, heads, kv_heads or heads
        self.q_norm, self.k_norm, self.between = q_norm, k_norm, between
        self.scale, self.softmax_scale, self.causal, self._whole = scale, softmax_scale, causal, tuple(whole)
        out = sum(linear.out_features for linear in self.qkv)
        self.width = out // (self.heads + 2 * self.kv_heads)
        if self.width * (self.heads + 2 * self.kv_heads) != out or self.width * self.heads != proj.in_features:
            raise ValueError(
                f"{out} features of q, k and v do not make {heads} heads of queries and {self.kv_heads} of keys and values"
            )
        self._packs = _Packs()

    def dense(self, x: Tensor, *, seen: Tensor | None = None, **context: Any) -> Tensor:
        y = self.norm(x)
        if self._whole and seen is None:
            return _through(self._whole, y)
        q, k, v = self._heads(functional.linear(y, *_joined(self.qkv)))
        q, k, v = (t.transpose(-2, -3) for t in (q, k, v))
        mask = None
        if seen is not None:  # an unlisted token sees itself alone: it is not used, but NaN would reach the gradient
            mask = seen[:, None, None, :] | torch.eye(seen.shape[1], dtype=torch.bool, device=seen.device)
            mask = mask.tril() if self.causal else mask
        o = functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.causal and mask is None, scale=self.softmax_scale,
            enable_gqa=self.heads != self.kv_heads,
        )  # fmt: skip
        return functional.linear(self._flat(o.transpose(-2, -3)), *_scaled(self.proj, self.scale))

    def routed(
        self, x: Tensor, route: RouteList, tokens: int, *, keys: str = "active", in_place: bool = False, **context: Any
    ) -> Tensor:
        if keys == "all" and route.rows_per_unit < tokens:
            q, k, v, offsets_k = self._all_keys(x, route, tokens)
        else:
            q, k, v = self._heads(routed_ln_linear(x, *self._packs.joined(self.qkv), route, **self.norm.options()))
            offsets_k = None
        o = self._attend(q, k, v, route, offsets_k, tokens)
        add = routed_linear_residual_ if in_place else routed_linear_residual
        return add(x, self._flat(o), *_scaled(self.proj, self.scale), route)

    def infer(
        self, x: Tensor, route: RouteList, tokens: int, rows: RowPasses, *, keys: str = "active", **context: Any
    ) -> None:
        if keys == "all" and route.rows_per_unit < tokens:
            q, k, v, offsets_k = self._all_keys(x, route, tokens)
        else:
            pack = self._packs.get("qkv", self.qkv, None, "none", x.shape[0])
            q, k, v = self._heads(pack(self.norm.gather(rows, x, route).to(self.proj.weight.dtype)))
            offsets_k = None
        o = self._attend(q, k, v, route, offsets_k, tokens)
        proj = self._packs.get("proj", [self.proj], self.scale, "none", x.shape[0])
        _add(rows, x, proj(self._flat(o)), route)

    def carried(self, x: Tensor, statistics: Tensor, route: RouteList, tokens: int, *, keys: str = "active") -> None:
        if keys == "all" and route.rows_per_unit < tokens:
            q, k, v, offsets_k = self._all_keys(x, route, tokens)
        else:
            folded = self._packs.inner(self.qkv, self.norm)
            q, k, v = self._heads(
                carried_ln_linear(x, statistics, folded, route, self.norm.kind, self.norm.eps, "none")
            )
            offsets_k = None
        o = self._attend(q, k, v, route, offsets_k, tokens)
        carried_residual_(x, statistics, self._flat(o), *self._packs.outer(self.proj, self.scale), route)

    def macs(self, rows: int, tokens: int) -> int:
        linear = sum(x.in_features * x.out_features for x in (*self.qkv, self.proj))
        return rows * (linear + 2 * tokens * self.heads * self.width)

    def refold(self) -> None:
        self._packs.clear()

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, route: RouteList, offsets_k: Tensor | None, tokens: int
    ) -> Tensor:
        return routed_attention(
            q, k, v, route.offsets, offsets_k, scale=self.softmax_scale, causal=self.causal, longest=tokens,
            uniform=route.rows_per_unit == tokens,
        )  # fmt: skip

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [..., (H + 2 H') d] → [..., H, d] and twice H'
        q, k, v = qkv.unflatten(-1, (self.heads + 2 * self.kv_heads, self.width)).split(
            (self.heads, self.kv_heads, self.kv_heads), -2
        )
        q = q if self.q_norm is None else self.q_norm(q)
        return q, k if self.k_norm is None else self.k_norm(k), v

    def _flat(self, o: Tensor) -> Tensor:
        o = o.flatten(-2)
        return o if self.between is None else self.between(o)

    def _all_keys(self, x: Tensor, route: RouteList, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries of the listed rows, keys and values of all: what a model converted from a dense one expects."""
        if self.causal:
            raise ValueError("keys='all' with causal attention needs samples as units: positions would be lost")
        weight, bias = self._packs.joined(self.qkv)
        split = self.heads * self.width
        q = routed_ln_linear(x, weight[:split], None if bias is None else bias[:split], route, **self.norm.options())
        q = q.unflatten(-1, (self.heads, self.width))
        kv = functional.linear(self.norm(x).to(weight.dtype), weight[split:], None if bias is None else bias[split:])
        k, v = kv.unflatten(-1, (2 * self.kv_heads, self.width)).chunk(2, -2)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        samples = x.shape[0] // tokens
        offsets = torch.arange(samples + 1, device=x.device, dtype=torch.int32) * tokens
        return q, k, v, offsets


class ModuleBranch:
    """Any inner module behind a norm: gathered samples in, their outputs added back.

    Units must be samples, unless ``rowwise``: the module treats every token alone.
    """

    def __init__(
        self,
        norm: nn.Module | None,
        inner: Callable[..., Tensor],
        *,
        rowwise: bool = False,
        macs_per_row: Callable[[int], int] | None = None,
    ) -> None:
        try:
            self.norm = Norm(norm)
        except ValueError:  # an unknown norm: gathered as it is, then called
            self.norm, inner = Norm(None), _Chain(norm, inner)
        self.inner, self.rowwise, self._macs = inner, rowwise, macs_per_row

    def dense(self, x: Tensor, *, seen: Tensor | None = None, **context: Any) -> Tensor:
        return self.inner(self.norm(x), **context)

    def routed(
        self, x: Tensor, route: RouteList, tokens: int, *, keys: str = "active", in_place: bool = False, **context: Any
    ) -> Tensor:
        y = routed_norm(x, route, **self.norm.options())
        add = routed_residual_ if in_place else routed_residual
        return add(x, self._call(y, route, tokens, context), route)

    def infer(
        self, x: Tensor, route: RouteList, tokens: int, rows: RowPasses, *, keys: str = "active", **context: Any
    ) -> None:
        y = self.norm.gather(rows, x, route)
        _add(rows, x, self._call(y, route, tokens, context), route)

    def carried(self, x: Tensor, statistics: Tensor, route: RouteList, tokens: int, *, keys: str = "active") -> None:
        self.routed(x, route, tokens, in_place=True)
        statistics.copy_(carried_statistics(x))

    def macs(self, rows: int, tokens: int) -> int:
        return 0 if self._macs is None else rows * self._macs(tokens)

    def refold(self) -> None:
        """Nothing is prepared: the module itself is called."""

    def _call(self, y: Tensor, route: RouteList, tokens: int, context: dict[str, Any]) -> Tensor:
        if not self.rowwise:
            if route.rows_per_unit != tokens:
                raise ValueError(
                    f"{type(self.inner).__name__} mixes the tokens of a sample, so only whole samples can be routed through "
                    "it; use unit='sample'"
                )
            return self.inner(y.unflatten(0, (-1, tokens)), **context).flatten(0, 1)
        return self.inner(y[None], **context)[0]


def _add(rows: RowPasses, x: Tensor, y: Tensor, route: RouteList) -> None:
    """x[row] += g · y, past the dispatcher: it costs as much as the pass itself for one sample."""
    assert route.units is not None
    rows.scatter_add_(x, y, route.gate, route.index, route.units, route.rows_per_unit)


def _through(modules: Sequence[nn.Module], y: Tensor) -> Tensor:
    for module in modules:
        y = module(y)
    return y


class _Chain:
    def __init__(self, first: nn.Module | None, second: Callable[..., Tensor]) -> None:
        self.first, self.second = first, second

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        return self.second(x if self.first is None else self.first(x), **context)
