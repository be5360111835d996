"""How good an embedding is, measured without training the network: k-NN, linear probe, CKA."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["knn_accuracy", "linear_cka", "linear_probe_accuracy"]


def knn_accuracy(
    train: Tensor,  # [M, D]
    train_labels: Tensor,  # [M]
    test: Tensor,  # [N, D]
    test_labels: Tensor,  # [N]
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 1024,
) -> float:
    """Top-1 of the weighted k-nearest-neighbour classifier on cosine similarity, in [0, 1].

    Each of the k nearest training samples votes for its class with weight exp(similarity / temperature).

    Reference:
        Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv 1805.01978, eq. 8;
        k = 20, temperature 0.07 as in DINO.
    """
    k = min(k, len(train))
    train = F.normalize(train.float(), dim=1)
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    right = 0
    for begin in range(0, len(test), chunk):
        similarity = F.normalize(test[begin : begin + chunk].float(), dim=1) @ train.T  # [n, M]
        value, index = similarity.topk(k, dim=1)
        votes = torch.zeros(len(value), classes, device=test.device)
        votes.scatter_add_(1, train_labels[index], (value / temperature).exp())
        right += int((votes.argmax(1) == test_labels[begin : begin + chunk]).sum())
    return right / len(test)


def linear_probe_accuracy(
    train: Tensor,  # [M, D]
    train_labels: Tensor,  # [M]
    test: Tensor,  # [N, D]
    test_labels: Tensor,  # [N]
    *,
    c: float = 1.0,
) -> float:
    """Top-1 of a logistic regression on standardised features, in [0, 1] (scikit-learn, L-BFGS, inverse penalty c)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
    probe.fit(_numpy(train), _numpy(train_labels))
    return float(probe.score(_numpy(test), _numpy(test_labels)))


def linear_cka(x: Tensor, y: Tensor) -> float:
    r"""Linear centred kernel alignment of two embeddings of the same samples, in [0, 1].

    .. math:: \mathrm{CKA} = \frac{\lVert Y^T X \rVert_F^2}{\lVert X^T X \rVert_F \, \lVert Y^T Y \rVert_F}

    x [N, D₁], y [N, D₂], centred here, float64. The Gram form is used when N is below the widths.

    Raises:
        ValueError: different numbers of samples, fewer than two, or an embedding that is constant.

    Reference:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv 1905.00414, section 3.
    """
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"CKA needs two embeddings of the same N ≥ 2 samples, got {list(x.shape)} and {list(y.shape)}")
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    if len(x) < min(x.shape[1], y.shape[1]):
        kx, ky = x @ x.T, y @ y.T
        cross, own = (kx * ky).sum(), kx.norm() * ky.norm()
    else:
        cross, own = (y.T @ x).square().sum(), (x.T @ x).norm() * (y.T @ y).norm()
    if own == 0:
        raise ValueError("CKA is undefined for an embedding that is the same for every sample")
    return float(cross / own)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
