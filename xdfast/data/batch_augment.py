"""Mixup, CutMix and random erasing of a batch, as a function of a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xdfast.data._rng import preserved_rng, reseed

__all__ = ["BatchAugment"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class BatchAugment:
    """timm's random erasing, then timm's mixup/CutMix.

    Both are made for normalised images; mixing commutes with normalisation, and erased pixels are ``noise · std + mean``,
    which is unit normal noise once a model has normalised (they may lie outside [0, 1]).

    A batch of odd size: timm mixes image i with image B−1−i, which needs an even B; the last image is left as it is, with
    its one-hot target, and the others are mixed. So a batch of 1 is never mixed.

    Args:
        num_classes: C.
        mixup: α of the Beta distribution; 0 is off.
        cutmix: α; 0 is off. With both, each batch draws one of them.
        prob: probability that a batch is mixed.
        switch_prob: probability of CutMix where both are on.
        mode: ``"batch"``, ``"pair"`` or ``"elem"``: what one draw is for.
        random_erase: probability for each image.
        erase_mode: ``"pixel"`` (noise per pixel), ``"rand"`` (one random colour), ``"const"`` (the mean).
        erase_count: largest number of rectangles.
        mean, std: normalisation of the model that learns, per channel in [0, 1].

    Label smoothing is the loss's business: apply it to the targets returned here.

    References:
        mixup: Zhang et al. 2018, arXiv 1710.09412. CutMix: Yun et al. 2019, arXiv 1905.04899. Random erasing: Zhong et al.
        2020, arXiv 1708.04896.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        random_erase: float = 0.0,
        erase_mode: str = "pixel",
        erase_count: int = 1,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be ≥ 1, got {num_classes!r}")
        for name, value in (("mixup", mixup), ("cutmix", cutmix)):
            if not value >= 0:
                raise ValueError(f"{name} must be ≥ 0 (the α of a Beta distribution), got {value!r}")
        for name, value in (("prob", prob), ("switch_prob", switch_prob), ("random_erase", random_erase)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a probability, got {value!r}")
        if mode not in ("batch", "pair", "elem"):
            raise ValueError(f"mode must be 'batch', 'pair' or 'elem', got {mode!r}")
        if erase_mode not in ("pixel", "rand", "const"):
            raise ValueError(f"erase_mode must be 'pixel', 'rand' or 'const', got {erase_mode!r}")
        if erase_count < 1:
            raise ValueError(f"erase_count must be ≥ 1, got {erase_count!r}")
        if len(mean) != 3 or len(std) != 3 or not min(std) > 0:
            raise ValueError(f"mean and std must have 3 values, std > 0; got {mean!r} and {std!r}")
        self.num_classes = num_classes
        self.mixup, self.cutmix = mixup, cutmix
        self.random_erase, self.erase_mode, self.erase_count = random_erase, erase_mode, erase_count
        self.mean, self.std = tuple(mean), tuple(std)
        self._mix = self._make_mix(prob, switch_prob, mode)

    def __repr__(self) -> str:
        return f"BatchAugment(mixup={self.mixup}, cutmix={self.cutmix}, random_erase={self.random_erase})"

    @property
    def mixes(self) -> bool:
        """True if targets come back as ``[B, C]``."""
        return self._mix is not None

    def _make_mix(self, prob: float, switch_prob: float, mode: str) -> Any | None:
        if not (self.mixup > 0 or self.cutmix > 0) or prob == 0:
            return None
        from timm.data import Mixup

        return Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=0.0,
            num_classes=self.num_classes,
        )

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Augments a batch.

        Args:
            images: float ``[B, 3, S, S]`` in [0, 1], any device; not modified.
            labels: int64 ``[B]``.
            seed: of all draws. The global generators are left as found.

        Returns:
            images ``[B, 3, S, S]`` and targets: int64 ``[B]`` without mixup and CutMix, else float32 ``[B, C]``.

        Raises:
            TypeError: images are not floating point, or labels not int64.
            ValueError: other shapes.
        """
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}; use images.float() / 255")
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64 class indices, got {labels.dtype}")
        if images.ndim != 4 or images.shape[1] != 3 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"expected images [B, 3, S, S] and labels [B], got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        targets = labels
        with preserved_rng(images.device), torch.no_grad():
            reseed(seed, images.device)
            if self.random_erase > 0:
                images = self._erase(images)
            if self._mix is not None:
                images, targets = self._mix_even(images, labels)
        return images, targets

    def _erase(self, images: Tensor) -> Tensor:
        from timm.data.random_erasing import RandomErasing

        # timm draws on a sheet of NaN: where the sheet is written is where to erase. Pixels outside keep their bits, and no
        # batch has to be normalised and back.
        sheet = torch.full_like(images, float("nan"))
        RandomErasing(self.random_erase, mode=self.erase_mode, max_count=self.erase_count, device=images.device)(sheet)
        mean, std = (
            torch.tensor(v, dtype=images.dtype, device=images.device)[:, None, None] for v in (self.mean, self.std)
        )
        return torch.where(sheet.isnan(), images, sheet * std + mean)

    def _mix_even(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        even = len(images) // 2 * 2
        targets = torch.nn.functional.one_hot(labels, self.num_classes).float()
        images = images.clone()  # timm mixes in place
        if even and self._mix is not None:
            images[:even], targets[:even] = self._mix(images[:even], labels[:even])
        return images, targets
