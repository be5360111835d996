"""What a model gets to see of an image: crops, flips and RandAugment, each a function of (seed, epoch, sample)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from xdfast.data._rng import hash64, hash_int, reseed, uniform
from xdfast.errors import nearest

__all__ = ["Augment", "Views"]

_CROPS = ("rrc", "pad", "none")
_INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")
_POLICY_EXAMPLES = "examples: 'rand-m9-mstd0.5-inc1', 'augmix-m5-w4-d2', 'original'"
_LONGEST = 32
_VIEW = 0x56494557  # keeps the draws of views apart from those of the order and of replacements


@dataclass(frozen=True)
class Augment:
    """Views of single images.

    Attributes:
        scale: area of the random crop relative to the image (``train_crop="rrc"``).
        ratio: its aspect ratio.
        hflip: probability of a horizontal flip.
        auto_augment: timm's policy string, such as ``"rand-m9-mstd0.5-inc1"``, ``"augmix-m5-w4-d2"``, ``"original"``.
        color_jitter: strength of brightness, contrast and saturation jitter; not used with ``auto_augment``, as in timm.
        interpolation: of all resizing, antialiased.
        crop_pct: evaluation: the short side is resized to ``image_size / crop_pct``, then the centre is cropped.
        train_crop: ``"rrc"`` random resized crop; ``"pad"`` resize, pad ``image_size / 8`` (4 of 32) with black, random
            crop, the practice for CIFAR; ``"none"`` resize and centre crop.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    auto_augment: str | None = None
    color_jitter: float = 0.0
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    train_crop: str = "rrc"

    def __post_init__(self) -> None:
        for name, values, low, high in (("scale", self.scale, 0.0, 1.0), ("ratio", self.ratio, 0.0, float("inf"))):
            if len(values) != 2 or not low < values[0] <= values[1] <= high:
                raise ValueError(f"{name} must be (smallest, largest) in ({low:g}, {high:g}], got {values!r}")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip must be a probability, got {self.hflip!r}")
        if not self.color_jitter >= 0:
            raise ValueError(f"color_jitter must be ≥ 0, got {self.color_jitter!r}")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be in (0, 1], got {self.crop_pct!r}")
        for name, value, allowed in (
            ("train_crop", self.train_crop, _CROPS),
            ("interpolation", self.interpolation, _INTERPOLATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.{nearest(value, allowed)}")


class Views:
    """Makes the uint8 views of a batch.

    Two kinds. A *fixed* base (evaluation, and the crops ``"pad"`` and ``"none"``) depends on the image alone, so it can be
    cached; shifts and flips then act on the whole batch. A *random* crop (``"rrc"``) goes through timm's transform, image
    by image.

    Args:
        augment: settings.
        image_size: S, the side of the view in pixels.
        train: augmented views, or the evaluation view.
        seed: of all draws.

    Raises:
        ValueError: ``auto_augment`` is not a policy timm knows.
    """

    def __init__(self, augment: Augment, image_size: int, train: bool, seed: int) -> None:
        if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size must be an integer ≥ 1 (pixels), got {image_size!r}")
        self.augment = augment
        self.image_size = image_size
        self.train = train
        self.seed = seed
        self.fixed_base = not train or augment.train_crop != "rrc"
        self._made: dict[str, Callable[[Image.Image], Any]] = {}
        _ = (
            self._base if self.fixed_base else self._random,
            self._colours,
        )  # a bad setting is reported here, not in a worker

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}  # rebuilt in the process that uses it

    @property
    def batched(self) -> bool:
        """True if nothing is left to do image by image once the bases are there."""
        return self.fixed_base and self._colours is None

    def reseed(self, epoch: int, slot: int) -> None:
        """Seeds the global generators for one sample; inside ``preserved_rng``."""
        reseed(hash_int(self.seed, _VIEW, epoch, slot))

    def base(self, image: Image.Image) -> Tensor:
        """uint8 ``[3, S, S]``; a function of the image alone where ``fixed_base``, else randomly cropped."""
        if self.fixed_base:
            image = _trim(image)
        view = (self._base if self.fixed_base else self._random)(image)
        return view if isinstance(view, Tensor) else _to_tensor(view)

    def finish(self, bases: Tensor, epoch: int, slots: np.ndarray) -> Tensor:
        """Shifts, flips and colours a batch of fixed bases.

        Args:
            bases: uint8 ``[B, 3, S, S]``; not modified.
            epoch: which epoch.
            slots: int64 ``[B]`` the samples' ids.

        Returns:
            uint8 ``[B, 3, S, S]``. For evaluation and random crops ``bases`` itself.
        """
        if not self.train or not self.fixed_base:
            return bases
        draws = [uniform(hash64(self.seed, _VIEW, epoch, slots, salt)) for salt in (1, 2, 3)]  # each [B] in [0, 1)
        if self.augment.train_crop == "pad":
            bases = _shift(bases, draws[0], draws[1])
        if self.augment.hflip > 0:
            flip = torch.from_numpy(draws[2] < self.augment.hflip)
            bases = torch.where(flip[:, None, None, None], bases.flip(3), bases)
        if self._colours is not None:
            colours = self._colours
            views = torch.empty_like(bases)
            for row, slot in enumerate(slots):
                self.reseed(epoch, int(slot))
                views[row] = _to_tensor(colours(Image.fromarray(bases[row].permute(1, 2, 0).contiguous().numpy())))
            bases = views
        return bases

    @property
    def _base(self) -> Callable[[Image.Image], Any]:
        """Resize of the short side and centre crop: timm's evaluation transform."""
        if "base" not in self._made:
            from timm.data import create_transform

            self._made["base"] = create_transform(
                self.image_size,
                is_training=False,
                interpolation=self.augment.interpolation,
                crop_pct=1.0 if self.train else self.augment.crop_pct,
                normalize=False,
            )
        return self._made["base"]

    @property
    def _random(self) -> Callable[[Image.Image], Any]:
        """timm's training transform, up to uint8."""
        if "random" not in self._made:
            self._made["random"] = self._timm_train(
                scale=self.augment.scale, ratio=self.augment.ratio, hflip=self.augment.hflip
            )
        return self._made["random"]

    @property
    def _colours(self) -> Callable[[Image.Image], Any] | None:
        """The part of timm's training transform after crop and flip, for fixed bases; None if there is nothing in it."""
        if not self.train or not self.fixed_base or not (self.augment.auto_augment or self.augment.color_jitter):
            return None
        if "colours" not in self._made:
            self._made["colours"] = self._timm_train(separate=True)[1]
        return self._made["colours"]

    def _timm_train(self, **options: Any) -> Any:
        from timm.data import create_transform

        policy = self.augment.auto_augment
        jitter: Any = self.augment.color_jitter or None  # with 0 timm would add a step that draws numbers for nothing
        wrong = _wrong_sections(policy) if policy else ""
        if wrong:
            raise ValueError(f"auto_augment {policy!r}: {wrong} means nothing to timm; {_POLICY_EXAMPLES}")
        try:
            transform = create_transform(
                self.image_size,
                is_training=True,
                color_jitter=jitter,
                auto_augment=policy or None,
                interpolation=self.augment.interpolation,
                normalize=False,
                **options,
            )
        except (AssertionError, KeyError, ValueError, IndexError) as error:
            if not policy:
                raise
            raise ValueError(
                f"auto_augment {policy!r} is not a policy timm knows ({type(error).__name__} {error}); "
                f"{_POLICY_EXAMPLES}"
            ) from error
        for part in transform if isinstance(transform, tuple) else (transform,):
            for step in part.transforms:
                _allow_zero_bits(step)
        return transform


def _wrong_sections(policy: str) -> str:
    """The sections of a policy that timm would pass over in silence: letters without a number, unknown sets of transforms."""
    from timm.data.auto_augment import rand_augment_choices

    name, *sections = str(policy).split("-")
    wrong = [s for s in sections if not (re.search(r"[a-z]\d", s) or (name == "rand" and s.startswith("t")))]
    if name == "rand":  # timm takes its default set for a name it does not know, as for none
        wrong += [s for s in sections if s[:1] == "t" and rand_augment_choices(s[1:]) is rand_augment_choices("")]
    return ", ".join(map(repr, wrong))


def _trim(image: Image.Image) -> Image.Image:
    """The middle of a very long strip: resized whole, 2 × 20000 pixels would take gigabytes, of which a square is kept."""
    width, height = image.size
    longest = _LONGEST * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


def _allow_zero_bits(policy: Any) -> None:
    """Keeps the strongest Posterize of timm's policies working.

    Their magnitude 10 keeps 0 bits: a black image, which Pillow gave until version 13 refused it. Published results were
    trained with it, so it is done here rather than left out.
    """
    from timm.data import auto_augment

    groups = [getattr(policy, "ops", [])] + list(getattr(policy, "policy", []))
    for op in (op for group in groups for op in group):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    from timm.data import auto_augment

    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return auto_augment.posterize(image, bits_to_keep)


def _shift(images: Tensor, u: np.ndarray, v: np.ndarray) -> Tensor:
    """Pads ``[B, 3, S, S]`` with black and crops each image at its own place, given by u, v ``[B]`` in [0, 1)."""
    size = images.shape[-1]
    pad = max(1, size // 8)
    top, left = (torch.from_numpy((w * (2 * pad + 1)).astype(np.int64)) for w in (u, v))
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    windows = padded.unfold(2, size, 1).unfold(3, size, 1)  # [B, 3, 2p+1, 2p+1, S, S], a view
    return windows[torch.arange(len(images)), :, top, left]


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
