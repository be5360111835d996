"""Graph encapsulation: what a layer's tokens say about the action, as one vector and a predicted action chunk."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast.ops._checks import check_number
from xdfast.ops.graph import edge_affinity, graph_attention, knn_graph

__all__ = ["GATLayer", "GraphEncapsulation"]


class GATLayer(nn.Module):
    r"""One graph attention layer over a fixed number of neighbours, width D in and out.

    .. math::
        v_i = W x_i \in R^{H \times C}, \quad
        o_i = b + \frac{1}{H} \sum_h \sum_{j \in N_i} \alpha^h_{ij} v^h_j, \quad
        \alpha^h_{ij} = \mathrm{softmax}_{j \in N_i} \big[ \mathrm{LeakyReLU}(a^h_{src} \cdot v^h_j
        + a^h_{dst} \cdot v^h_i) + b_{ij} \big]

    with C = D and heads averaged, or C = D / H and heads side by side (``concat``). Without ``edge_scores`` it is
    torch-geometric's ``GATConv(D, C, heads, concat, add_self_loops=False)`` on the edges j → i; names and shapes of the
    parameters are the same but for ``lin.weight``, here ``weight``.

    Args:
        dim: D.
        heads: H.
        concat: heads side by side instead of averaged; H must divide D.
        slope: of LeakyReLU below zero.

    Shape:
        x [B, T, D], neighbours [B, T, k] int64 as of :func:`xdfast.ops.graph.knn_graph`, edge_scores [B, T, k] or None.
        Output: [B, T, D].

    Raises:
        ValueError: sizes < 1, H that does not divide D with ``concat``; in use x of another width, and as
            :func:`xdfast.ops.graph.graph_attention`.

    Reference:
        Veličković et al., "Graph Attention Networks", ICLR 2018, arXiv 1710.10903.

    Example:
        >>> import torch, xdfast.nn
        >>> from xdfast.ops.graph import knn_graph
        >>> x = torch.randn(2, 20, 32)
        >>> xdfast.nn.GATLayer(32)(x, knn_graph(x, x, k=8)).shape
        torch.Size([2, 20, 32])
    """

    def __init__(self, dim: int, heads: int = 4, concat: bool = False, *, slope: float = 0.2) -> None:
        super().__init__()
        _check_sizes(dim=dim, heads=heads)
        if concat and dim % heads:
            raise ValueError(f"heads must divide dim to lie side by side, got heads={heads} and dim={dim}")
        self.dim, self.heads, self.concat = dim, heads, concat
        self.slope = check_number("slope", slope, minimum=0)
        width = dim // heads if concat else dim
        self.weight = nn.Parameter(torch.empty(heads * width, dim))
        self.att_src = nn.Parameter(torch.empty(1, heads, width))
        self.att_dst = nn.Parameter(torch.empty(1, heads, width))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot's uniform weights, as the paper's; no bias."""
        for parameter in (self.weight, self.att_src, self.att_dst):
            nn.init.xavier_uniform_(parameter)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, neighbours: Tensor, edge_scores: Tensor | None = None) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise ValueError(f"GATLayer expects tokens of shape [B, T, {self.dim}], got {list(x.shape)}")
        # a · (W x) as (aᵀ W) x: 2 H numbers per token instead of two passes over the values: 0.6 times the time of a step
        attend = torch.cat((self.att_src, self.att_dst))  # [2, H, C]
        attend = torch.einsum("shc,hcd->shd", attend, self.weight.unflatten(0, (self.heads, -1))).flatten(0, 1)
        values = F.linear(x, self.weight).unflatten(-1, (self.heads, -1))  # [B, T, H, C]
        source, target = F.linear(x, attend).chunk(2, -1)  # [B, T, H]
        gathered = graph_attention(values, source, target, neighbours, self.slope, edge_scores)
        return (gathered.flatten(2) if self.concat else gathered.mean(2)) + self.bias

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}, concat={self.concat}, slope={self.slope:g}"


