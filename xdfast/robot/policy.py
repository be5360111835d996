"""The diffusion policy: pictures and proprioception in, a chunk of actions out."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.models import FeatureModel
from xdfast.robot.diffusion import Diffusion, DiffusionSettings
from xdfast.robot.encoder import EncoderSpec
from xdfast.robot.normalize import MinMax
from xdfast.robot.pictures import batch_of, check_pictures, crop_cameras
from xdfast.robot.unet1d import ConditionalUnet1d

__all__ = ["DiffusionPolicy", "PolicySpec"]


@dataclass(frozen=True)
class PolicySpec:
    """Everything about a policy but its weights.

    Attributes:
        action_dim: A.
        state_dim: P numbers of proprioception.
        cameras: names, in the order of the images.
        image_size: (H, W) of a camera's picture in pixels.
        crop: side of the square that is cut out of it: at random in training, from the middle otherwise.
        n_obs: T latest observations that a decision sees.
        horizon: H actions that are predicted, the first at the time of the oldest observation.
        n_action: of them executed before the next decision.
        feature_dim: numbers per picture that reach the denoiser.
        unet_widths, kernel_size: of the denoiser.
        share_encoder: one encoder for all cameras, or one each.
        diffusion: scheduler.
        encoder: of the images.
        task: it was made for; empty if unknown.
        fps: control frequency in Hz; 0 if unknown.
    """

    action_dim: int
    state_dim: int
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    crop: int
    encoder: EncoderSpec
    n_obs: int = 1
    horizon: int = 16
    n_action: int = 8
    feature_dim: int = 64
    unet_widths: tuple[int, ...] = (64, 128)
    kernel_size: int = 5
    share_encoder: bool = True
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    task: str = ""
    fps: int = 0

    def validate(self) -> None:
        """Raises ValueError: sizes that do not fit together."""
        for name in ("action_dim", "n_obs", "horizon", "n_action", "feature_dim", "crop"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}")
        if not self.cameras and self.state_dim < 1:
            raise ValueError("a policy needs a camera or proprioception")
        stride = 2 ** (len(self.unet_widths) - 1)
        if self.horizon % stride:
            raise ValueError(
                f"horizon must be a multiple of {stride} with {len(self.unet_widths)} unet_widths, got {self.horizon}"
            )
        if self.n_obs - 1 + self.n_action > self.horizon:
            raise ValueError(
                f"n_action ({self.n_action}) + n_obs ({self.n_obs}) - 1 must not exceed horizon ({self.horizon})"
            )
        if self.cameras and self.crop > min(self.image_size):
            raise ValueError(f"crop ({self.crop}) must not exceed the pictures' size {self.image_size}")
        self.diffusion.validate()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PolicySpec:
        """From :meth:`to_dict`'s values, also after a trip through JSON."""
        made: dict[str, Any] = {
            "encoder": EncoderSpec.from_dict(values["encoder"]),
            "diffusion": DiffusionSettings(**values["diffusion"]),
        }
        tuples = {key: tuple(values[key]) for key in ("cameras", "image_size", "unet_widths")}
        return cls(**{**values, **tuples, **made})


