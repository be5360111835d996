"""What a policy's encoder looks at over an episode: Grad-CAM as maps, and as a film strip."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xdfast._optional import require
from xdfast.robot.gradcam import find_layer, tapped
from xdfast.robot.pictures import crop
from xdfast.robot.policy import DiffusionPolicy

__all__ = ["film_strip", "saliency_maps"]

#: Legible on a white page and on a dark one.
_GREY = "#7d8590"
_BATCH = 16


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
        layer: module of the encoder; default: see :func:`xdfast.robot.gradcam.find_layer`.

    Returns:
        float32 ``[n, S, S]`` in [0, 1] over the middle crop of S pixels that the policy sees; zeros where no place raises y.

    Raises:
        ImportError: captum is missing.
        ValueError: no observations, no such camera or layer, pictures of another shape, an encoder without a spatial layer.

    References:
        Selvaraju et al., "Grad-CAM", ICCV 2017. X-Distill (arXiv 2601.11269), figure 5, shows such maps over an episode.
    """
    captum = require("captum.attr", extra="analysis", purpose="saliency maps")
    number = _camera(policy, camera)
    frames = _frames(policy, observations, number)
    encoder: Any = policy.encoders[0 if policy.spec.share_encoder else number]
    head: Any = policy.heads[number]
    weight: Tensor = head.weight.detach()
    device = weight.device
    found = []

    def energy(pixels: Tensor) -> Tensor:
        return (encoder(pixels).features.float() @ weight.T).square().sum(1)

    with _eval_mode(policy):
        place = find_layer(encoder, layer)
        with tapped(encoder, place) as tap:
            cam = captum.LayerGradCam(energy, tap)
            for start in range(0, len(frames), _BATCH):
                part = torch.from_numpy(frames[start : start + _BATCH]).to(device).permute(0, 3, 1, 2).float().div_(255)
                # A frozen encoder has no other leaf that asks for a gradient.
                maps = cam.attribute(part.requires_grad_(), relu_attributions=True)
                maps = captum.LayerAttribution.interpolate(maps, (policy.spec.crop,) * 2, interpolate_mode="bilinear")
                found.append(maps[:, 0].detach().float().cpu())
    maps = torch.cat(found)
    top = maps.amax((1, 2), keepdim=True)
    return torch.where(top > 0, maps / top.clamp(min=torch.finfo(torch.float32).tiny), 0.0).numpy()


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
        axes[1, column].imshow(_overlay(frame, heat), interpolation="nearest")
        for ax in axes[:, column]:
            ax.set_axis_off()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", transparent=True, metadata={"Software": None})
    return stream.getvalue()


def _overlay(frame: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """uint8 ``[S, S, 3]``: the frame greyed and darkened where nothing matters, in inferno colours where something does."""
    import matplotlib

    grey = frame.astype(np.float32).mean(2, keepdims=True) / 255
    colour = matplotlib.colormaps["inferno"](0.25 + 0.75 * heat)[..., :3]
    share = 0.7 * heat[..., None]
    return (255 * ((1 - share) * 0.8 * grey + share * colour)).clip(0, 255).astype(np.uint8)


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


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; then every sub-module is as it was (some may be in eval mode in a module that trains)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