class GraphEncapsulation(nn.Module):
    r"""Semantic vector S_l and action chunk a_l of every layer's hidden states, by a graph over their tokens.

    .. math::
        x &= W (\gamma_l \odot \mathrm{LN}(h_l) + \beta_l) + e_l, \quad
        s_{ij} = \phi(x_i) \cdot \psi(x_j) / \sqrt R, \quad N_i = \mathrm{top}\text{-}k_{j \ne i}\; s_{ij} \\
        x &\leftarrow x + \mathrm{ELU}(\mathrm{GAT}_m(\mathrm{LN}(x), N, s)), \quad m = 1, 2 \\
        p &= \textstyle\sum_i \mathrm{softmax}_i(q_l \cdot y_i / \sqrt{d}) \, y_i, \quad y = \mathrm{LN}(x) \\
        S_l &= \mathrm{MLP}(p), \quad a_l = \mathrm{head}_l(S_l)

    Everything wide is shared by all layers: W from D to d (``hidden``) features, φ and ψ to R (``rank``), both GAT
    layers, the MLP. A layer has a scale γ_l, shift β_l and embedding e_l, a pooling query q_l, and an action head
    512 → 256 → H·A of its own. That is 7.4 M parameters for 32 layers of width 4096 with chunks of 16 × 7, where an
    extractor per layer in the hidden width, as published, has 5670 M.

    The affinity also enters the attention as a score of the edge: which neighbours are chosen has no gradient, and φ
    and ψ would otherwise stay what they were at the start. Softmaxes, norms and affinities are in float32 whatever
    the parameters or autocast are. Hidden states are converted to the parameters' dtype. Training and eval mode are
    the same function (no dropout).

    Args:
        dim: D, width of the hidden states.
        num_layers: L.
        chunk: H, steps of an action chunk.
        action_dim: A.
        semantic_dim: width of S_l.
        hidden: d, width of the graph's nodes.
        rank: R, width of φ and ψ.
        k: neighbours per token; T − 1 where there are fewer.
        heads: of the GAT layers, averaged.
        layers_shared: False gives every layer an extractor of its own (W, φ, ψ, GAT, MLP) of the same low-rank kind; an
            ablation, L times the size.

    Shape:
        hidden: h_l [B, T, D] with ``layer`` = l in 0 … L − 1 (negative from the end), or the states after all layers,
        [L, B, T, D], in one pass and without ``layer``. mask [B, T] bool (False: padding, read by nobody, may be NaN) or
        None. Output: S [B, 512] and a [B, H, A], or [L, B, 512] and [L, B, H, A].

    Raises:
        ValueError: sizes < 1; hidden states of another width or another number of layers, ``layer`` missing, superfluous
            or out of range, a mask of another shape; on the CPU also hidden states that are NaN or infinite.
        TypeError: hidden states that are not floating point, a mask that is not bool.

    Reference:
        "ActDistill", arXiv 2511.18082, graph-structured encapsulation.

    Example:
        >>> import torch, xdfast.nn
        >>> heads = xdfast.nn.GraphEncapsulation(64, num_layers=6, chunk=8, action_dim=4)
        >>> semantics, actions = heads(torch.randn(6, 2, 20, 64))
        >>> semantics.shape, actions.shape
        (torch.Size([6, 2, 512]), torch.Size([6, 2, 8, 4]))
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        chunk: int,
        action_dim: int,
        semantic_dim: int = 512,
        hidden: int = 256,
        rank: int = 64,
        k: int = 8,
        heads: int = 4,
        layers_shared: bool = True,
    ) -> None:
        super().__init__()
        _check_sizes(dim=dim, num_layers=num_layers, chunk=chunk, action_dim=action_dim, semantic_dim=semantic_dim)
        _check_sizes(hidden=hidden, rank=rank, k=k, heads=heads)
        self.dim, self.num_layers, self.chunk, self.action_dim = dim, num_layers, chunk, action_dim
        self.semantic_dim, self.hidden, self.layers_shared = semantic_dim, hidden, layers_shared
        self.scale = nn.Parameter(torch.ones(num_layers, dim))
        self.shift = nn.Parameter(torch.zeros(num_layers, dim))
        self.embedding = nn.Parameter(torch.empty(num_layers, hidden).normal_(std=0.02))
        self.query = nn.Parameter(torch.empty(num_layers, hidden).normal_(std=0.02))  # pooling starts as a mean
        self.extractors = nn.ModuleList(
            _Extractor(dim, semantic_dim, hidden, rank, k, heads) for _ in range(1 if layers_shared else num_layers)
        )
        self.head = _LayerHeads(num_layers, semantic_dim, 256, chunk * action_dim)

    def forward(self, hidden: Tensor, layer: int | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layers = self._check(hidden, layer, mask)
        stacked = hidden if hidden.dim() == 4 else hidden[None]  # [l, B, T, D]
        if mask is not None:
            stacked = stacked.masked_fill(~mask[..., None], 0)  # also of the gradients: 0 · NaN is NaN
        _check_values(stacked, layers.start)
        # at the wider precision of the two: float16 has no hidden states beyond 65504, the normalised ones are small
        normed = F.layer_norm(stacked.to(torch.promote_types(stacked.dtype, self.scale.dtype)), (self.dim,))
        semantics = self._semantics(normed.to(self.scale.dtype), layers, mask)  # [l, B, 512]
        actions = self.head(semantics, layers).unflatten(-1, (self.chunk, self.action_dim))
        return (semantics, actions) if hidden.dim() == 4 else (semantics[0], actions[0])

    def _semantics(self, normed: Tensor, layers: slice, mask: Tensor | None) -> Tensor:
        own = (self.scale[layers], self.shift[layers], self.embedding[layers], self.query[layers])
        if self.layers_shared:
            return self.extractors[0](normed, *own, mask)
        numbers = range(self.num_layers)[layers]
        parts = [
            self.extractors[n](normed[i : i + 1], *(x[i : i + 1] for x in own), mask) for i, n in enumerate(numbers)
        ]
        return torch.cat(parts)

    def _check(self, hidden: Tensor, layer: int | None, mask: Tensor | None) -> slice:
        if not isinstance(hidden, Tensor) or not hidden.dtype.is_floating_point:
            raise TypeError(
                f"hidden must be a floating-point tensor, got {getattr(hidden, 'dtype', type(hidden).__name__)}"
            )
        if hidden.dim() not in (3, 4) or hidden.shape[-1] != self.dim or hidden.numel() == 0:
            raise ValueError(
                f"hidden must have shape [B, T, {self.dim}] (one layer) or [{self.num_layers}, B, T, {self.dim}] (all "
                f"layers) and not be empty, got {list(hidden.shape)}"
            )
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True: a token, False: padding), got {mask.dtype}; use mask.bool()")
        if mask is not None and mask.shape != hidden.shape[-3:-1]:
            raise ValueError(f"mask must have shape [B, T] = {list(hidden.shape[-3:-1])}, got {list(mask.shape)}")
        if hidden.dim() == 4:
            if layer is not None:
                raise ValueError(
                    f"hidden states of all layers take no layer, got layer={layer!r} and {list(hidden.shape)}"
                )
            if hidden.shape[0] != self.num_layers:
                raise ValueError(f"expected the hidden states of {self.num_layers} layers, got {list(hidden.shape)}")
            return slice(0, self.num_layers)
        if not isinstance(layer, int) or isinstance(layer, bool) or not -self.num_layers <= layer < self.num_layers:
            raise ValueError(
                f"hidden states [B, T, D] of one layer need layer in 0 to {self.num_layers - 1}, got layer={layer!r}"
            )
        layer %= self.num_layers
        return slice(layer, layer + 1)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_layers={self.num_layers}, chunk={self.chunk}, action_dim={self.action_dim}, "
            f"semantic_dim={self.semantic_dim}, layers_shared={self.layers_shared}"
        )


class _Extractor(nn.Module):
    """Normalised hidden states of l layers → semantic vectors; [l, B, T, D] → [l, B, 512]."""

    def __init__(self, dim: int, semantic_dim: int, hidden: int, rank: int, k: int, heads: int) -> None:
        super().__init__()
        self.k = k
        self.down = nn.Linear(dim, hidden)
        self.asks, self.asked = nn.Linear(hidden, rank, bias=False), nn.Linear(hidden, rank, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.graph = nn.ModuleList(GATLayer(hidden, heads) for _ in range(2))
        self.norm = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, semantic_dim), nn.GELU(), nn.Linear(semantic_dim, semantic_dim))

    def forward(
        self, normed: Tensor, scale: Tensor, shift: Tensor, embedding: Tensor, query: Tensor, mask: Tensor | None
    ) -> Tensor:
        count, samples = normed.shape[:2]
        x = self.down(normed * scale[:, None, None] + shift[:, None, None]) + embedding[:, None, None]
        x = x.flatten(0, 1)  # [l · B, T, d]: layers are further samples
        mask = None if mask is None else mask.expand(count, -1, -1).flatten(0, 1)
        queries, keys = self.asks(x) * self.asks.out_features**-0.5, self.asked(x)
        neighbours = knn_graph(queries, keys, self.k, mask)
        scores = edge_affinity(queries, keys, neighbours)
        for norm, layer in zip(self.norms, self.graph):
            x = x + F.elu(layer(norm(x), neighbours, scores))
        pooled = _pool(self.norm(x), query.repeat_interleave(samples, 0), mask)
        return self.mlp(pooled).unflatten(0, (count, samples))


def _pool(x: Tensor, query: Tensor, mask: Tensor | None) -> Tensor:
    """Attention pooling, x [N, T, d], query [N, d], mask [N, T] → [N, d]; zeros where the mask leaves no token."""
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = (x.to(wide) * query[:, None].to(wide)).sum(-1) * x.shape[-1] ** -0.5  # [N, T]
    if mask is None:
        weights = logits.softmax(-1)
    else:
        weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(~mask, 0)
    return (weights[:, None].to(x.dtype) @ x).squeeze(1)


class _LayerHeads(nn.Module):
    """One action head per layer as two batched products: [l, B, 512] → [l, B, H · A]."""

    def __init__(self, num_layers: int, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.weight_in = nn.Parameter(torch.empty(num_layers, width, hidden))
        self.bias_in = nn.Parameter(torch.zeros(num_layers, hidden))
        self.weight_out = nn.Parameter(torch.empty(num_layers, hidden, outputs))
        self.bias_out = nn.Parameter(torch.zeros(num_layers, outputs))
        for weight in (self.weight_in, self.weight_out):
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)  # as nn.Linear

    def forward(self, semantics: Tensor, layers: slice) -> Tensor:
        x = F.gelu(torch.baddbmm(self.bias_in[layers, None], semantics, self.weight_in[layers]))
        return torch.baddbmm(self.bias_out[layers, None], x, self.weight_out[layers])


def _check_values(stacked: Tensor, first: int) -> None:
    """On the CPU, where looking does not wait: hidden states are finite; names the layer."""
    if stacked.device.type != "cpu" or torch.compiler.is_compiling() or type(stacked) is not Tensor:
        return
    bad = ~stacked.detach().isfinite().flatten(1).all(1)
    if bool(bad.any()):
        layer = first + int(bad.nonzero()[0])
        raise ValueError(f"hidden states of layer {layer} hold NaN or infinity; look at the model, and mask padding")


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
