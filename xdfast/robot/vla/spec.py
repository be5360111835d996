"""Everything about a compact VLA but its weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from xdfast.errors import nearest
from xdfast.robot.diffusion import DiffusionSettings
from xdfast.robot.encoder import EncoderSpec
from xdfast.robot.vla.instructions import Tokenizer

__all__ = ["OBJECTIVES", "VLASpec"]

#: By what the action head learns: two distances of a predicted action from the demonstrated one, or denoising.
OBJECTIVES = ("l1", "smooth_l1", "diffusion")


@dataclass(frozen=True)
class VLASpec:
    """Sizes and settings of a :class:`xdfast.robot.vla.CompactVLA`.

    Attributes:
        action_dim: A.
        state_dim: P numbers of proprioception.
        cameras: names, in the order of the images.
        image_size: (H, W) of a camera's picture in pixels.
        crop: side of the square that is cut out of it: at random in training, from the middle otherwise.
        encoder: of the images.
        vocabulary: words of :class:`xdfast.robot.vla.Tokenizer`, ``<pad>`` and ``<unk>`` first.
        tasks: it was trained on.
        width: D.
        layers: L.
        heads: of attention.
        mlp_ratio: hidden numbers of a layer's MLP, as a multiple of D.
        horizon: H actions that are predicted, the first for now.
        n_action: of them executed before the next decision.
        text_length: T_text tokens of the instruction, padding included.
        level: feature map of the encoder whose cells are tokens; see :class:`xdfast.robot.vla.vision.GridEncoder`.
        objective: of normalised actions: ``"l1"`` or ``"smooth_l1"`` (quadratic below 0.1) for regression, ``"diffusion"`` for a
            denoiser (:class:`xdfast.robot.vla.denoiser.ChunkDenoiser`).
        diffusion: scheduler of the last one, :class:`xdfast.robot.diffusion.DiffusionSettings` if left out; None for regression.
        denoiser_width, denoiser_depth: of the denoiser; regression has none.
        fps: control frequency in Hz; 0 if unknown.
    """

    action_dim: int
    state_dim: int
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    crop: int
    encoder: EncoderSpec
    vocabulary: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    width: int = 256
    layers: int = 8
    heads: int = 4
    mlp_ratio: float = 4.0
    horizon: int = 16
    n_action: int = 8
    text_length: int = 16
    level: int = -2
    objective: str = "l1"
    fps: int = 0
    diffusion: DiffusionSettings | None = None
    denoiser_width: int = 128
    denoiser_depth: int = 3

    def __post_init__(self) -> None:
        if self.objective == "diffusion" and self.diffusion is None:
            object.__setattr__(self, "diffusion", DiffusionSettings())  # frozen

    @property
    def n_obs(self) -> int:
        """T_obs, observations that a decision sees: the latest one."""
        return 1

    @property
    def task(self) -> str:
        """The tasks, in one line."""
        return ", ".join(self.tasks)

    def validate(self) -> None:
        """Raises ValueError: sizes that do not fit together."""
        for name in (
            "action_dim",
            "state_dim",
            "crop",
            "width",
            "layers",
            "heads",
            "horizon",
            "n_action",
            "text_length",
            "denoiser_width",
            "denoiser_depth",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}")
        if not self.cameras:
            raise ValueError("a VLA needs a camera")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads ({self.heads}), got {self.width}")
        if int(self.width * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must be > 0, got {self.mlp_ratio}")
        if self.n_action > self.horizon:
            raise ValueError(f"n_action ({self.n_action}) must not exceed horizon ({self.horizon})")
        if self.crop > min(self.image_size):
            raise ValueError(f"crop ({self.crop}) must not exceed the pictures' size {self.image_size}")
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}."
                f"{nearest(self.objective, OBJECTIVES)}"
            )
        if self.diffusion is not None:
            if self.objective != "diffusion":
                raise ValueError(
                    f"diffusion settings belong to objective='diffusion'; leave them out with {self.objective!r}"
                )
            self.diffusion.validate()
        Tokenizer(self.vocabulary)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> VLASpec:
        """From :meth:`to_dict`'s values, also after a trip through JSON; settings of later versions may be missing."""
        made: dict[str, Any] = {key: tuple(values[key]) for key in ("cameras", "image_size", "vocabulary", "tasks")}
        made["encoder"] = EncoderSpec.from_dict(values["encoder"])
        if values.get("diffusion") is not None:
            made["diffusion"] = DiffusionSettings(**values["diffusion"])
        return cls(**{**values, **made})
