"""What a model gets to see of an image: crops, flips and colours, each a function of (seed, view index, sample id)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from xdfast.data._rng import hash64, hash_int, reseed, uniform
from xdfast.data.crops import Crop, centre_crop, random_resized_crop
from xdfast.errors import nearest

__all__ = ["Augment", "Views"]

_CROPS = ("rrc", "pad", "none")
_INTERPOLATIONS = ("bicubic", "bilinear", "lanczos", "nearest", "box", "hamming")
_POLICY_EXAMPLES = "examples: 'rand-m9-mstd0.5-inc1', 'augmix-m5-w4-d2', 'original'"
_VIEW = 0x56494557  # keeps the draws of views apart from those of the order and of replacements
_FLIP = 3
_JITTER = ("brightness", "contrast", "saturation")
_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}

_KERNELS = {
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}

#: Of the algorithm that draws views: a cache made with another one holds other views.
VERSION = 1


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
    """Makes the uint8 views of a batch, in two steps that any reader can take.

    :meth:`crop` says where a view is cut from its image, :meth:`resample` resizes what was cut, whoever decoded it, and
    :meth:`finish` does the rest to the whole batch. Every draw is a function of (seed, view
    index, sample id): any process can make any view again.

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
        _ = self._policy  # a bad setting is reported here, not in a worker

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}  # rebuilt in the process that uses it

    def facts(self) -> dict[str, Any]:
        """Everything a view depends on besides (view index, sample id, image), as plain values."""
        facts = {f.name: getattr(self.augment, f.name) for f in dataclasses.fields(self.augment)}
        return {
            "version": VERSION,
            "image_size": self.image_size,
            "train": self.train,
            "seed": self.seed,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()},
        }

    @property
    def batched(self) -> bool:
        """True if nothing is left to do image by image once the bases are there."""
        return self.fixed_base and not self.coloured

    @property
    def coloured(self) -> bool:
        """True if colours are changed, image by image."""
        return self.train and bool(self.augment.auto_augment or self.augment.color_jitter)

    def reseed(self, view: int, slot: int) -> None:
        """Seeds the global generators for one sample; inside ``preserved_rng``."""
        reseed(hash_int(self.seed, _VIEW, view, slot))

    def crop(self, view: int, slot: int, width: int, height: int) -> Crop:
        """Where view number ``view`` of sample ``slot`` is cut from its image of ``width`` × ``height`` pixels."""
        if self.fixed_base:
            return centre_crop(width, height, self.image_size, 1.0 if self.train else self.augment.crop_pct)
        keys = (self.seed, _VIEW, view, slot)
        crop = random_resized_crop(keys, width, height, self.image_size, self.augment.scale, self.augment.ratio)
        return crop._replace(flip=hash_int(*keys, _FLIP) * 2.0**-64 < self.augment.hflip)

    def render(self, image: Image.Image, crop: Crop, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 ``[S, S, 3]``: a crop of a decoded image, written to ``out`` if given."""
        left, top, width, height = crop.box
        if (width, height) != image.size:
            image = image.crop((left, top, left + width, top + height))
        return self.resample(np.array(image), crop, out)

    def resample(self, pixels: np.ndarray, crop: Crop, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 ``[S, S, 3]`` from the pixels of ``crop.box``, uint8 ``[height, width, 3]``: antialiased resize, window, flip.

        Args:
            pixels: C-contiguous.
            crop: what they are.
            out: where the result is written, C-contiguous; default: new memory.
        """
        size = (self.image_size, self.image_size)
        if out is None:
            out = np.empty((*size, 3), dtype=np.uint8)
        if pixels.shape[1::-1] != crop.size:
            whole = crop.size == size and not crop.flip
            pixels = _resize(pixels, crop.size, self.augment.interpolation, out if whole else None)
        if crop.size != size:
            x, y = crop.window
            pixels = pixels[y : y + self.image_size, x : x + self.image_size]
        if crop.flip:  # numpy reverses pixels of three bytes one by one, torch starts threads
            pixels = np.asarray(Image.fromarray(pixels).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        if pixels is not out:
            out[:] = pixels
        return out

    def base(self, image: Image.Image, view: int, slot: int, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 ``[S, S, 3]``: the view before :meth:`finish`; where ``fixed_base``, a function of the image alone."""
        return self.render(image, self.crop(view, slot, *image.size), out)

    def jitter(self, view: int, slot: int) -> list[tuple[str, float]]:
        """Colour changes of one view in their order: (``"brightness"``, ``"contrast"`` or ``"saturation"``, factor)."""
        strength = self.augment.color_jitter if self.train and not self.augment.auto_augment else 0.0
        if strength == 0:
            return []
        draws = [hash_int(self.seed, _VIEW, view, slot, 8 + k) for k in range(2 * len(_JITTER))]
        low, high = max(0.0, 1 - strength), 1 + strength
        factors = [low + (high - low) * draw * 2.0**-64 for draw in draws[: len(_JITTER)]]
        order = sorted(range(len(_JITTER)), key=lambda k: draws[len(_JITTER) + k])
        return [(_JITTER[k], factors[k]) for k in order]

    def colour(self, image: Image.Image, view: int, slot: int) -> Image.Image:
        """The policy or the jitter of one view; a policy draws from the global generators, inside ``preserved_rng``."""
        policy = self._policy
        if policy is not None:
            self.reseed(view, slot)
            image = policy(image)
        for name, factor in self.jitter(view, slot):
            image = _ENHANCERS[name](image).enhance(factor)
        return image

    def finish(self, bases: Tensor, views: np.ndarray, slots: np.ndarray, *, coloured: bool = False) -> Tensor:
        """Shifts and flips (bases that are the same in every epoch) and colours a batch.

        Args:
            bases: uint8 ``[B, 3, S, S]``; not modified.
            views: int64 ``[B]`` view index of each row: the epoch, or one of K.
            slots: int64 ``[B]`` the samples' ids.
            coloured: the colours are changed already.

        Returns:
            uint8 ``[B, 3, S, S]``. For evaluation ``bases`` itself.
        """
        if not self.train:
            return bases
        if self.fixed_base:
            draws = [uniform(hash64(self.seed, _VIEW, views, slots, salt)) for salt in (1, 2, _FLIP)]  # [B] in [0, 1)
            bases = _shift(bases, draws[0], draws[1]) if self.augment.train_crop == "pad" else bases.clone()
            flip = torch.from_numpy(np.flatnonzero(draws[2] < self.augment.hflip))
            bases[flip] = bases[flip].flip(3)
        if self.coloured and not coloured:
            bases = self._colour(bases, views, slots)
        return bases.contiguous(memory_format=torch.channels_last)

    def _colour(self, bases: Tensor, views: np.ndarray, slots: np.ndarray) -> Tensor:
        made = torch.empty(bases.shape, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
        for row, (view, slot) in enumerate(zip(views.tolist(), slots.tolist(), strict=True)):
            image = Image.fromarray(np.ascontiguousarray(bases[row].permute(1, 2, 0).cpu().numpy()))
            made[row] = torch.from_numpy(np.array(self.colour(image, view, slot))).permute(2, 0, 1)
        return made.to(bases.device)

    @property
    def _policy(self) -> Callable[[Image.Image], Any] | None:
        """timm's AutoAugment, RandAugment or AugMix; None without one."""
        if not self.train or not self.augment.auto_augment:
            return None
        if "policy" not in self._made:
            self._made["policy"] = self._timm_policy(self.augment.auto_augment)
        return self._made["policy"]

    def _timm_policy(self, policy: str) -> Any:
        from timm.data import create_transform

        wrong = _wrong_sections(policy)
        if wrong:
            raise ValueError(f"auto_augment {policy!r}: {wrong} means nothing to timm; {_POLICY_EXAMPLES}")
        try:
            transform: Any = create_transform(
                self.image_size,
                is_training=True,
                color_jitter=None,  # type: ignore[arg-type]  # timm's annotation leaves out its default
                auto_augment=policy,
                interpolation=self.augment.interpolation,
                normalize=False,
                separate=True,
            )
        except (AssertionError, KeyError, ValueError, IndexError) as error:
            raise ValueError(
                f"auto_augment {policy!r} is not a policy timm knows ({type(error).__name__} {error}); "
                f"{_POLICY_EXAMPLES}"
            ) from error
        for step in transform[1].transforms:
            _allow_zero_bits(step)
        return transform[1]


def _resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 ``[h, w, 3]`` at another (width, height), antialiased.

    By torch's vectorised kernel where there is one: four to five times faster than Pillow's resize, equal to it to 0.03 of
    255 on average. The strides are spelt out, so that it sees images of interleaved channels on both sides; through
    ``interpolate`` it would write planes, and taking these apart costs more than the resize.
    """
    if interpolation not in _KERNELS:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling[interpolation.upper()]))
    if out is None:
        out = np.empty((size[1], size[0], 3), dtype=np.uint8)
    _KERNELS[interpolation](_interleaved(pixels), [size[1], size[0]], False, None, None, out=_interleaved(out))
    return out


def _interleaved(pixels: np.ndarray) -> Tensor:
    """``[1, 3, h, w]`` over the memory of a C-contiguous ``[h, w, 3]``."""
    h, w, _ = pixels.shape
    return torch.from_numpy(pixels).as_strided((1, 3, h, w), (3 * h * w, 1, 3 * w, 3))


def _wrong_sections(policy: str) -> str:
    """The sections of a policy that timm would pass over in silence: letters without a number, unknown sets of transforms."""
    from timm.data.auto_augment import rand_augment_choices

    name, *sections = str(policy).split("-")
    wrong = [s for s in sections if not (re.search(r"[a-z]\d", s) or (name == "rand" and s.startswith("t")))]
    if name == "rand":  # timm takes its default set for a name it does not know, as for none
        wrong += [s for s in sections if s[:1] == "t" and rand_augment_choices(s[1:]) is rand_augment_choices("")]
    return ", ".join(map(repr, wrong))


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
