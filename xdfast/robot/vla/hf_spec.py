"""Everything about a Hugging Face style VLA but its weights and its tokenizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from xdfast.errors import nearest
from xdfast.robot.diffusion import DiffusionSettings
from xdfast.robot.encoder import EncoderSpec

__all__ = ["BINS", "HEADS", "HuggingFaceSpec"]

#: How actions leave the transformer, see :class:`HuggingFaceSpec`.
HEADS = ("regression", "bins", "diffusion")

#: Action tokens of OpenVLA: so many ids at the end of the vocabulary.
BINS = 256


@dataclass(frozen=True)
class HuggingFaceSpec:
    """Sizes and settings of a :class:`xdfast.robot.vla.HuggingFaceVLA`.

    Attributes:
        action_dim: A.
        state_dim: P numbers of proprioception.
        cameras: names, in the order of the images.
        image_size: (H, W) of a camera's picture in pixels; every vision encoder resizes it to its own input.
        backbone: configuration of the decoder as transformers writes it, with ``model_type``.
        vision: encoders that look at every picture; their patch tokens lie side by side (OpenVLA has two). ``architecture`` is
            timm's name, or ``"transformers:MODEL_TYPE"`` with the model's configuration as options.
        tasks: it was trained on.
        layers: the first layers of the backbone that are kept, as in SmolVLA; 0: all.
        head: ``"regression"`` (OpenVLA-OFT's: an MLP on action queries, L1), ``"bins"`` (OpenVLA's: every number of an action is
            one of the last 256 ids of the vocabulary, one token after the other) or ``"diffusion"`` (CogACT's: a denoiser
            of the chunk, told by the action queries).
        horizon: H actions that are predicted, the first for now.
        n_action: of them executed before the next decision.
        queries: learned tokens at the end that ask for the chunk, a divisor of ``horizon``; 1 is CogACT's cognition token; 0: one
            per action. The head ``"bins"`` has none.
        text_length: T_text tokens of the instruction with its prompt, padding included.
        prompt: what the tokenizer reads; ``{instruction}`` stands for the instruction.
        suffix: ids after the prompt (OpenVLA's empty token).
        lower_case: instructions are brought to lower case (as OpenVLA's were).
        vocabulary: words of :class:`xdfast.robot.vla.Tokenizer`; empty where a tokenizer of transformers is used.
        begin: id of the token before the pictures; None: there is none.
        last_bin: one past the last action id; 0: the vocabulary's size. OpenVLA's vocabulary is padded behind it.
        proprioception: the state is a token; False: it is not looked at (as in OpenVLA).
        vision_level: which layer of the encoders gives the tokens: -1 the last, with its norm; -2 the last but one (OpenVLA), …
        diffusion: scheduler of that head, :class:`xdfast.robot.diffusion.DiffusionSettings` if left out.
        denoiser_width, denoiser_depth: of the denoiser.
        fps: control frequency in Hz; 0 if unknown.
    """

    action_dim: int
    state_dim: int
    cameras: tuple[str, ...]
    image_size: tuple[int, int]
    backbone: dict[str, Any]
    vision: tuple[EncoderSpec, ...]
    tasks: tuple[str, ...] = ()
    layers: int = 0
    head: str = "regression"
    horizon: int = 16
    n_action: int = 8
    queries: int = 0
    text_length: int = 32
    prompt: str = "{instruction}"
    suffix: tuple[int, ...] = ()
    lower_case: bool = False
    vocabulary: tuple[str, ...] = field(default=(), repr=False)
    begin: int | None = None
    last_bin: int = 0
    proprioception: bool = True
    vision_level: int = -1
    diffusion: DiffusionSettings | None = None
    denoiser_width: int = 128
    denoiser_depth: int = 3
    fps: int = 0

    def __post_init__(self) -> None:
        if self.head == "diffusion" and self.diffusion is None:
            object.__setattr__(self, "diffusion", DiffusionSettings())  # frozen
        if self.queries == 0 and self.head != "bins":
            object.__setattr__(self, "queries", self.horizon)

    @property
    def n_obs(self) -> int:
        """T_obs, observations that a decision sees: the latest one."""
        return 1

    @property
    def task(self) -> str:
        """The tasks, in one line."""
        return ", ".join(self.tasks)

    def validate(self) -> None:
        """Raises ValueError: sizes or settings that do not fit together."""
        sizes = ["action_dim", "horizon", "n_action", "text_length", "denoiser_width", "denoiser_depth"]
        for name in sizes + (["state_dim"] if self.proprioception else []):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, got {getattr(self, name)}")
        if self.layers < 0:
            raise ValueError(f"layers must be ≥ 0 (0: all of the backbone), got {self.layers}")
        if not self.cameras:
            raise ValueError("a VLA needs a camera")
        if not self.vision:
            raise ValueError("a VLA needs a vision encoder")
        if "model_type" not in self.backbone:
            raise ValueError("backbone must be a configuration of transformers with its model_type")
        if self.n_action > self.horizon:
            raise ValueError(f"n_action ({self.n_action}) must not exceed horizon ({self.horizon})")
        if self.head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {self.head!r}.{nearest(self.head, HEADS)}")
        if self.head == "bins" and self.queries:
            raise ValueError(f"head='bins' asks by the tokens it generates; leave out queries={self.queries}")
        if self.head != "bins" and (self.queries < 1 or self.horizon % self.queries):
            raise ValueError(f"queries must divide horizon ({self.horizon}), got {self.queries}")
        if "{instruction}" not in self.prompt:
            raise ValueError(f"prompt must contain {{instruction}}, got {self.prompt!r}")
        if self.vision_level >= 0:
            raise ValueError(f"vision_level counts from the last layer: -1, -2, …; got {self.vision_level}")
        if self.diffusion is not None:
            if self.head != "diffusion":
                raise ValueError(f"diffusion settings belong to head='diffusion'; leave them out with {self.head!r}")
            self.diffusion.validate()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> HuggingFaceSpec:
        """From :meth:`to_dict`'s values, also after a trip through JSON."""
        names = ("cameras", "image_size", "tasks", "suffix", "vocabulary")
        made: dict[str, Any] = {name: tuple(values[name]) for name in names}
        made["vision"] = tuple(EncoderSpec.from_dict(encoder) for encoder in values["vision"])
        if values.get("diffusion") is not None:
            made["diffusion"] = DiffusionSettings(**values["diffusion"])
        return cls(**{**values, **made})
