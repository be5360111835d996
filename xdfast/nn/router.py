"""The router: one look at the tokens, one logit per layer and branch, before the first layer runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.nn.budget_shift import BudgetShift
from xdfast.ops._checks import check_choice

__all__ = ["LayerRouter", "check_finished"]

#: Pools over the tokens of a group (one decision per sample), and the two kinds of decision within a sample.
POOLS = ("meanmax", "mean", "max", "none", "block")


class LayerRouter(nn.Module):
    r"""Decides for all layers at once which of their residual branches a sample (or token) takes.

    .. math::
        s_m = \mathrm{LN}_m(W_m h_m + b_m), \quad
        z = W \big[ \mathrm{mean}_t\, s_1 \Vert \max_t s_1 \Vert \mathrm{mean}_t\, s_2 \Vert \dots \big] + b
        \in R^{L \times S}

    h_m are the tokens of group m (a modality) as they enter layer 0. **One** linear map gives the logits of all layers
    and branches: as 32 modules in a Python loop that is 64 launches on a GPU, as long as a layer of a LLaMA-7B, and
    26 times as long on a CPU. Gates are :class:`xdfast.nn.GateFunction` of the logits.

    At first nearly everything is on: the bias of the last map is ``bias_init`` and its weights are small (logits of
    2 ± 0.2), so a student starts as its teacher.

    A budget pulls all samples the same way, and such a router often ends with one path for all of them. ``standardise`` takes the
    mean and the scale over the samples out of every logit, :math:`z = \gamma \, (W s - \mu) / \sigma + b` with μ and σ
    of the batch in training and their running means at inference (a BatchNorm): samples always differ, b says how many of
    them pass, and what is learnt is which. At first logits are 2 ± 1 then. Together with a balance term
    (:class:`xdfast.losses.BudgetLoss`) all layers are used.

    Args:
        dim: D, width of the tokens.
        num_layers: L.
        branches: S, decisions per layer: 1 (the layer's) or 2 (attention and MLP apart).
        hidden: width of a group's projection.
        pool: ``"meanmax"`` (the paper's), ``"mean"`` or ``"max"``: one decision per sample. ``"none"``: one per token,
            from that token alone. ``"block"``: one per ``block_rows`` consecutive tokens, from their mean and maximum.
        groups: tokens of each modality, slices or pairs (start, stop): ``[(1, 257), (257, None)]`` for a vision tower's
            256 tokens after one special token, then language. None: all tokens are one group. Not with ``"none"`` and
            ``"block"``, whose tokens all take the same projection.
        bias_init: of the last bias; σ(2) = 0.88.
        block_rows: G, tokens per block.
        standardise: see above; γ is one number per logit. A batch with a single decision takes the running means.

    Attributes:
        hold: :class:`xdfast.nn.BudgetShift` that keeps a budget at every update, or None (at first). It gets the logits last;
            :meth:`fold_budget` makes it a part of the bias.
        frozen: True: decisions stay as they are, all gradients are zero.

    Shape:
        tokens [B, T, D], mask [B, T] bool (False: padding, read by nobody, may be NaN) or None.
        Output: logits [B, L, S]; ``"none"`` [B, T, L, S]; ``"block"`` [B, T / G, L, S].
        ``logits.flatten(0, 1)`` of the last two is in the order of a plan's units. A sample without a token in some
        group has zeros in that group's place.

    Raises:
        ValueError: sizes < 1, unknown pool, ``block_rows`` without ``"block"`` or the reverse; in use: tokens or a mask
            of another shape, a group that is empty or beyond T, T not a multiple of ``block_rows``.
        TypeError: a mask that is not bool.

    Reference:
        "ActDistill", arXiv 2511.18082, dynamic router.

    Example:
        >>> import torch, xdfast.nn
        >>> router = xdfast.nn.LayerRouter(64, num_layers=12, branches=2, hidden=32, groups=[(1, 17), (17, None)])
        >>> router(torch.randn(4, 24, 64)).shape
        torch.Size([4, 12, 2])
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        branches: int = 1,
        hidden: int = 512,
        pool: str = "meanmax",
        groups: Sequence[slice | Sequence[int | None]] | None = None,
        bias_init: float = 2.0,
        block_rows: int | None = None,
        standardise: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_layers": num_layers, "branches": branches, "hidden": hidden}
        if block_rows is not None:
            sizes["block_rows"] = block_rows
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        check_choice("pool", pool, POOLS)
        if (pool == "block") != (block_rows is not None):
            raise ValueError(
                f'block_rows is the tokens per block of pool="block", got pool={pool!r} and block_rows={block_rows!r}'
            )
        if groups is not None and pool in ("none", "block"):
            raise ValueError(f"pool={pool!r} decides within a sample by one projection for all tokens; drop groups")
        self.dim, self.num_layers, self.branches, self.hidden, self.pool = dim, num_layers, branches, hidden, pool
        if not math.isfinite(bias_init):
            raise ValueError(f"bias_init must be a finite number, got {bias_init!r}")
        self.block_rows, self.bias_init = block_rows, float(bias_init)
        self.groups = [slice(None)] if groups is None else [_as_slice(group) for group in groups]
        if not self.groups:
            raise ValueError("groups must name at least one slice of tokens, got none; use groups=None for all tokens")
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.LayerNorm(hidden)) for _ in self.groups
        )
        parts = 2 if pool in ("meanmax", "block") else 1
        self.head = nn.Linear(len(self.groups) * parts * hidden, num_layers * branches)
        self.standardise = _Standardise(num_layers * branches) if standardise else None
        self.gain = nn.Parameter(torch.ones(num_layers * branches)) if standardise else None
        self.hold: BudgetShift | None = None
        self.frozen = False
        self.reset_head()

    def reset_head(self) -> None:
        """Sets the last map back: the bias to ``bias_init``, the weights small, so that nearly all logits are positive."""
        # the pooled parts have entries of 0 to 3: logits vary by about 0.2 and every row has a gradient from the start; what is
        # standardised has no scale
        small = 0.1 if self.standardise is None else 1.0
        nn.init.normal_(self.head.weight, std=small / self.head.in_features**0.5)
        nn.init.constant_(self.head.bias, self.bias_init)

    @torch.no_grad()
    def lean(self, influence: Tensor, spread: float = 1.0) -> None:
        r"""Starts from a preference among layers: the bias of the layer of rank k, from the least influential 0 to L − 1, becomes
        ``bias_init`` + ``spread`` · (2 k / (L − 1) − 1).

        Under a budget such a router begins as static pruning by that influence, and learns which samples to send otherwise; one
        that begins even has to find out first which layers matter at all.

        Args:
            influence: [L], of :func:`xdfast.nn.block_influence`, or any other measure.
            spread: half the distance between the most and the least influential layer's logits; below ``bias_init`` everything is
                on at first.

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        if influence.shape != (self.num_layers,) or not bool(influence.isfinite().all()):
            raise ValueError(
                f"influence must be {self.num_layers} finite numbers, one per layer, got {list(influence.shape)} "
                f"{influence.flatten().tolist()[:8]}"
            )
        rank = influence.argsort(stable=True).argsort(stable=True)
        place = 2 * rank.float() / max(self.num_layers - 1, 1) - 1
        bias = (self.bias_init + spread * place)[:, None].expand(-1, self.branches).flatten()
        self.head.bias.copy_(bias.to(self.head.bias))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:  # [B, T, D], [B, T] → [B, L, S]
        self._check(tokens, mask)
        if mask is not None:
            # not only the pools: NaN in padding would reach the weights' gradients as 0 · NaN
            tokens = tokens.masked_fill(~mask[..., None], 0)
        logits = self._logits(self._pooled(tokens, mask)).unflatten(-1, (self.num_layers, self.branches))
        if self.frozen:
            logits = logits.detach() + 0 * logits  # gradients of zero: none at all would stall DistributedDataParallel
        return logits if self.hold is None else self.hold(logits)

    def _pooled(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if self.pool in ("none", "block"):
            return self._within(self.projections[0](tokens), mask)
        parts: list[Tensor] = []
        for group, projection in zip(self.groups, self.projections):
            parts += _pool(projection(tokens[:, group]), None if mask is None else mask[:, group], self.pool)
        return torch.cat(parts, -1)

    def _logits(self, pooled: Tensor) -> Tensor:
        return self.head(pooled) if self.standardise is None else self._standardised(pooled)

    @torch.no_grad()
    def fit(self, seen: Iterable[tuple[Tensor, Tensor | None]], wanted: Tensor, size: float = 2.0) -> float:
        """Starts from decisions: the last map becomes the one whose logits are nearest to ± ``size`` as ``wanted`` says (least
        squares with a little ridge). The projections stay as they were drawn.

        Args:
            seen: batches of what :meth:`forward` gets, N samples together.
            wanted: [N, L] bool, which layers run.
            size: of the logits.

        Returns:
            The share of samples with exactly the decisions that are wanted.

        Raises:
            ValueError: another shape of ``wanted``; a router that decides within samples, or standardises its logits.
        """
        if self.pool in ("none", "block") or self.standardise is not None:
            raise ValueError("fit() sets one decision per sample, of a router with standardise=False and no blocks")
        x = torch.cat([self._pooled(tokens, mask).double() for tokens, mask in seen])
        if wanted.shape != (len(x), self.num_layers):
            raise ValueError(
                f"wanted must be [{len(x)}, {self.num_layers}] for these samples, got {list(wanted.shape)}"
            )
        wanted = wanted.to(x.device)[..., None].expand(-1, -1, self.branches).flatten(1)
        y = torch.where(wanted, size, -size).double()
        centred, middle = x - x.mean(0), y.mean(0)
        gram = centred.T @ centred
        gram.diagonal().add_(1e-3 * gram.diagonal().mean() + 1e-12)
        weight = torch.linalg.solve(gram, centred.T @ (y - middle)).T
        self.head.weight.copy_(weight)
        self.head.bias.copy_(middle - weight @ x.mean(0))
        return float(((self.head(x.to(self.head.weight)) > 0) == wanted).all(1).double().mean())

    @torch.no_grad()
    def fold_budget(self) -> None:
        """Makes the running mean of :attr:`hold`'s cuts a part of the bias and drops it: the same decisions, a plain router."""
        if self.hold is not None:
            self.head.bias.sub_(self.hold.shift.to(self.head.bias))
            self.hold = None

    def _standardised(self, pooled: Tensor) -> Tensor:
        """γ (W s − μ) / σ + b, in float32; [..., hidden'] → [..., L · S]."""
        assert self.standardise is not None and self.gain is not None
        raw = nn.functional.linear(pooled, self.head.weight)  # a bias would be taken out again
        flat = raw.flatten(0, -2).to(torch.promote_types(raw.dtype, torch.float32))
        return (self.standardise(flat) * self.gain + self.head.bias).view(raw.shape)

    def _within(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        if self.block_rows is None:
            return hidden  # padding decides for itself alone, from zeros
        blocks = hidden.unflatten(1, (-1, self.block_rows))  # [B, T / G, G, hidden]
        mask = None if mask is None else mask.unflatten(1, (-1, self.block_rows))
        return torch.cat(_pool(blocks, mask, "meanmax"), -1)

    def flops(self, tokens: int) -> int:
        """FLOPs (two per multiply-add) of a sample of that many tokens: what routing itself costs.

        Raises:
            ValueError: a group that is empty or beyond ``tokens``, or a length that is no multiple of ``block_rows``.
        """
        self._check_length(tokens)
        rows = sum(len(range(tokens)[group]) for group in self.groups)
        decisions = {"none": tokens, "block": tokens // (self.block_rows or 1)}.get(self.pool, 1)
        return 2 * (rows * self.dim * self.hidden + decisions * self.head.in_features * self.head.out_features)

    def _check(self, tokens: Tensor, mask: Tensor | None) -> None:
        if tokens.dim() != 3 or tokens.shape[2] != self.dim:
            raise ValueError(f"LayerRouter expects tokens of shape [B, T, {self.dim}], got {list(tokens.shape)}")
        self._check_length(tokens.shape[1])
        if mask is None:
            return
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True: a token, False: padding), got {mask.dtype}; use mask.bool()")
        if mask.shape != tokens.shape[:2]:
            raise ValueError(f"mask must have shape [B, T] = {list(tokens.shape[:2])}, got {list(mask.shape)}")

    def _check_length(self, length: int) -> None:
        if self.block_rows is not None and (length < 1 or length % self.block_rows):
            raise ValueError(
                f"T must be a multiple of block_rows={self.block_rows}, got T={length}; pad and pass a mask"
            )
        for number, group in enumerate(self.groups):
            if any(edge is not None and not -length <= edge <= length for edge in (group.start, group.stop)):
                raise ValueError(f"group {number}, tokens {_text(group)}, reaches beyond the T={length} tokens given")
            start, stop = (
                _edge(edge, length) for edge in (group.start or 0, length if group.stop is None else group.stop)
            )
            if start >= stop:
                raise ValueError(f"group {number}, tokens {_text(group)}, holds none of the T={length} tokens given")

    def extra_repr(self) -> str:
        groups = ", ".join(_text(group) for group in self.groups)
        block = "" if self.block_rows is None else f", block_rows={self.block_rows}"
        return f"num_layers={self.num_layers}, branches={self.branches}, pool={self.pool!r}{block}, groups=[{groups}]"


def check_finished(router: LayerRouter | None) -> None:
    """Whether a router can be saved.

    Raises:
        ValueError: it still holds its budget batch by batch.
    """
    if router is not None and router.hold is not None:
        raise ValueError(
            "the router still holds its budget batch by batch, as in training; call router.fold_budget() before saving"
        )


class _Standardise(nn.BatchNorm1d):
    """Mean 0 and variance 1 over the rows, in float32 whatever the model's precision; a single row takes the running means."""

    def __init__(self, features: int) -> None:
        # eps: a variance below it (samples that are hardly different at all) is not blown up
        super().__init__(features, eps=1e-8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 1:
            return super().forward(x)
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)

    def _apply(self, fn: Any, recurse: bool = True) -> _Standardise:
        exact = {name: getattr(self, name) for name in ("running_mean", "running_var")}
        super()._apply(fn, recurse)
        for name, value in exact.items():  # router.bfloat16() would round them to 8 bits
            if getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(getattr(self, name).device))
        return self


