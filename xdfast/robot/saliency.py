"""What a policy's encoder looks at over an episode: Grad-CAM as maps, and as a film strip."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdfast.models.saliency import eval_mode, grad_cam
from xdfast.reporting.media import overlay
from xdfast.robot.pictures import crop
from xdfast.robot.policy import DiffusionPolicy

__all__ = ["film_strip", "saliency_maps"]

#: Legible on a white page and on a dark one.
_GREY = "#7d8590"


def saliency_maps(
    policy: DiffusionPolicy,
    observations: Sequence[Mapping[str, np.ndarray]],
    *,
    camera: str | None = None,
    layer: str | None = None,
) -> np.ndarray:
    r"""Grad-CAM of the pictures of an episode.

    What is explained is the energy that a picture puts into the condition of the denoiser,

    .. math:: y = \lVert W_k f(x) \rVert^2

    with the encoder's features f of the newest picture x of camera k and the policy's linear layer W_k after them (its bias
    is no picture's doing). The denoiser knows nothing else of a picture. The obvious other choice, the size of the action,
    is no function of the picture: it hangs on the noise drawn, and where actions touch their limits (experts' do most of the
    time) the clipping of the denoiser makes its gradient zero.

    The map is ``relu(sum_c w_c A_c)`` with A the activations of a spatial layer and w_c the mean over places of ∂y/∂A_c, brought to
    the size of the picture (bilinear) and divided by its own maximum: it compares places in one picture, not pictures.

    Args:
        policy: with cameras; may be frozen. Its mode and gradients are left as they were.
        observations: what it saw at each decision, from :func:`xdfast.robot.rollout.film`: ``images`` uint8
            ``[K, T, H, W, 3]``.
        camera: whose pictures; default: the first.
        layer: module of the encoder; default: see :func:`xdfast.models.gradcam.find_layer`.

    Returns:
        float32 ``[n, S, S]`` in [0, 1] over the middle crop of S pixels that the policy sees; zeros where no place raises y.

    Raises:
        ImportError: captum is missing.
        ValueError: no observations, no such camera or layer, pictures of another shape, an encoder without a spatial layer.

    References:
        Selvaraju et al., "Grad-CAM", ICCV 2017. X-Distill (arXiv 2601.11269), figure 5, shows such maps over an episode.
    """
    number = _camera(policy, camera)
    frames = _frames(policy, observations, number)
    encoder: Any = policy.encoders[0 if policy.spec.share_encoder else number]
    head: Any = policy.heads[number]
    weight: Tensor = head.weight.detach()
    pixels = torch.from_numpy(frames).to(weight.device).permute(0, 3, 1, 2).float().div_(255)

    def energy(part: Tensor) -> Tensor:
        return (encoder(part).features.float() @ weight.T).square().sum(1)

    with eval_mode(policy):
        return grad_cam(encoder, pixels, energy, layer=layer).numpy()


def film_strip(
    policy: DiffusionPolicy,
    observations: Sequence[Mapping[str, np.ndarray]],
    count: int = 8,
    *,
    camera: str | None = None,
    layer: str | None = None,
    title: str = "",
) -> bytes:
    """Frames of an episode (upper row), and the same frames under their saliency (lower row), with the time of each.

    Args:
        policy, observations, camera, layer: see :func:`saliency_maps`; of the observations ``count`` are picked evenly, the first
            and the last among them.
        count: columns.
        title: over the strip.

    Returns:
        a PNG on a transparent ground, its text in a grey that can be read on light and dark.

    Raises:
        ValueError, ImportError: see :func:`saliency_maps`; ``count`` below 1.
    """
    if count < 1:
        raise ValueError(f"count must be ≥ 1, got {count}")
    if not observations:
        raise ValueError("no observations; film(...) returns those of each episode")
    spec = policy.spec
    picked = np.unique(np.linspace(0, len(observations) - 1, min(count, len(observations))).round().astype(int))
    chosen = [observations[i] for i in picked]
    maps = saliency_maps(policy, chosen, camera=camera, layer=layer)
    frames = _frames(policy, chosen, _camera(policy, camera))
    times = [f"{i * spec.n_action / spec.fps:.2f} s" if spec.fps else f"step {i * spec.n_action}" for i in picked]

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    cell = 1.15  # inches
    tight = ConstrainedLayoutEngine(w_pad=0.015, h_pad=0.03, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=(cell * len(picked), 2 * cell + 0.22 + (0.25 if title else 0)), dpi=150, layout=tight)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=9, color=_GREY)
    axes = figure.subplots(2, len(picked), squeeze=False)
    for column, (frame, heat, time) in enumerate(zip(frames, maps, times, strict=True)):
        axes[0, column].imshow(frame, interpolation="nearest")
        axes[0, column].set_title(time, fontsize=8, color=_GREY, pad=2)
        axes[1, column].imshow(overlay(frame, heat), interpolation="nearest")
        for ax in axes[:, column]:
            ax.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", transparent=True, metadata={"Software": None})
    return stream.getvalue()


def _camera(policy: DiffusionPolicy, camera: str | None) -> int:
    cameras = policy.spec.cameras
    if not cameras:
        raise ValueError("the policy has no camera: there is nothing to look at")
    if camera is None:
        return 0
    if camera not in cameras:
        raise ValueError(f"the policy has no camera {camera!r}; it has {', '.join(cameras)}")
    return cameras.index(camera)


def _frames(policy: DiffusionPolicy, observations: Sequence[Mapping[str, np.ndarray]], camera: int) -> np.ndarray:
    """uint8 ``[n, S, S, 3]``: the newest picture of each observation, cut as the policy cuts it."""
    spec = policy.spec
    expected = (len(spec.cameras), spec.n_obs, *spec.image_size, 3)
    if not observations:
        raise ValueError("no observations; film(...) returns those of each episode")
    for i, observation in enumerate(observations):
        images = observation.get("images")
        if images is None or images.shape != expected or images.dtype != np.uint8:
            told = "none" if images is None else f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"observation {i}: expected images uint8 {list(expected)}, got {told}")
    newest = torch.from_numpy(np.stack([observation["images"][camera, -1] for observation in observations]))
    return crop(newest[:, None], spec.crop, at_random=False)[:, 0].numpy()
