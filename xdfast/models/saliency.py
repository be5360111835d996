"""Where in a picture a model finds what it says: Grad-CAM, and occlusion for models without a map of places (captum)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from xdfast._optional import require
from xdfast.models.features import FeatureModel
from xdfast.models.gradcam import SpatialLayer, find_layer, tapped

__all__ = ["eval_mode", "grad_cam", "occlusion"]

_BATCH = 16


def grad_cam(
    encoder: FeatureModel,
    images: Tensor,
    score: Callable[[Tensor], Tensor],
    *,
    target: Tensor | None = None,
    layer: SpatialLayer | str | None = None,
) -> Tensor:
    r"""Grad-CAM of a score that a model gives pictures.

    .. math:: M = \mathrm{relu}\Big(\sum_c w_c A_c\Big), \qquad w_c = \frac{1}{hw} \sum_{ij} \frac{\partial y}{\partial A_{cij}}

    with the activations A of a spatial layer, brought to the size of the picture (bilinear) and divided by its own maximum:
    it compares places in one picture, not pictures. The model's mode and gradients are left as they were.

    Args:
        encoder: the model whose layer is looked at; may be frozen.
        images: floating point ``[N, 3, H, W]`` in [0, 1], on the model's device.
        score: pictures ``[B, 3, H, W]`` → y ``[B]``, or ``[B, C]`` of which ``target`` picks one; calls the encoder.
        target: int64 ``[N]``, which of the C.
        layer: default: see :func:`xdfast.models.gradcam.find_layer`.

    Returns:
        float32 ``[N, H, W]`` in [0, 1] on the CPU; zeros where no place raises y.

    Raises:
        ImportError: captum is missing.
        ValueError: a model without a spatial layer, or images of another shape.

    Reference:
        Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017.
    """
    captum = require("captum.attr", extra="analysis", purpose="saliency maps")
    _check(images, target)
    parts = []
    with eval_mode(encoder):
        place = layer if isinstance(layer, SpatialLayer) else find_layer(encoder, layer)
        with tapped(encoder, place) as tap, _unfrozen(encoder):
            cam = captum.LayerGradCam(score, tap)
            for start in range(0, len(images), _BATCH):
                # A frozen encoder has no other leaf that asks for a gradient.
                part = images[start : start + _BATCH].detach().clone().requires_grad_()
                chosen = None if target is None else target[start : start + _BATCH].to(part.device)
                maps = cam.attribute(part, target=chosen, relu_attributions=True)
                maps = captum.LayerAttribution.interpolate(maps, tuple(images.shape[-2:]), interpolate_mode="bilinear")
                parts.append(maps[:, 0].detach().float().cpu())
    return _by_own_maximum(torch.cat(parts))


def occlusion(
    encoder: FeatureModel,
    images: Tensor,
    score: Callable[[Tensor], Tensor],
    *,
    target: Tensor | None = None,
    cells: int = 8,
) -> Tensor:
    """How much the score falls where a square is hidden behind the picture's mean colour; for any model, as it needs no layer.

    Squares of two cells a side move by one cell, so that every place is hidden by up to four of them; a place gets their mean
    fall, relu'd and divided by the picture's maximum. It takes about (cells - 1)² passes.

    Args:
        encoder, images, score, target: see :func:`grad_cam`.
        cells: per side, 2 or more.

    Returns:
        float32 ``[N, H, W]`` in [0, 1] on the CPU; zeros where hiding no place lowers the score.

    Raises:
        ImportError: captum is missing.
        ValueError: images of another shape, or more cells than pixels.

    Reference:
        Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, section 4.2.
    """
    captum = require("captum.attr", extra="analysis", purpose="saliency maps")
    _check(images, target)
    height, width = images.shape[-2:]
    if not 2 <= cells <= min(height, width):
        raise ValueError(f"cells must be 2 to {min(height, width)} (the pixels of a side), got {cells!r}")
    step = (3, height // cells, width // cells)
    with eval_mode(encoder), torch.no_grad():
        maps = captum.Occlusion(score).attribute(
            images,
            sliding_window_shapes=(3, 2 * step[1], 2 * step[2]),
            strides=step,
            baselines=images.mean((2, 3), keepdim=True).expand_as(images),
            target=None if target is None else target.to(images.device),
        )
    return _by_own_maximum(maps.mean(1).clamp(min=0).float().cpu())


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; then every sub-module is as it was (some may be in eval mode in a module that trains)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _unfrozen(encoder: FeatureModel) -> Iterator[None]:
    """A frozen :class:`FeatureModel` lets gradients through to its pictures for a while; its parameters still get none."""
    was = encoder.frozen
    encoder.frozen = False
    try:
        yield
    finally:
        encoder.frozen = was


def _check(images: Tensor, target: Tensor | None) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or len(images) == 0:
        raise ValueError(
            f"expected images [N, 3, H, W], floating point in [0, 1], got {images.dtype} {list(images.shape)}"
        )
    if target is not None and tuple(target.shape) != (len(images),):
        raise ValueError(f"expected one target for each of {len(images)} images, got {list(target.shape)}")


def _by_own_maximum(maps: Tensor) -> Tensor:
    top = maps.amax((1, 2), keepdim=True)
    return torch.where(top > 0, maps / top.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
