"""k-NN, linear probe and CKA against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from xdfast.pipeline.probes import knn_accuracy, linear_cka, linear_probe_accuracy


def clusters(n: int, seed: int, spread: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 8, generator=torch.Generator().manual_seed(99)) * 2
    labels = torch.arange(n) % 4
    return centres[labels] + spread * torch.randn(n, 8, generator=generator), labels


def test_knn_on_separated_and_on_shuffled_classes() -> None:
    train, y = clusters(200, 0)
    test, z = clusters(100, 1)
    assert knn_accuracy(train, y, test, z) == 1.0
    shuffled = y[torch.randperm(200)]
    assert knn_accuracy(train, shuffled, test, z) < 0.5


def test_knn_with_one_neighbour_is_the_nearest_by_cosine() -> None:
    train, y = clusters(60, 0, spread=3.0)
    test, z = clusters(50, 1, spread=3.0)
    cosine = torch.nn.functional.cosine_similarity(test[:, None], train[None], dim=2)
    expected = (y[cosine.argmax(1)] == z).float().mean().item()
    assert knn_accuracy(train, y, test, z, k=1, chunk=7) == pytest.approx(expected)


def test_knn_with_more_neighbours_than_samples() -> None:
    train, y = clusters(4, 0, spread=0.01)
    assert knn_accuracy(train, y, *clusters(8, 1, spread=0.01), k=50) == 1.0


def test_linear_probe_needs_a_linear_boundary() -> None:
    train, y = clusters(200, 0)
    test, z = clusters(100, 1)
    assert linear_probe_accuracy(train, y, test, z) == 1.0
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 2, generator=generator) * 2 - 1
    xor = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).long()
    assert linear_probe_accuracy(x[:300], xor[:300], x[300:], xor[300:]) < 0.8


@pytest.mark.parametrize(("n", "d1", "d2"), [(40, 6, 9), (10, 30, 50), (10, 30, 5)])
def test_cka_is_the_normalised_hsic(n, d1, d2) -> None:
    x, y = torch.randn(n, d1), torch.randn(n, d2)
    centre = np.eye(n) - 1 / n

    def hsic(a, b):
        return np.trace(a.numpy() @ a.numpy().T @ centre @ b.numpy() @ b.numpy().T @ centre)

    a, b = x.double(), y.double()
    assert linear_cka(x, y) == pytest.approx(hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b)), rel=1e-10)


def test_cka_ignores_rotation_scale_and_shift() -> None:
    x = torch.randn(30, 6, dtype=torch.double)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.double)).Q
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0)
    assert linear_cka(x, torch.randn(30, 6)) < 0.5


def test_cka_bad_input() -> None:
    with pytest.raises(ValueError, match="same N ≥ 2 samples"):
        linear_cka(torch.randn(4, 3), torch.randn(5, 3))
    with pytest.raises(ValueError, match="the same for every sample"):
        linear_cka(torch.ones(4, 3), torch.randn(4, 3))
