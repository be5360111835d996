"""From settings to loaders: which images, at which size, with which augmentation."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from xdfast import distributed
from xdfast.data import Augment, ImageLoader, ImageSource, augment_preset, open_source
from xdfast.data.decoder import Decoder
from xdfast.models import FeatureModel
from xdfast.pipeline.config import DistillConfig, TrainConfig

__all__ = ["Images", "eval_loader", "open_images", "train_loader", "view_size"]

log = logging.getLogger("xdfast")


@dataclass
class Images:
    """Training and validation images with the same classes."""

    train: ImageSource
    val: ImageSource

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or renamed."""
        return self.train.fingerprint() + self.val.fingerprint()


def open_images(config: Any, data: Any = None, val_data: Any = None) -> Images:
    """Both splits from a config's ``data`` and ``val_data`` (or objects given in their place)."""
    data = config.data if data is None else data
    val_data = config.val_data if val_data is None else val_data
    # The split is the data's, not the run's: seeds share it. Where validation images are given, none is split off.
    shared: dict[str, Any] = {"seed": 0, "val_fraction": config.val_fraction if val_data is None else None}
    train = open_source(data, split="train", labels_per_class=config.labels_per_class, **shared)
    val = open_source(data if val_data is None else val_data, split="val", **shared)
    if list(train.classes) != list(val.classes):
        raise ValueError(
            f"training and validation images must have the same classes, got {len(train.classes)} and {len(val.classes)}; "
            f"only in one: {sorted(set(train.classes) ^ set(val.classes))[:5]}"
        )
    return Images(train, val)


def view_size(config: TrainConfig, source: ImageSource, models: list[FeatureModel]) -> int:
    """The size of the augmented view: the larger input size, but not above the images' own short side.

    A 32-pixel picture is augmented at 32 pixels and enlarged by the model that wants 224; a photograph is cropped at
    224 and reduced by the model that wants 32.
    """
    if config.image_size is not None:
        return config.image_size
    sizes = [model.image_size for model in models]
    size = max(min(max(sizes), source.short_side()), min(sizes))
    told = log.debug if size == sizes[0] == sizes[-1] else log.info
    told("views of %d px (models: %s px; images: about %d px)", size, ", ".join(map(str, sizes)), source.short_side())
    return size


def train_loader(
    config: TrainConfig, source: ImageSource, size: int, model: FeatureModel
) -> tuple[ImageLoader, Any | None]:
    """(loader, batch augmentation or None) for training.

    With a teacher cache the views are K fixed ones, drawn from seed 0 whatever the run's, so that runs can share it.

    Raises:
        ValueError: a cache, and an augmentation that mixes or erases what the teacher saw.
    """
    augment, batch_augment = augment_preset(
        config.augment, num_classes=len(source.classes), mean=model.mean, std=model.std, **_overrides(config)
    )
    cached: dict[str, Any] = {}
    if isinstance(config, DistillConfig) and config.cache != "none":
        if batch_augment is not None:
            raise ValueError(
                f"cache={config.cache!r} keeps what the teacher says of single images, but augment={config.augment!r} "
                f"changes whole batches ({batch_augment}); set mixup=0, cutmix=0, random_erase=0, or cache='none'"
            )
        cached = {"fixed_views": config.cache_views, "digests": True, "view_seed": 0}
    loader = ImageLoader(
        source,
        batch_size=config.batch_size,
        image_size=size,
        train=True,
        augment=augment,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=config.workers,
        decoder=config.decoder,
        exact=config.tail == "exact",
        repeats=config.aug_repeats,
        **cached,
    )
    told = log.info if source.encoded else log.debug  # pixels in memory leave no choice
    told("views by %s (%s)", loader.decoder, loader.decoder_reason)
    return loader, batch_augment


def eval_loader(
    source: ImageSource,
    size: int,
    *,
    batch_size: int,
    workers: Any,
    decoder: Decoder = "auto",
    sharded: bool = True,
    crop_pct: float = 1.0,
) -> ImageLoader:
    """Every image once, unaugmented; over all ranks if ``sharded``. ``crop_pct``: what the centre crop keeps."""
    return ImageLoader(
        source,
        batch_size=batch_size,
        image_size=size,
        train=False,
        augment=Augment(crop_pct=crop_pct),
        seed=0,
        rank=distributed.rank() if sharded else 0,
        world_size=distributed.world_size() if sharded else 1,
        workers=workers,
        decoder=decoder,
    )


def _overrides(config: TrainConfig) -> dict[str, Any]:
    chosen = {
        "auto_augment": config.auto_augment,
        "mixup": config.mixup,
        "cutmix": config.cutmix,
        "random_erase": config.random_erase,
    }
    return {k: v for k, v in chosen.items() if v is not None}
