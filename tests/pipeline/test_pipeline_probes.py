"""k-NN, linear probe and CKA against independent computations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from xdfast.pipeline.probes import MinibatchCKA, gram, knn_accuracy, linear_cka, linear_probe_accuracy


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


def hsic_of_song(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """Equation 3 of Nguyen et al., term by term, in fp64."""
    n = len(k)
    k, m = (x.double() - torch.diag(x.double().diagonal()) for x in (k, m))
    one = torch.ones(n, 1, dtype=torch.float64)
    first = torch.trace(k @ m)
    second = (one.T @ k @ one) * (one.T @ m @ one) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (one.T @ k @ m @ one)
    return ((first + second - third) / (n * (n - 3))).squeeze()


def hsic_by_quadruples(k: torch.Tensor, m: torch.Tensor) -> float:
    """The U-statistic itself: the mean over ordered quadruples of different samples."""
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in itertools.permutations(range(len(k)), 4)]
    return float(torch.stack(terms).mean())


def test_minibatch_cka_is_the_equation_of_the_paper() -> None:
    g = torch.Generator().manual_seed(0)
    batches = [
        ([torch.randn(n, 5, generator=g), torch.randn(n, 7, generator=g)], [torch.randn(n, 3, generator=g)])
        for n in (12, 9)
    ]
    batches = [(xs, [y + xs[0][:, :3]]) for xs, (y,) in batches]
    probe = MinibatchCKA(2, 1)
    for xs, ys in batches:
        probe.update([gram(x) for x in xs], [gram(y) for y in ys])
    assert probe.samples == 21
    for i in range(2):
        pairs = [(xs[i].double() @ xs[i].double().T, ys[0].double() @ ys[0].double().T) for xs, ys in batches]
        cross, own, other = (
            sum(hsic_of_song(*chosen(k, m)) for k, m in pairs)
            for chosen in (lambda k, m: (k, m), lambda k, m: (k, k), lambda k, m: (m, m))
        )
        assert float(probe.compute()[i, 0]) == pytest.approx(float(cross / (own * other).sqrt()), rel=1e-5)


def test_the_estimator_is_the_u_statistic_and_blind_to_the_mean() -> None:
    x, y = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    k, m = x @ x.T, y @ y.T
    assert float(hsic_of_song(k, m)) == pytest.approx(hsic_by_quadruples(k, m), rel=1e-10)
    plain, shifted = MinibatchCKA(1, 1), MinibatchCKA(1, 1)
    plain.update([k], [m])
    shifted.update([(x + 5) @ (x + 5).T], [m])
    assert float(plain.compute()) == pytest.approx(float(shifted.compute()), rel=1e-9)
    offset = MinibatchCKA(1, 1)  # float32 keeps its digits where the mean is a thousand times the spread
    offset.update([gram(x.float() + 1000)], [gram(y.float())])
    assert float(offset.compute()) == pytest.approx(float(plain.compute()), rel=1e-2)


def test_small_batches_say_what_the_whole_set_says_where_the_biased_estimator_does_not() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1024, 64, generator=g)
    y = torch.randn(1024, 256, generator=g)
    y[:, :32] += x[:, :32]
    whole = linear_cka(x, y)  # 1,024 samples: little bias
    pieces, biased = MinibatchCKA(1, 1), []
    for a, b in zip(x.split(32), y.split(32), strict=True):
        pieces.update([gram(a)], [gram(b)])
        biased.append(linear_cka(a, b))
    once = MinibatchCKA(1, 1)
    once.update([gram(x)], [gram(y)])
    assert float(pieces.compute()) == pytest.approx(float(once.compute()), abs=0.03)
    assert np.mean(biased) > whole + 0.3
    same, unrelated = MinibatchCKA(1, 1), MinibatchCKA(1, 1)
    for a, b in zip(x.split(32), torch.randn(1024, 64, generator=g).split(32), strict=True):
        same.update([gram(a)], [gram(3 * a + 1)])
        unrelated.update([gram(a)], [gram(b)])
    assert float(same.compute()) == pytest.approx(1, abs=1e-5) and abs(float(unrelated.compute())) < 0.03


def test_minibatch_cka_bad_input() -> None:
    probe = MinibatchCKA(1, 2)
    with pytest.raises(ValueError, match="no batch"):
        probe.compute()
    with pytest.raises(ValueError, match="expected 1 and 2 Gram matrices"):
        probe.update([torch.eye(5)], [torch.eye(5)])
    with pytest.raises(ValueError, match=r"of shapes \[\(4, 4\), \(5, 5\)\]"):
        probe.update([torch.eye(5)], [torch.eye(5), torch.eye(4)])
    with pytest.raises(ValueError, match="n ≥ 4 samples"):
        probe.update([torch.eye(3)], [torch.eye(3), torch.eye(3)])
    constant, moving = gram(torch.ones(6, 4)), gram(torch.randn(6, 4))
    probe.update([moving], [constant, moving])
    assert torch.isnan(probe.compute()[0, 0]) and float(probe.compute()[0, 1]) == pytest.approx(1)
