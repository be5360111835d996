"""Crops: torchvision's distribution, and nothing but (seed, view, sample) and the image's size in them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from xdfast.data import Augment
from xdfast.data.crops import centre_crop, random_resized_crop
from xdfast.data.views import Views

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
sides = st.integers(1, 5000)


GOLDEN = [(1, 4, 460, 363), (157, 19, 235, 293), (155, 43, 214, 192), (209, 141, 156, 161)]
GOLDEN_VIEW = (111, 167, 245, 187)


def test_golden_boxes():
    """Boxes of version 1 of the algorithm: a cache or a paper's run can be made again only while these stay."""
    boxes = [
        random_resized_crop((seed, view, slot), 500, 375, 224, SCALE, RATIO).box
        for seed, view, slot in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (7, 3, 1_281_166))
    ]
    assert boxes == GOLDEN
    assert Views(Augment(), 224, True, 5).crop(2, 9, 500, 375).box == GOLDEN_VIEW


@given(width=sides, height=sides, slot=st.integers(0, 2**40))
def test_boxes_lie_in_the_image(width, height, slot):
    left, top, w, h = random_resized_crop((0, 0, slot), width, height, 32, SCALE, RATIO).box
    assert left >= 0 and top >= 0 and w >= 1 and h >= 1 and left + w <= width and top + h <= height


@given(width=sides, height=sides, size=st.integers(1, 300), pct=st.floats(0.3, 1))
def test_centre_windows_lie_in_the_resized_box(width, height, size, pct):
    crop = centre_crop(width, height, size, pct)
    left, top, w, h = crop.box
    assert left >= 0 and top >= 0 and left + w <= width and top + h <= height
    assert 0 <= crop.window[0] <= crop.size[0] - size and 0 <= crop.window[1] <= crop.size[1] - size


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64), (900, 120)])
def test_the_distribution_is_torchvisions(size):
    """Kolmogorov–Smirnov on each number of the box; at α = 1e-3 and a fixed seed this is a fact, not a chance."""
    width, height = size
    ours = np.array([random_resized_crop((1, 0, i), width, height, 8, SCALE, RATIO).box for i in range(4000)])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(SCALE), list(RATIO)) for _ in range(4000)])
    for column, other in enumerate((1, 0, 3, 2)):  # theirs: top, left, height, width
        assert ks_2samp(ours[:, column], theirs[:, other]).pvalue > 1e-3


def test_the_box_does_not_depend_on_the_size_of_the_view():
    for slot in range(50):
        small, large = (Views(Augment(), size, True, 3).crop(1, slot, 640, 480) for size in (96, 224))
        assert small.box == large.box and small.size == (96, 96) and large.size == (224, 224)