class DiffusionPolicy(nn.Module):
    """Diffusion Policy (Chi et al., RSS 2023) on any encoder of xdfast.

    Each picture goes through the encoder and a linear layer to ``feature_dim`` numbers; with the normalised
    proprioception of the T observations they are the condition of the denoiser (:class:`Diffusion`). The encoder owns its
    normalisation of pictures; that of states and actions (min-max) is part of the policy and its checkpoint.

    Args:
        spec: sizes and settings.
        encoder: images in [0, 1] → ``.features`` ``[B, D]``; a copy per camera if they do not share one.

    Raises:
        ValueError: sizes that do not fit together.

    Example:
        >>> from xdfast.robot import DiffusionPolicy, PolicySpec, build_encoder
        >>> encoder, facts = build_encoder("test_resnet", image_size=28)
        >>> spec = PolicySpec(4, 9, ("front",), (32, 32), crop=28, encoder=facts)
        >>> policy = DiffusionPolicy(spec, encoder).eval()
        >>> images = torch.zeros(2, 1, 1, 32, 32, 3, dtype=torch.uint8)
        >>> policy.act(images, torch.zeros(2, 1, 9)).shape
        torch.Size([2, 8, 4])
    """

    def __init__(self, spec: PolicySpec, encoder: FeatureModel) -> None:
        super().__init__()
        spec.validate()
        self.spec = spec
        count = 1 if spec.share_encoder else len(spec.cameras)
        self.encoders = nn.ModuleList([encoder, *(copy.deepcopy(encoder) for _ in range(count - 1))] if count else [])
        self.heads = nn.ModuleList(nn.Linear(encoder.num_features, spec.feature_dim) for _ in spec.cameras)
        self.state_norm, self.action_norm = MinMax(spec.state_dim), MinMax(spec.action_dim)
        width = spec.n_obs * (len(spec.cameras) * spec.feature_dim + spec.state_dim)
        unet = ConditionalUnet1d(spec.action_dim, width, widths=spec.unet_widths, kernel_size=spec.kernel_size)
        self.diffusion = Diffusion(unet, spec.diffusion)

    def features(self, images: Tensor) -> Tensor:
        """uint8 ``[B, K, T, H, W, 3]`` of K cameras → float ``[B, K, T, D]``. In training mode crops fall at random (the same
        for the T pictures of a camera, drawn from torch's global generator), else in the middle.

        Raises:
            ValueError: another shape or dtype.
        """
        spec = self.spec
        check_pictures(images, spec.cameras, spec.n_obs, spec.image_size)
        return self.encode(crop_cameras(images, spec.crop, at_random=self.training))

    def encode(self, cropped: Tensor) -> Tensor:
        """uint8 ``[B, K, t, S, S, 3]``, cropped, for any t → float ``[B, K, t, D]``."""
        pixels = cropped.permute(0, 1, 2, 5, 3, 4).float().div_(255)
        if self.spec.share_encoder:
            return self.encoders[0](batch_of(pixels)).features.unflatten(0, pixels.shape[:3])
        per_camera = [
            encoder(batch_of(pixels[:, k])).features.unflatten(0, (pixels.shape[0], pixels.shape[2]))
            for k, encoder in enumerate(self.encoders)
        ]
        return torch.stack(per_camera, dim=1)

    def condition(self, features: Tensor | None, state: Tensor) -> Tensor:
        """``[B, K, T, D]`` (None without cameras) and the raw state ``[B, T, P]`` → ``[B, C]``."""
        parts = (
            [] if features is None else [head(x).flatten(1) for head, x in zip(self.heads, features.float().unbind(1))]
        )
        return torch.cat([*parts, self.state_norm(state.float()).flatten(1)], dim=1)

    @torch.no_grad()
    def act(
        self,
        images: Tensor | None,
        state: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The next ``n_action`` actions, float32 ``[B, n_action, A]``, in the units of the demonstrations.

        Args:
            images: uint8 ``[B, K, T, H, W, 3]``; None without cameras.
            state: proprioception ``[B, T, P]``.
            noise: as :meth:`noise` gives it; default: drawn now.
            generator: for that.

        Raises:
            ValueError: wrong shapes or dtype, or a state that is not finite.
        """
        spec = self.spec
        if state.ndim != 3 or state.shape[1:] != (spec.n_obs, spec.state_dim):
            raise ValueError(f"expected state [B, {spec.n_obs}, {spec.state_dim}], got {list(state.shape)}")
        if not state.isfinite().all():
            raise ValueError("the state is not finite (NaN or infinity)")
        if noise is None:
            noise = self.noise(len(state), generator, state.device)
        return self.decide(images, state, noise)

    def decide(self, images: Tensor | None, state: Tensor, noise: Tensor, sample: Any = None) -> Tensor:
        """:meth:`act` without checks that wait for the device, so that it can be captured in a CUDA graph.

        Args:
            images, state, noise: as there, all on the policy's device.
            sample: takes the place of :attr:`core`, such as a compiled one.
        """
        features = self.features(images) if images is not None else None
        chunk = (sample or self.core)(self.condition(features, state), noise)
        first = self.spec.n_obs - 1
        return self.action_norm.inverse(chunk[:, first : first + self.spec.n_action])

    @property
    def core(self) -> Any:
        """What follows the encoding, (condition, noise) → normalised chunk ``[B, H, A]``: the part worth compiling."""
        return self.diffusion.sample

    def noise(self, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """What :meth:`act` starts from, ``[S, B, H, A]``; drawn on the CPU, so that a seed means the same on every device."""
        spec = self.spec
        shape = (self.diffusion.noise_count, batch, spec.horizon, spec.action_dim)
        return torch.randn(shape, generator=generator).to(device)
