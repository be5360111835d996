"""Graph ops by their definition: every pair of tokens, truth in tests. Any floating dtype, T×T matrices and all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["graph_attention_reference", "knn_graph_reference"]


def knn_graph_reference(
    queries: Tensor, keys: Tensor, k: int, mask: Tensor | None = None, self_loops: bool = False
) -> Tensor:
    """For each token of each sample: the others that are no padding, by falling affinity. [B, T, R] twice → [B, T, k]."""
    samples, tokens, _ = queries.shape
    neighbours = torch.full((samples, tokens, k), -1)
    for b in range(samples):
        real = [j for j in range(tokens) if mask is None or mask[b, j]]
        for i in range(tokens):
            others = [j for j in real if self_loops or j != i] or [j for j in real if j == i]
            others.sort(key=lambda j: -float(queries[b, i] @ keys[b, j]))
            neighbours[b, i, : len(others)] = torch.tensor(others[:k], dtype=torch.int64)[:k]
    return neighbours


def graph_attention_reference(
    values: Tensor,
    source_scores: Tensor,
    target_scores: Tensor,
    neighbours: Tensor,
    slope: float = 0.2,
    edge_scores: Tensor | None = None,
) -> Tensor:
    """Σ_j n_ij exp(e_ij) v_j / Σ_j n_ij exp(e_ij), n_ij how often i lists j; zeros for a token that lists nobody."""
    tokens = values.shape[1]
    e = F.leaky_relu(source_scores[:, None] + target_scores[:, :, None], slope)  # [B, i, j, H]
    lists = F.one_hot(neighbours + 1, tokens + 1)[..., 1:].to(values)  # [B, i, k, j]
    if edge_scores is None:
        e = e - e.amax(2, keepdim=True)
        n = lists.sum(2)  # [B, i, j]
    else:  # an edge that is listed twice has two scores
        e = e - e.amax(2, keepdim=True)
        n = (lists * (edge_scores - edge_scores.amax(2, keepdim=True)).exp()[..., None]).sum(2)
    weights = n[..., None] * e.exp()
    total = weights.sum(2)  # [B, i, H]
    return torch.einsum("bijh,bjhc->bihc", weights, values) / total.where(total > 0, 1)[..., None]
