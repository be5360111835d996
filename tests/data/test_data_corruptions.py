"""Corrupted pictures: the package's own corruptions, the same from any process and in any order."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("imagecorruptions", reason="imagecorruptions is not installed: pip install xdfast[analysis]")

from xdfast.data import Augment, ImageLoader
from xdfast.data.corruptions import FAMILIES, SEVERITIES, CorruptedSource, corruptions_version


def pictures(n=3, size=32) -> np.ndarray:
    y, x = np.mgrid[:size, :size] / size
    base = np.stack([x, y, 1 - x], axis=-1)
    return (255 * np.stack([np.roll(base, 5 * k, axis=1) for k in range(n)])).astype(np.uint8)


def test_every_corruption_of_the_package_is_there() -> None:
    from imagecorruptions import get_corruption_names

    for family, names in FAMILIES.items():
        listed = get_corruption_names(family)
        assert list(names) == listed


def test_cells_are_the_package_s_corruptions_of_each_picture() -> None:
    from imagecorruptions import corrupt

    pixels = pictures()
    source = CorruptedSource(pixels, np.array([0, 1, 0]), ["a", "b"], ["contrast", "gaussian_noise"])
    assert len(source) == 3 * (1 + 2 * 5) and source.labels.tolist()[:6] == [0, 1, 0, 0, 1, 0]
    assert source.cells[0] == ("contrast", 1) and source.cells[-1] == ("gaussian_noise", 5)
    np.testing.assert_array_equal(np.asarray(source.load(2)), pixels[2])
    np.testing.assert_array_equal(np.asarray(source.load(3 + 1)), corrupt(pixels[1], 1, "contrast"))  # draws nothing
    assert source.path(4) == "picture 1, contrast 1" and source.path(1) == "picture 1, clean"
    noisy = [np.asarray(source.load(3 * (6 + s))).astype(float) - pixels[0] for s in range(5)]
    spread = [float(np.abs(x).mean()) for x in noisy]
    assert spread == sorted(spread) and spread[0] > 5


def test_same_seed_same_pixels_from_anywhere() -> None:
    pixels, labels = pictures(2), np.array([0, 1])
    first, other = (CorruptedSource(pixels, labels, ["a", "b"], severities=(1, 4), seed=seed) for seed in (0, 1))
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    state = np.random.get_state()[1].copy()
    there = [np.asarray(first.load(i)) for i in range(len(first))]
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # the caller's generators are left alone
    np.random.seed(77)
    back = [np.asarray(first.load(i)) for i in reversed(range(len(first)))][::-1]
    for i, (a, b) in enumerate(zip(there, back, strict=True)):
        assert np.array_equal(a, b), first.path(i)
    loader = ImageLoader(first, 7, 32, train=False, augment=Augment(), workers=2, decoder="pillow")
    read = torch.cat([batch.images for batch in loader.epoch(0)]).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(read, np.stack(there))
    assert any(not np.array_equal(a, np.asarray(other.load(i))) for i, a in enumerate(there))


def test_bad_input(monkeypatch) -> None:
    good, labels = pictures(1), np.array([0])
    with pytest.raises(ValueError, match="unknown corruption 'fogg'. Did you mean 'fog'"):
        CorruptedSource(good, labels, ["a"], ["fogg"])
    with pytest.raises(ValueError, match=r"a severity is 1 \(weak\) to 5, got 6"):
        CorruptedSource(good, labels, ["a"], severities=(6,))
    with pytest.raises(ValueError, match=r"S ≥ 32, got uint8 \[1, 31, 31, 3\]"):
        CorruptedSource(pictures(1, 31), labels, ["a"])
    with pytest.raises(ValueError, match="got float64"):
        CorruptedSource(good / 255, labels, ["a"])
    with pytest.raises(ValueError, match="one label for each of 1 pictures, got 2"):
        CorruptedSource(good, np.array([0, 1]), ["a", "b"])
    assert corruptions_version().startswith("imagecorruptions") and SEVERITIES == (1, 2, 3, 4, 5)
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r'pip install "xdfast\[analysis\]"'):
        CorruptedSource(good, labels, ["a"])