def _pool(hidden: Tensor, mask: Tensor | None, pool: str) -> list[Tensor]:
    """Pools over the tokens, [..., T, D] with mask [..., T] → [..., D] each; zeros where the mask leaves no token."""
    means, maxima = pool in ("mean", "meanmax"), pool in ("max", "meanmax")
    if mask is None:
        return ([hidden.mean(-2)] if means else []) + ([hidden.amax(-2)] if maxima else [])
    padding, parts = ~mask[..., None], []
    if means:
        # in float32: bfloat16 has no 257, float16 no sum beyond 65504
        total = hidden.masked_fill(padding, 0).sum(-2, dtype=torch.promote_types(hidden.dtype, torch.float32))
        parts.append((total / mask.sum(-1, keepdim=True).clamp(min=1)).to(hidden.dtype))
    if maxima:
        largest = hidden.masked_fill(padding, -float("inf")).amax(-2)
        parts.append(largest.masked_fill(~mask.any(-1, keepdim=True), 0))
    return parts


def _as_slice(group: slice | Sequence[int | None]) -> slice:
    edges = (group.start, group.stop) if isinstance(group, slice) else tuple(group)
    step = group.step if isinstance(group, slice) else None
    if len(edges) != 2 or step not in (None, 1) or not all(edge is None or isinstance(edge, int) for edge in edges):
        raise ValueError(f"a group is a slice or a pair (start, stop) of token positions without a step, got {group!r}")
    return slice(*edges)


def _edge(edge: int, length: int) -> int:
    """As ``slice.indices``, which the compiler of torch 2.9 does not know."""
    return edge + length if edge < 0 else edge


def _text(group: slice) -> str:
    return f"{'' if group.start is None else group.start}:{'' if group.stop is None else group.stop}"
