"""Attention on a graph of tokens: nearest neighbours by a learned affinity, and a weighted sum over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xdfast.ops._checks import check_number, check_pair
from xdfast.ops._precision import wide, without_autocast

__all__ = ["edge_affinity", "graph_attention", "knn_graph"]


def knn_graph(queries: Tensor, keys: Tensor, k: int, mask: Tensor | None = None, *, self_loops: bool = False) -> Tensor:
    r"""The k tokens of the same sample that each token has most affinity with.

    .. math::
        N_i = \mathrm{top}\text{-}k_{j \ne i,\; j \text{ no padding}} \; q_i \cdot k_j

    Token i *gathers from* :math:`N_i`: row i lists senders, so that every token receives messages, however popular the
    others are. (An edge list of "j is near i, so i sends to j" leaves the tokens that nobody is near without any.)
    The order of a row is by falling affinity; between equal affinities it is the device's.

    The width of the result is always k. Where there are fewer than k other tokens (T − 1 < k, or padding leaves fewer)
    the last places hold −1, "nobody", which :func:`graph_attention` gives no weight: a padded sample has the graph of
    the cropped one. A token that is the only one of its sample is its own neighbour; a sample that is all padding has
    no edges. Choosing has no gradient: train the affinity by :func:`edge_affinity`.

    Args:
        queries: q = φ(h), who is asking.
        keys: k = ψ(h), who is asked; may be the same tensor.
        k: neighbours per token.
        mask: False for padding, which is nobody's neighbour and may hold NaN; its own rows list real tokens, and mean
            nothing.
        self_loops: whether a token may be its own neighbour.

    Shape:
        queries, keys [B, T, R]; mask [B, T] bool or None. Output: [B, T, k] int64, entries in −1 … T − 1. Affinities
        are computed in float32 (float64 if an input is); T² of them per sample are held for a moment.

    Raises:
        TypeError: tensors that are not floating point, a mask that is not bool.
        ValueError: shapes or devices that do not fit, k < 1; on the CPU also values that are NaN or infinite (looking
            would make a GPU wait).

    Reference:
        The graph of "ActDistill", arXiv 2511.18082 (k = 8).

    Example:
        >>> import torch
        >>> from xdfast.ops.graph import knn_graph
        >>> x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]])
        >>> knn_graph(x, x, k=1).flatten().tolist()
        [1, 0, 1]
    """
    _check_pairs(queries, keys)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k must be a positive integer (neighbours per token), got {k!r}")
    tokens = queries.shape[1]
    if mask is not None:
        _check_mask(mask, queries)
    _check_finite("queries", queries, mask)
    _check_finite("keys", keys, mask)
    with torch.no_grad():
        scores = _affinities(queries, keys)  # [B, T, T]
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -float("inf"))
        itself = torch.eye(tokens, dtype=torch.bool, device=scores.device)
        if not self_loops:
            scores = scores.masked_fill(itself, -float("inf"))
        found = scores.topk(min(k, tokens), dim=-1).indices  # [B, T, ≤ k]
        # asked of the index, not of the score: an affinity may have overflowed to -inf
        own = torch.arange(tokens, device=found.device)[:, None]
        real = torch.ones_like(found, dtype=torch.bool) if self_loops else found != own
        if mask is not None:
            real = real & mask[:, None].expand(-1, tokens, -1).gather(2, found)
        alone = ~real.any(-1) if mask is None else ~real.any(-1) & mask  # [B, T]
        found = found.masked_fill(~real, -1)
        first = torch.where(alone[..., None], own, found[..., :1])
        return F.pad(torch.cat((first, found[..., 1:]), -1), (0, k - found.shape[-1]), value=-1)


def edge_affinity(queries: Tensor, keys: Tensor, neighbours: Tensor) -> Tensor:
    r"""Affinity of every edge of a graph, differentiable: what trains the maps that :func:`knn_graph` chooses by.

    .. math::
        s_{ij} = q_i \cdot k_j, \quad j \in N_i

    Shape:
        queries, keys [B, T, R], neighbours [B, T, k] int64. Output: [B, T, k], float32 (float64 if an input is);
        0 where there is nobody (−1).

    Raises:
        TypeError, ValueError: as :func:`knn_graph` and :func:`graph_attention`.

    Example:
        >>> import torch
        >>> from xdfast.ops.graph import edge_affinity
        >>> x = torch.tensor([[[2.0], [3.0]]])
        >>> edge_affinity(x, x, torch.tensor([[[1], [-1]]])).flatten().tolist()
        [6.0, 0.0]
    """
    _check_pairs(queries, keys)
    _check_neighbours(neighbours, queries)
    # All pairs, then the listed ones: R is small, so this is one small product, where gathering k keys per token would
    # write k times the keys and scatter their gradients back.
    scores = _affinities(queries, keys).gather(2, neighbours.clamp(min=0))
    return scores.masked_fill(neighbours < 0, 0)


def graph_attention(
    values: Tensor,
    source_scores: Tensor,
    target_scores: Tensor,
    neighbours: Tensor,
    slope: float = 0.2,
    edge_scores: Tensor | None = None,
) -> Tensor:
    r"""Graph attention over a fixed number of neighbours; every token gathers from those it lists.

    .. math::
        e_{ij} = \mathrm{LeakyReLU}(s_j + t_i) + b_{ij}, \quad
        \alpha_{ij} = \frac{\exp(e_{ij} - \max_{j' \in N_i} e_{ij'})}
                           {\sum_{j' \in N_i} \exp(e_{ij'} - \max_{j'' \in N_i} e_{ij''})}, \quad
        o_i = \sum_{j \in N_i} \alpha_{ij} v_j

    per head, with :math:`s_j = a_{src} \cdot v_j` (the sender's part of the score) and :math:`t_i = a_{dst} \cdot v_i`
    (the receiver's). The softmax runs over the listed neighbours only, in float32 for half inputs, and cannot overflow.
    A neighbour of −1 has no weight; a token that lists nobody gets zeros. One that is listed
    twice counts twice. On the CPU it can be differentiated once (embedding bags).

    Args:
        values: v, one vector per token and head.
        source_scores: s.
        target_scores: t.
        neighbours: whom each token gathers from; see :func:`knn_graph`.
        slope: of LeakyReLU below zero.
        edge_scores: b, the same for all heads; None: 0, GAT as published.

    Shape:
        values [B, T, H, C]; source_scores, target_scores [B, T, H]; neighbours [B, T, k] int64, entries in −1 … T − 1;
        edge_scores [B, T, k]. Output: [B, T, H, C], of the values' dtype.

    Raises:
        TypeError: values or scores that are not floating point, neighbours that are not int64.
        ValueError: shapes or devices that do not fit, a slope < 0; on the CPU also neighbours that are not there.

    Reference:
        Veličković et al., "Graph Attention Networks", ICLR 2018, arXiv 1710.10903, equations 1 to 4.

    Example:
        >>> import torch
        >>> from xdfast.ops.graph import graph_attention
        >>> v, s = torch.tensor([[[[1.0]], [[3.0]], [[5.0]]]]), torch.zeros(1, 3, 1)
        >>> graph_attention(v, s, s, torch.tensor([[[1, 2], [0, 2], [0, 1]]])).flatten().tolist()
        [4.0, 3.0, 2.0]
    """
    _check_attention(values, source_scores, target_scores, edge_scores)
    _check_neighbours(neighbours, values, edge_scores)
    slope = check_number("slope", slope, minimum=0)
    weights, listed = _edge_weights(source_scores, target_scores, neighbours, slope, edge_scores)  # [B, H, T, k]
    # Under autocast scores may be half and values not; the sum is of the values' precision.
    weights = weights.to(values.dtype)
    return _sum_bags(values, weights, listed) if _has_bags(values) else _sum_dense(values, weights, listed)


def _has_bags(values: Tensor) -> bool:
    """Whether torch's weighted sum of listed rows (an embedding bag) is the fast way: on a CPU, not in half."""
    return values.device.type == "cpu" and values.dtype.itemsize >= 4


def _sum_bags(values: Tensor, weights: Tensor, listed: Tensor) -> Tensor:
    """Σ_k w v over the listed rows, without writing the gathered rows [B, T, k, H, C].

    One thread of a Xeon, 8 × 292 tokens, 4 × 256 values, 8 neighbours, forward and with backward: 4 and 19 ms; as a T×T
    product 21 and 63; gathered 106 and 210. 2048 tokens at once: 4 and 19, 164 and 391, 92 and 211.
    """
    samples, tokens, heads, width = values.shape
    row = listed + tokens * torch.arange(samples, device=listed.device)[:, None, None]
    row = row[:, :, None] * heads + torch.arange(heads, device=listed.device)[:, None]  # [B, T, H, k] of [B · T · H]
    bags = F.embedding_bag(
        row.flatten(0, 2),
        values.reshape(-1, width),
        mode="sum",
        per_sample_weights=weights.transpose(1, 2).flatten(0, 2),
    )
    return bags.view_as(values)


def _sum_dense(values: Tensor, weights: Tensor, listed: Tensor) -> Tensor:
    """The same as a product with the weights spread out to T×T, where products are cheap and scattered adds are not."""
    samples, tokens, heads, _ = values.shape
    table = weights.new_zeros(samples, heads, tokens, tokens)
    table = table.scatter_add(3, listed[:, None].expand(-1, heads, -1, -1), weights)
    return (table @ values.transpose(1, 2)).transpose(1, 2)


def _edge_weights(
    source_scores: Tensor, target_scores: Tensor, neighbours: Tensor, slope: float, edge_scores: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(softmax over the neighbours [B, H, T, k], the neighbours with the token itself for nobody [B, T, k])."""
    tokens, heads = source_scores.shape[1:]
    nobody = neighbours < 0
    listed = torch.where(nobody, torch.arange(tokens, device=neighbours.device)[:, None], neighbours)
    source, target = (x.transpose(1, 2) for x in wide(source_scores, target_scores))  # [B, H, T]
    index = listed.flatten(1)[:, None].expand(-1, heads, -1)  # [B, H, T · k]
    e = F.leaky_relu(source.gather(2, index).unflatten(2, (tokens, -1)) + target[..., None], slope)
    if edge_scores is not None:
        e = e + edge_scores[:, None].to(e.dtype)
    # the lowest number, not -inf: a row of nobodies would be NaN, and NaN times 0 in the backward too
    e = e.masked_fill(nobody[:, None], torch.finfo(e.dtype).min)
    return e.softmax(-1).masked_fill(nobody[:, None], 0), listed


def _affinities(queries: Tensor, keys: Tensor) -> Tensor:
    queries, keys = wide(queries, keys)
    with without_autocast(queries.device):
        return queries @ keys.transpose(1, 2)  # [B, T, T]


def _check_floating(name: str, x: Tensor, layout: str, dims: int) -> None:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor {layout}, got {_kind(x)}")
    if x.dim() != dims or x.numel() == 0:
        raise ValueError(f"{name} must have shape {layout} and not be empty, got {list(x.shape)}")


def _check_pairs(queries: Tensor, keys: Tensor) -> None:
    _check_floating("queries", queries, "[B, T, R]", 3)
    _check_floating("keys", keys, "[B, T, R]", 3)
    check_pair("queries", queries, "keys", keys, fix="both are projections of the same tokens to one width")


def _check_mask(mask: Tensor, tokens: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be a bool tensor (True: a token, False: padding), got {_kind(mask)}; use mask.bool()"
        )
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"mask must have shape [B, T] = {list(tokens.shape[:2])}, got {list(mask.shape)}")
    _check_device("mask", mask, tokens)


def _check_attention(values: Tensor, source: Tensor, target: Tensor, edges: Tensor | None) -> None:
    _check_floating("values", values, "[B, T, H, C]", 4)
    for name, scores in (("source_scores", source), ("target_scores", target)):
        _check_floating(name, scores, "[B, T, H]", 3)
        if scores.shape != values.shape[:3]:
            raise ValueError(
                f"{name} must have shape [B, T, H] = {list(values.shape[:3])}, that of the values without their last axis, "
                f"got {list(scores.shape)}"
            )
        _check_device(name, scores, values)
    if edges is not None:
        _check_floating("edge_scores", edges, "[B, T, k]", 3)
        _check_device("edge_scores", edges, values)


def _check_neighbours(neighbours: Tensor, tokens: Tensor, edges: Tensor | None = None) -> None:
    if not isinstance(neighbours, Tensor) or neighbours.dtype != torch.int64:
        raise TypeError(f"neighbours must be an int64 tensor [B, T, k], got {_kind(neighbours)}")
    samples, length = tokens.shape[:2]
    if neighbours.dim() != 3 or neighbours.shape[:2] != (samples, length) or neighbours.shape[2] < 1:
        raise ValueError(
            f"neighbours must have shape [B, T, k] with B={samples}, T={length} and k ≥ 1, got {list(neighbours.shape)}"
        )
    if edges is not None and edges.shape != neighbours.shape:
        raise ValueError(
            f"edge_scores must have the shape of the neighbours, {list(neighbours.shape)}, got {list(edges.shape)}"
        )
    _check_device("neighbours", neighbours, tokens)
    if _may_look(neighbours):
        low, high = neighbours.aminmax()
        if low < -1 or high >= length:
            raise ValueError(
                f"neighbours must be tokens 0 to {length - 1}, or -1 for nobody, got {int(low)} to {int(high)}"
            )


def _check_finite(name: str, x: Tensor, mask: Tensor | None) -> None:
    if not _may_look(x):
        return
    bad = ~x.isfinite().all(-1)
    bad = bad if mask is None else bad & mask
    if bool(bad.any()):
        sample, token = (int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"{name} must be finite: {int(bad.sum())} tokens hold NaN or infinity, the first is token {token} of sample "
            f"{sample}; look at the hidden states, and mask padding"
        )


def _check_device(name: str, x: Tensor, tokens: Tensor) -> None:
    if x.device != tokens.device:
        raise ValueError(f"{name} must be on {tokens.device}, as the tokens are, got {x.device}")


def _may_look(x: Tensor) -> bool:
    """Whether looking at values is free: on the CPU, outside the compiler and functorch."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
