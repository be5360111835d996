"""How good an embedding is, measured without training the network: k-NN, linear probe, CKA."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["MinibatchCKA", "gram", "knn_accuracy", "linear_cka", "linear_probe_accuracy"]


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


def gram(x: Tensor) -> Tensor:
    """``[n, n]`` inner products of the rows of ``[n, ...]``, flattened and centred, float32 on the CPU.

    Centring changes nothing in :class:`MinibatchCKA`, whose estimator does not see it, but keeps the digits: a mean far from
    zero would eat them.
    """
    x = x.detach().flatten(1).float()
    x = x - x.mean(0)
    return (x @ x.T).cpu()


class MinibatchCKA:
    r"""Linear CKA of every layer of one model with every layer of another, batch by batch, in bounded memory.

    .. math::
        \mathrm{CKA}_{ij} = \frac{\sum_b H(K^b_i, L^b_j)}{\sqrt{\sum_b H(K^b_i, K^b_i) \sum_b H(L^b_j, L^b_j)}}, \qquad
        H(K, L) = \frac{1}{n (n - 3)} \Big( \mathrm{tr}(\tilde K \tilde L)
        + \frac{1^T \tilde K 1 \; 1^T \tilde L 1}{(n - 1)(n - 2)} - \frac{2}{n - 2} 1^T \tilde K \tilde L 1 \Big)

    with :math:`K = X X^T` of a batch of n samples and :math:`\tilde K` the same with a zero diagonal. H is the unbiased estimator
    of HSIC: its mean does not hang on n, so small batches give what one large batch would, where the biased one of
    :func:`linear_cka` grows towards 1 as n falls below the width of a layer. A value may be a little below 0, or above 1.

    Computed as the inner product of U-centred matrices, which is the same: all pairs of layers in one matrix product.

    Args:
        rows, columns: how many layers the two models have.

    Reference:
        Nguyen, Raghu and Kornblith, "Do Wide and Deep Networks Learn the Same Things?", arXiv 2010.15327, eq. 2 and 3.
        Song et al., "Feature Selection via Dependence Maximization", JMLR 13, 2012 (the estimator). Székely and Rizzo, "Partial
        Distance Correlation with Methods for Dissimilarities", Ann. Statist. 42, 2014 (U-centring).
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._cross = torch.zeros(rows, columns, dtype=torch.float64)
        self._rows = torch.zeros(rows, dtype=torch.float64)
        self._columns = torch.zeros(columns, dtype=torch.float64)
        self.samples = 0

    def update(self, rows: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
        """Adds a batch: Gram matrices ``[n, n]`` of each layer of the two models on the same n samples, see :func:`gram`.

        Raises:
            ValueError: fewer than four samples, or matrices of other shapes or numbers.
        """
        shapes = {tuple(k.shape) for k in (*rows, *columns)}
        if (len(rows), len(columns)) != tuple(self._cross.shape) or len(shapes) != 1:
            raise ValueError(
                f"expected {self._cross.shape[0]} and {self._cross.shape[1]} Gram matrices [n, n] of the same n samples, got "
                f"{len(rows)} and {len(columns)} of shapes {sorted(shapes)}"
            )
        (shape,) = shapes
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] < 4:
            raise ValueError(f"the unbiased HSIC needs Gram matrices [n, n] of n ≥ 4 samples, got {list(shape)}")
        n = shape[0]
        own, other = (torch.stack([_u_centred(m) for m in side]).flatten(1) for side in (rows, columns))  # [layers, n²]
        scale = 1 / (n * (n - 3))
        self._cross += scale * (own @ other.T)
        self._rows += scale * own.square().sum(1)
        self._columns += scale * other.square().sum(1)
        self.samples += n

    def compute(self) -> Tensor:
        """``[rows, columns]`` float64; NaN where a layer says the same of every sample.

        Raises:
            ValueError: nothing was added.
        """
        if self.samples == 0:
            raise ValueError("CKA of no batch: update() it first")
        own = (self._rows[:, None] * self._columns).sqrt()
        return torch.where(own > 0, self._cross / own, torch.nan)


def _u_centred(matrix: Tensor) -> Tensor:
    """Off the diagonal, K minus what its row and its column have in common; zero on it. float64."""
    k = matrix.double().clone()
    k.fill_diagonal_(0)
    n = len(k)
    rows = k.sum(1) / (n - 2)
    k = k - rows[:, None] - rows + rows.sum() / (n - 1)
    return k.fill_diagonal_(0)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
