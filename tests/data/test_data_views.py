"""Views: right pixels, right shapes, and nothing but (seed, epoch, sample) in them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tolerances import VIEW_LSB

from xdfast.data import Augment
from xdfast.data._rng import preserved_rng
from xdfast.data.views import Views

POLICIES = [
    "rand-m9-mstd0.5-inc1",
    "rand-m10-n2-tweights",
    "augmix-m5-w4-d2",
    "original",
    "v0",
    "original-mstd0.5",
    "3a",
]


def view(views: Views, image: Image.Image, epoch: int = 0, slot: int = 0) -> torch.Tensor:
    with preserved_rng():
        return views.finish(stack([views.base(image, epoch, slot)]), np.array([epoch]), np.array([slot]))[0]


def stack(bases: list[np.ndarray]) -> torch.Tensor:
    """uint8 [B, 3, S, S] from [S, S, 3] each."""
    return torch.from_numpy(np.stack(bases)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (8, 8), (1, 1), (3, 200)])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("crop", ["rrc", "pad", "none"])
def test_shape_and_type_whatever_the_image(picture, size, train, crop):
    out = view(Views(Augment(train_crop=crop), 16, train, 0), picture(0, size))
    assert out.shape == (3, 16, 16) and out.dtype == torch.uint8


def test_the_evaluation_view_is_resize_and_centre_crop(picture):
    image = picture(0, (40, 20))
    out = view(Views(Augment(interpolation="bilinear", crop_pct=0.5), 8, False, 0), image)
    resized = image.resize((32, 16), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(out.permute(1, 2, 0), resized.crop((12, 4, 20, 12)), atol=1)
    same = view(Views(Augment(), 10, False, 0), picture(1, (10, 10)))
    np.testing.assert_array_equal(same.permute(1, 2, 0), picture(1, (10, 10)))


def test_a_long_strip_costs_no_gigabytes(picture):
    views = Views(Augment(), 64, False, 0)
    assert max(views.crop(0, 0, 2, 20000).size) <= 64 * 32 and max(views.crop(0, 0, 20000, 2).size) <= 64 * 32
    assert view(views, picture(0, (2, 20000))).shape == (3, 64, 64)


@pytest.mark.parametrize("crop", ["rrc", "pad"])
def test_draws_follow_seed_epoch_and_sample_only(picture, crop):
    image, augment = picture(0, (32, 32)), Augment(train_crop=crop, color_jitter=0.4)
    one, other = Views(augment, 16, True, 5), Views(augment, 16, True, 6)
    first = view(one, image, 2, 7)
    torch.rand(3), np.random.rand(3)
    assert first.equal(view(Views(augment, 16, True, 5), image, 2, 7))
    assert not first.equal(view(one, image, 3, 7)) and not first.equal(view(one, image, 2, 8))
    assert not first.equal(view(other, image, 2, 7))


def test_padded_shifts_are_windows_of_the_padded_image(picture):
    views = Views(Augment(train_crop="pad", hflip=0.5), 16, True, 0)
    bases = stack([views.base(picture(i, (16, 16)), 1, i) for i in range(300)])
    kept = bases.clone()
    out = views.finish(bases, np.ones(300, dtype=np.int64), np.arange(300))
    assert bases.equal(kept) and out.shape == bases.shape
    padded = torch.nn.functional.pad(bases, (2, 2, 2, 2))
    places = set()
    for row in range(300):
        windows = {(t, l): padded[row, :, t : t + 16, l : l + 16] for t in range(5) for l in range(5)}  # noqa: E741
        found = [
            (*at, flip) for at, w in windows.items() for flip in (0, 1) if out[row].equal(w.flip(2) if flip else w)
        ]
        assert len(found) == 1
        places.add(found[0])
    assert len(places) > 45 and len({p[:2] for p in places}) == 25  # all 50 are possible


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_the_pixels_are_those_of_timm_and_torchvision(picture, interpolation, train):
    """The place exactly; the resize as VIEW_LSB says, on noise, where it differs most (photographs: a tenth of that)."""
    from timm.data import create_transform
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resized_crop

    for number, size in enumerate([(50, 37), (37, 51), (33, 33), (20, 90), (16, 16)]):
        image = picture(number, size)
        if train:
            views = Views(Augment(interpolation=interpolation, hflip=0), 16, True, 3)
            left, top, width, height = views.crop(2, number, *size).box
            mode = InterpolationMode(interpolation)
            expected = np.array(resized_crop(image, top, left, height, width, [16, 16], mode)).transpose(2, 0, 1)
        else:
            views = Views(Augment(interpolation=interpolation, crop_pct=0.875), 16, False, 0)
            expected = create_transform(16, interpolation=interpolation, crop_pct=0.875, normalize=False)(image)
        off = np.abs(view(views, image, 2, number).numpy().astype(int) - np.asarray(expected).astype(int))
        assert off.mean() <= VIEW_LSB["mean"] and off.max() <= VIEW_LSB[interpolation]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_smooth_pictures_are_within_a_quarter_step_of_timm(picture, interpolation):
    from timm.data import create_transform

    views = Views(Augment(interpolation=interpolation, crop_pct=0.875), 64, False, 0)
    theirs = create_transform(64, interpolation=interpolation, crop_pct=0.875, normalize=False)
    off = []
    for number in range(20):
        image = picture(number, (9, 7)).resize((130 + 7 * number, 170 - 3 * number), Image.Resampling.BICUBIC)
        off.append(np.abs(view(views, image).numpy().astype(int) - np.asarray(theirs(image)).astype(int)).mean())
    assert np.mean(off) <= VIEW_LSB["photographs"]


def test_jitter_is_that_of_torchvision(picture):
    from torchvision.transforms import functional

    image = picture(0, (16, 16))
    views = Views(Augment(train_crop="none", hflip=0, color_jitter=0.4), 16, True, 0)
    orders, factors = set(), []
    for slot in range(200):
        expected = image
        for name, factor in views.jitter(1, slot):
            expected = getattr(functional, f"adjust_{name}")(expected, factor)
            factors.append(factor)
        np.testing.assert_array_equal(view(views, image, 1, slot).permute(1, 2, 0), expected)
        orders.add(tuple(name for name, _ in views.jitter(1, slot)))
    assert len(orders) == 6 and 0.6 <= min(factors) < 0.62 and 1.38 < max(factors) <= 1.4
    assert not Views(Augment(), 16, True, 0).jitter(1, 0)
    assert not Views(Augment(color_jitter=0.4, auto_augment="original"), 16, True, 0).jitter(1, 0)  # as in timm


def test_the_facts_tell_views_apart():
    facts = [
        Views(Augment(**settings), size, train, seed).facts()
        for settings, size, train, seed in (
            ({}, 16, True, 0),
            ({"hflip": 0.0}, 16, True, 0),
            ({"scale": (0.1, 1)}, 16, True, 0),
            ({}, 17, True, 0),
            ({}, 16, False, 0),
            ({}, 16, True, 1),
        )
    ]
    assert len({json.dumps(f, sort_keys=True) for f in facts}) == 6


def test_a_batch_and_its_rows_agree(picture):
    views = Views(Augment(train_crop="pad", auto_augment="rand-m9-mstd0.5-inc1"), 16, True, 0)
    bases, numbers = stack([views.base(picture(i, (16, 16)), 3, i) for i in range(5)]), np.array([3, 0, 3, 1, 2])
    with preserved_rng():
        whole = views.finish(bases, numbers, np.arange(5))
        rows = [views.finish(bases[i : i + 1], numbers[i : i + 1], np.arange(i, i + 1))[0] for i in reversed(range(5))]
    assert whole.equal(torch.stack(rows[::-1]))


@pytest.mark.parametrize("hflip", [0.0, 1.0])
def test_flips_have_their_probability(picture, hflip):
    image = picture(0, (16, 16))
    out = view(Views(Augment(train_crop="none", hflip=hflip), 16, True, 0), image)
    plain = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert out.equal(plain.flip(2) if hflip else plain)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("crop", ["rrc", "pad"])
def test_policies_of_timm_run_and_repeat(picture, policy, crop):
    views = Views(Augment(train_crop=crop, auto_augment=policy), 16, True, 0)
    out = torch.stack([view(views, picture(1, (24, 20)), 0, slot) for slot in range(20)])
    again = torch.stack([view(views, picture(1, (24, 20)), 0, slot) for slot in range(20)])
    assert out.dtype == torch.uint8 and out.equal(again) and len({bytes(v.numpy()) for v in out}) > 10


@pytest.mark.parametrize("crop", ["rrc", "pad"])
@pytest.mark.parametrize(
    "policy",
    ["rand-mfoo", "rand-m9-foo", "rand-q3", "rnd-m9", "augmix-x3", "rand-m9-twrong", "rand-9", "original-foo", "rand9"],
)
def test_a_wrong_policy_is_reported_when_the_views_are_made(policy, crop):
    with pytest.raises(ValueError, match=rf"auto_augment '{policy}'.* examples: 'rand-m9-mstd0.5-inc1'"):
        Views(Augment(train_crop=crop, auto_augment=policy), 16, True, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": (0.5, 0.1)}, "scale must be"),
        ({"scale": (0.0, 1.0)}, "scale must be"),
        ({"scale": (0.5, 1.5)}, "scale must be"),
        ({"ratio": (2.0, float("nan"))}, "ratio must be"),
        ({"hflip": 1.5}, "hflip must be a probability"),
        ({"color_jitter": -1}, "color_jitter must be ≥ 0"),
        ({"crop_pct": 0}, "crop_pct must be in"),
        ({"train_crop": "pads"}, "train_crop must be one of rrc, pad, none, got 'pads'. Did you mean 'pad'?"),
        ({"interpolation": "bicubik"}, "Did you mean 'bicubic'?"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Augment(**settings)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "16"])
def test_the_size_is_a_number_of_pixels(size):
    with pytest.raises(ValueError, match="image_size must be an integer ≥ 1"):
        Views(Augment(), size, False, 0)
