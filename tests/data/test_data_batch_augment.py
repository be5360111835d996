"""Mixup, CutMix and random erasing: right targets, the same for the same seed; and the presets that use them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from xdfast.data import Augment, BatchAugment, augment_preset, list_presets


def batch(count: int, size: int = 16, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 3, size, size, generator=generator), torch.arange(count) % classes


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_sum_to_one_and_name_the_images_mixed(count, mode, alphas):
    images, labels = batch(count)
    kept = images.clone()
    mix = BatchAugment(5, mixup=alphas[0], cutmix=alphas[1], mode=mode)
    assert mix.mixes
    for seed in range(6):
        out, targets = mix(images, labels, seed)
        assert images.equal(kept) and out.shape == images.shape and out.dtype == images.dtype
        assert targets.shape == (count, 5) and targets.dtype == torch.float32
        assert out.min() >= 0 and out.max() <= 1
        torch.testing.assert_close(targets.sum(1), torch.ones(count))
        even = count // 2 * 2
        for row in range(even):
            assert set(targets[row].nonzero().flatten().tolist()) <= {int(labels[row]), int(labels[even - 1 - row])}
        if count % 2:  # the odd one out, and so a batch of 1, is left as it is
            assert out[-1].equal(images[-1]) and targets[-1, labels[-1]] == 1


def test_mixup_mixes_images_as_it_mixes_targets():
    images, labels = batch(4)
    out, targets = BatchAugment(5, mixup=1.0)(images, labels, 3)
    share = targets[0, labels[0]]
    assert 0 < share < 1
    torch.testing.assert_close(out[0], share * images[0] + (1 - share) * images[3])


def test_cutmix_targets_are_the_areas():
    images, labels = batch(4)
    out, targets = BatchAugment(5, cutmix=1.0)(images, labels, 1)
    own = (out[0] == images[0]).all(0).float().mean()
    assert 0 < own < 1
    torch.testing.assert_close(targets[0, labels[0]], own)


@pytest.mark.parametrize("erase_mode", ["pixel", "rand", "const"])
def test_seeds_decide_and_global_generators_are_left_as_found(erase_mode):
    images, labels = batch(6)
    augment = BatchAugment(5, mixup=0.8, cutmix=1.0, random_erase=0.5, erase_mode=erase_mode)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    runs = [augment(images, labels, seed) for seed in (0, 1, 0)]
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    assert before[:2] == after[:2] and before[2].equal(after[2])
    assert all(a.equal(b) for a, b in zip(runs[0], runs[2])) and not runs[0][0].equal(runs[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_erasing_touches_rectangles_only(dtype):
    images, labels = batch(8)
    images = images.to(dtype)
    mean = (0.1, 0.5, 0.9)
    out, targets = BatchAugment(5, random_erase=1.0, erase_mode="const", mean=mean)(images, labels, 0)
    assert targets is labels and out.dtype == dtype
    for row in range(8):
        changed = (out[row] != images[row]).any(0)
        rows, columns = changed.nonzero().unbind(1)
        assert 0 < len(rows) < 256
        box = out[row, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        torch.testing.assert_close(box, torch.tensor(mean, dtype=dtype)[:, None, None].expand_as(box))


def test_nothing_on_changes_nothing():
    images, labels = batch(3)
    augment = BatchAugment(5)
    out, targets = augment(images, labels, 0)
    assert not augment.mixes and out.equal(images) and targets.equal(labels)
    assert not BatchAugment(5, mixup=1.0, prob=0.0).mixes
    assert repr(augment) == "BatchAugment(mixup=0.0, cutmix=0.0, random_erase=0.0)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, "num_classes must be ≥ 1"),
        ({"mixup": -1}, "mixup must be ≥ 0"),
        ({"cutmix": float("nan")}, "cutmix must be ≥ 0"),
        ({"prob": 1.1}, "prob must be a probability"),
        ({"mode": "row"}, "mode must be 'batch', 'pair' or 'elem'"),
        ({"erase_mode": "black"}, "erase_mode must be"),
        ({"erase_count": 0}, "erase_count must be ≥ 1"),
        ({"std": (1, 1, 0)}, "std > 0"),
        ({"mean": (1, 1)}, "must have 3 values"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        BatchAugment(**{"num_classes": 5, **settings})


def test_wrong_tensors():
    images, labels = batch(4)
    augment = BatchAugment(5, mixup=1.0)
    with pytest.raises(TypeError, match="use images.float\\(\\) / 255"):
        augment((images * 255).byte(), labels, 0)
    with pytest.raises(TypeError, match="labels must be int64"):
        augment(images, labels.float(), 0)
    for wrong in ((images[0], labels), (images, labels[:2]), (images[:, :1], labels)):
        with pytest.raises(ValueError, match=r"expected images \[B, 3, S, S\] and labels \[B\]"):
            augment(*wrong, 0)


# ---- presets


def test_every_preset_can_be_made():
    assert {"none", "small", "cifar-cnn", "cifar-vit", "imagenet-cnn", "imagenet-vit"} <= set(list_presets())
    for name in list_presets():
        view, mix = augment_preset(name, num_classes=10, mean=(0.5,) * 3, std=(0.2,) * 3)
        assert isinstance(view, Augment) and (mix is not None) == name.endswith("vit")
    assert augment_preset("none", num_classes=2)[0] == Augment(train_crop="none", hflip=0.0)


def test_overrides_reach_the_part_they_belong_to():
    view, mix = augment_preset("small", num_classes=10, hflip=0.25, cutmix=0.5, mean=(0.1, 0.2, 0.3))
    assert view.hflip == 0.25 and view.train_crop == "pad" and mix.cutmix == 0.5 and mix.mean == (0.1, 0.2, 0.3)
    view, mix = augment_preset("cifar-vit", num_classes=10, auto_augment="none", mixup=0, cutmix=0, random_erase=0)
    assert view.auto_augment is None and mix is None


def test_unknown_presets_and_settings_offer_the_nearest():
    with pytest.raises(ValueError, match="unknown augmentation preset 'cifar-vti'. Did you mean 'cifar-vit'"):
        augment_preset("cifar-vti", num_classes=10)
    with pytest.raises(TypeError, match="has no setting 'mixpu'. Did you mean 'mixup'"):
        augment_preset("none", num_classes=10, mixpu=1.0)
    with pytest.raises(ValueError, match="mixup must be ≥ 0"):
        augment_preset("none", num_classes=10, mixup=-1.0)
