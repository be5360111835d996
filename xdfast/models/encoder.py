"""A distilled student as the encoder of something else: a robot's policy, a detector, a retrieval index."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from xdfast.errors import nearest
from xdfast.models.create import create_model
from xdfast.models.features import FeatureModel

__all__ = ["load_encoder"]

_NORMS = ("as-trained", "frozen")


def load_encoder(
    path: str | Path, *, norm: str = "as-trained", image_size: int | None = None, device: torch.device | str = "cpu"
) -> FeatureModel:
    """The student of a run without its classifier, with its own normalisation: images ``[B, 3, H, W]`` → features ``[B, D]``.

    It can be trained on. BatchNorm needs a decision then: with small or correlated batches (a policy's) and an EMA of the
    weights its statistics go astray. ``norm="frozen"`` turns it into a fixed affine map, with the statistics of the
    distillation; a student with GroupNorm (recipe ``xdistill-imagenet-gn``) needs nothing.

    Args:
        path: folder of a run, or of a saved student.
        norm: ``"as-trained"``, or ``"frozen"``: BatchNorm layers become timm's ``FrozenBatchNorm2d``. Its weights have the
            same names, so that either loads the other's.
        image_size: input size in pixels; default: the student's.
        device: where it is put.

    Raises:
        FileNotFoundError: no student there.
        ValueError: unknown ``norm``.

    Example:
        >>> encoder = load_encoder("runs/xdistill", norm="frozen")  # doctest: +SKIP
        >>> encoder(torch.zeros(1, 3, 96, 96)).features.shape       # doctest: +SKIP
        torch.Size([1, 512])
    """
    if norm not in _NORMS:
        raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}.{nearest(norm, _NORMS)}")
    folder = Path(path).expanduser()
    inner = folder / "student"
    if not folder.is_dir():
        raise FileNotFoundError(f"no student in {folder}: pass the folder of a run, or the folder student/ inside it")
    model = create_model(inner if inner.is_dir() else folder, image_size=image_size)
    if model.num_classes:
        model.reset_classifier(0)
    if norm == "frozen":
        from timm.layers import freeze_batch_norm_2d

        model.net = freeze_batch_norm_2d(model.net)
        left = [name for name, part in model.net.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
        if left:
            raise ValueError(
                f"{path}: norm='frozen' cannot freeze {', '.join(left[:3])}, which is no BatchNorm of images"
            )
    return model.to(device)
