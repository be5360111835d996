"""Images for training and evaluation: sources, views, loader, batch augmentation."""

from __future__ import annotations

from xdfast.data.batch_augment import BatchAugment
from xdfast.data.datasets import DatasetSource
from xdfast.data.decode import BadImage
from xdfast.data.loader import ImageLoader
from xdfast.data.open import open_source
from xdfast.data.presets import augment_preset, list_presets
from xdfast.data.reader import Batch
from xdfast.data.sources import ImageSource, SubsetSource
from xdfast.data.views import Augment
from xdfast.data.writer import write_image_folder

__all__ = [
    "Augment",
    "BadImage",
    "Batch",
    "BatchAugment",
    "DatasetSource",
    "ImageLoader",
    "ImageSource",
    "SubsetSource",
    "augment_preset",
    "list_presets",
    "open_source",
    "write_image_folder",
]
