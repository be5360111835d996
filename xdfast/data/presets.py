"""Augmentation by name: what the recipes use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from xdfast.data.batch_augment import IMAGENET_MEAN, IMAGENET_STD, BatchAugment
from xdfast.data.views import Augment
from xdfast.errors import nearest

__all__ = ["augment_preset", "list_presets"]

_STRONG_VIEW = {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4}
_STRONG_BATCH = {"mixup": 0.8, "cutmix": 1.0, "random_erase": 0.25}

# name: (fields of Augment, fields of BatchAugment). CIFAR and ImageNet, CNN and ViT: RSD's published settings (arXiv
# 2507.21844); the CIFAR images are shifted rather than cropped at random scale, as DeiT does for 32-pixel images.
_PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({"train_crop": "none", "hflip": 0.0}, {}),
    "small": ({"train_crop": "pad", "hflip": 0.0}, {}),  # shifts only: right for digits and letters too
    "cifar-cnn": ({"train_crop": "pad"}, {}),
    "cifar-vit": ({"train_crop": "pad", **_STRONG_VIEW}, _STRONG_BATCH),
    "imagenet-cnn": ({}, {}),
    "imagenet-feature": ({"scale": (0.25, 1.0)}, {}),  # nothing that would change what the image shows
    "imagenet-vit": (_STRONG_VIEW, _STRONG_BATCH),
}
_BATCH_FIELDS = ("mixup", "cutmix", "prob", "switch_prob", "mode", "random_erase", "erase_mode", "erase_count")


def list_presets() -> list[str]:
    """Names :func:`augment_preset` knows."""
    return list(_PRESETS)


def augment_preset(
    name: str,
    *,
    num_classes: int,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    **overrides: Any,
) -> tuple[Augment, BatchAugment | None]:
    """Views and batch augmentation of a recipe.

    Args:
        name: ``"none"``; ``"small"`` (shifts only); ``"cifar-cnn"`` (shifts, flips); ``"cifar-vit"`` (and RandAugment,
            mixup 0.8, CutMix 1, random erasing 0.25); ``"imagenet-cnn"`` (random resized crop, flips);
            ``"imagenet-feature"`` (crops of a quarter or more, flips: for features without labels); ``"imagenet-vit"``
            (random resized crop and the rest of cifar-vit).
        num_classes: C, for mixup and CutMix.
        mean, std: normalisation of the model that learns, for random erasing.
        overrides: fields of :class:`Augment` or :class:`BatchAugment` to set otherwise; ``auto_augment="none"`` turns the
            preset's policy off.

    Returns:
        The views, and the batch augmentation or None if there is nothing to do.

    Raises:
        ValueError: unknown preset (the nearest are offered), or a value out of range.
        TypeError: unknown override.
    """
    if name not in _PRESETS:
        raise ValueError(
            f"unknown augmentation preset {name!r}.{nearest(name, _PRESETS)} There are: {', '.join(_PRESETS)}"
        )
    view_fields = [f.name for f in dataclasses.fields(Augment)]
    for key in overrides:
        if key not in view_fields and key not in _BATCH_FIELDS:
            raise TypeError(f"augment_preset() has no setting {key!r}.{nearest(key, [*view_fields, *_BATCH_FIELDS])}")
    view = _PRESETS[name][0] | {k: v for k, v in overrides.items() if k in view_fields}
    batch = _PRESETS[name][1] | {k: v for k, v in overrides.items() if k in _BATCH_FIELDS}
    if view.get("auto_augment") in ("none", ""):
        view["auto_augment"] = None
    batch_augment = BatchAugment(num_classes, mean=mean, std=std, **batch)
    active = batch_augment.random_erase > 0 or batch_augment.mixes
    return Augment(**view), batch_augment if active else None
