"""Pictures as patch tokens: vision encoders of timm and of transformers, several side by side, and the map to the language."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast._optional import require
from xdfast.robot.encoder import EncoderSpec, build_encoder, rebuild_encoder
from xdfast.robot.vla.vision import GridEncoder

__all__ = ["Projector", "VisionTower", "vision_encoder"]

_PREFIX = "transformers:"

#: Model type → mean and std of its channels; of others (SigLIP, ViT) both are 1/2.
_NORMALISATION = {
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "dinov": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}


class VisionTower(nn.Module):
    """Every encoder looks at every picture; their tokens of the same patch become one, side by side (OpenVLA: DINOv2 and SigLIP).

    Args:
        encoders: modules of :func:`vision_encoder`.

    Attributes:
        tokens: t of a picture.
        channels: C, of all encoders together.

    Shape:
        [N, 3, H, W] in [0, 1] → [N, t, C].

    Raises:
        ValueError: encoders with different numbers of patches.
    """

    encoders: Any

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        counts = [int(encoder.tokens) for encoder in self.encoders]
        if len(set(counts)) > 1:
            raise ValueError(
                f"vision encoders side by side must have as many patches each, got {counts}; set their image sizes"
            )
        self.tokens, self.channels = counts[0], sum(int(encoder.channels) for encoder in self.encoders)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.cat([encoder(pixels) for encoder in self.encoders], -1)


class Projector(nn.Module):
    """Vision tokens → width of the language model, by OpenVLA's MLP with its names: two linear maps, or three (the first to 4 C
    numbers) for several encoders.

    Shape:
        [..., C] → [..., D].
    """

    def __init__(self, channels: int, width: int, fused: bool) -> None:
        super().__init__()
        inner = 4 * channels if fused else width
        self.fc1, self.fc2 = nn.Linear(channels, inner), nn.Linear(inner, width)
        self.fc3 = nn.Linear(width, width) if fused else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return x if self.fc3 is None else self.fc3(F.gelu(x))


def vision_encoder(
    source: Any, level: int = -1, *, image_size: int | None = None, pretrained: bool = False
) -> tuple[nn.Module, EncoderSpec]:
    """(encoder [N, 3, H, W] → [N, t, C], how to build it again without its weights).

    Args:
        source: what :func:`xdfast.robot.build_encoder` takes (a timm name, ``NAME@file``, a folder of a run); a vision model or
            configuration of transformers (SigLIP, CLIP, DINOv2, ViT); or an :class:`EncoderSpec`.
        level: layer whose tokens are taken, see :class:`xdfast.robot.vla.HuggingFaceSpec`.
        image_size: input size; default: the encoder's.
        pretrained: a timm name comes with its published weights.

    Raises:
        ValueError: no patch tokens, or no such layer.
        ImportError: the encoder is of transformers, which is not installed.
    """
    if isinstance(source, EncoderSpec):
        if source.architecture.startswith(_PREFIX):
            return TransformersEncoder(_built(source), source, level), source
        return _timm(rebuild_encoder(source), level), source
    if hasattr(source, "model_type") or hasattr(getattr(source, "config", None), "model_type"):
        spec = _facts(source, image_size)
        return TransformersEncoder(source if isinstance(source, nn.Module) else _built(spec), spec, level), spec
    model, spec = build_encoder(source, image_size=image_size, pretrained=pretrained)
    return _timm(model, level), spec


def _timm(model: Any, level: int) -> nn.Module:
    return GridEncoder(model, level) if level == -1 else _Unnormed(model, level)


class _Unnormed(GridEncoder):
    """Tokens inside a ViT without its last norm, as OpenVLA takes them."""

    def _maps(self, pixels: Tensor, indices: list[int] | None) -> list[Tensor]:
        return self.encoder.net.forward_intermediates(
            self.encoder.prepare(pixels),
            indices=indices,
            norm=False,
            stop_early=indices is not None,
            output_fmt="NCHW",
            intermediates_only=True,
        )


def _facts(source: Any, image_size: int | None) -> EncoderSpec:
    config = getattr(source, "config", source)
    config = getattr(config, "vision_config", config)
    own = getattr(config, "image_size", None)
    own = own[-1] if isinstance(own, (list, tuple)) else own
    size = image_size or own
    if not isinstance(size, int):
        raise ValueError(f"{config.model_type} has no image_size, so it is no ViT whose patches could be tokens")
    if isinstance(source, nn.Module) and size != own:
        raise ValueError(f"the vision model takes pictures of {own} px, got vision_size={size}; leave it out")
    kind = next((known for known in _NORMALISATION if known in config.model_type), "")
    mean, std = _NORMALISATION.get(kind, ((0.5,) * 3, (0.5,) * 3))
    options = {**json.loads(config.to_json_string()), "image_size": size}
    return EncoderSpec(f"{_PREFIX}{config.model_type}", options, size, tuple(mean), tuple(std), "none")


def _built(spec: EncoderSpec) -> Any:
    transformers: Any = require("transformers", "vla", purpose=f"the vision encoder {spec.architecture}")
    options = {**spec.options}
    options.pop("model_type", None)
    config = transformers.AutoConfig.for_model(spec.architecture.removeprefix(_PREFIX), **options)
    return transformers.AutoModel.from_config(config)


class TransformersEncoder(nn.Module):
    """Patch tokens of a vision model of transformers; class and register tokens are left out."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: Any, spec: EncoderSpec, level: int) -> None:
        super().__init__()
        net = (
            getattr(net, "vision_model", net) if hasattr(net, "text_model") else net
        )  # of CLIP and its like, the eye alone
        patch = getattr(net.config, "patch_size", None)
        if not isinstance(patch, int):
            raise ValueError(f"{type(net).__name__} has no patches, so its pictures cannot become tokens; use a ViT")
        self.net, self.size, self.level = net, spec.image_size, level
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.tokens, self.channels = (self.size // patch) ** 2, int(net.config.hidden_size)
        if -level > net.config.num_hidden_layers:
            raise ValueError(
                f"{type(net).__name__} has {net.config.num_hidden_layers} layers, vision_level={level} asks for one before them"
            )
        # weights that do not reach the tokens (poolers) get no gradient, on which DistributedDataParallel would wait
        wanted = [p for p in self.net.parameters() if p.requires_grad]
        if wanted:
            with torch.enable_grad():
                seen = self(torch.zeros(1, 3, self.size, self.size, device=wanted[0].device)).sum()
                reached = torch.autograd.grad(seen, wanted, allow_unused=True)
            for parameter, gradient in zip(wanted, reached):
                parameter.requires_grad_(gradient is not None)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.shape[-2:] != (self.size, self.size):
            size = (self.size, self.size)
            pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        weight = next(self.net.parameters())
        seen = ((pixels - self.mean) / self.std).to(weight.dtype)
        if self.level == -1:
            return self.net(pixel_values=seen).last_hidden_state[:, -self.tokens :]
        return self.net(pixel_values=seen, output_hidden_states=True).hidden_states[self.level][:, -self.tokens :]
