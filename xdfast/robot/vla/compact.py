"""Our own small vision-language-action model: a timm encoder, the words of an instruction, one transformer, a chunk of actions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast.models import FeatureModel
from xdfast.robot.normalize import MinMax
from xdfast.robot.pictures import batch_of, check_pictures, crop_cameras
from xdfast.robot.vla.base import BaseVLA
from xdfast.robot.vla.checks import check_actions, check_told
from xdfast.robot.vla.denoiser import ChunkDenoiser, DiffusionHead
from xdfast.robot.vla.instructions import Tokenizer
from xdfast.robot.vla.interface import Observed
from xdfast.robot.vla.spec import VLASpec
from xdfast.robot.vla.vision import GridEncoder

__all__ = ["CompactVLA"]

#: Below it ``smooth_l1`` is quadratic, in units of the normalised actions.
_BETA = 0.1
#: Draws of noise and diffusion step per sample and update: the denoiser is cheap beside the tokens it is told.
_DRAWS = 8


class CompactVLA(BaseVLA):
    r"""Pictures, an instruction and proprioception in, a chunk of actions out, by regression or diffusion.

    .. math::
        h_0 = [\,W_v\,\mathrm{norm}(\mathrm{enc}(I_k)) + p_v + c_k;\; E[w] + p_t;\; W_s s;\; q_1 \dots q_H\,], \quad
        a_{1 \dots H} = W_a\,\mathrm{norm}(h_L)_{\text{queries}}

    Every token sees every other one (full attention). Positions are learned embeddings, not rotations: there are always as
    many cells, words and queries. Padding of the instruction is a word like any other. The layers are timm's pre-norm blocks, so
    ``xdfast.route(vla, blocks="layers", tokens=vla.num_tokens)`` gives them gates. With ``spec.objective="diffusion"`` a small
    denoiser of the chunk takes the place of :math:`W_a`, conditioned on :math:`\mathrm{norm}(h_L)` at the queries: the
    transformer runs once per decision, the denoiser S times. It is a
    :class:`xdfast.robot.vla.TeacherVLA`; normalisation of states and actions (min-max) is part of it and its files.

    Args:
        spec: sizes and settings.
        encoder: taken over, not copied; what lies behind ``spec.level`` is cut off.

    Shape:
        images uint8 [B, K, 1, H, W, 3]; state [B, 1, P]; instruction int64 [B, T_text]; actions [B, horizon, A]; noise
        [S, B, horizon, A], see :meth:`noise`.
        Tokens, in order: vision [K·h·w], text [T_text], state [1], queries [horizon].

    Raises:
        ValueError: sizes that do not fit together, or an encoder without feature maps.
        ImportError: diffusion without diffusers.

    Example:
        >>> from xdfast.robot import build_encoder
        >>> from xdfast.robot.vla import Tokenizer, VLASpec
        >>> encoder, facts = build_encoder("test_resnet", image_size=28)
        >>> words = Tokenizer.of(["Open the drawer"]).vocabulary
        >>> spec = VLASpec(4, 9, ("front",), (32, 32), 28, facts, words, width=32, layers=2)
        >>> vla = CompactVLA(spec, encoder).eval()
        >>> told = vla.tokenizer.encode_all(["Open the drawer"] * 2, 16)
        >>> vla.act(torch.zeros(2, 1, 1, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, 1, 9), told).shape
        torch.Size([2, 8, 4])
    """

    def __init__(self, spec: VLASpec, encoder: FeatureModel) -> None:
        super().__init__()
        spec.validate()
        self.spec, self.tokenizer = spec, Tokenizer(spec.vocabulary)
        self.encoder = GridEncoder(encoder, spec.level)
        width, cells = spec.width, self.encoder.tokens
        self.vision_norm = nn.LayerNorm(self.encoder.channels)  # feature maps of encoders differ in scale
        self.vision_in = nn.Linear(self.encoder.channels, width)
        self.cell_position = nn.Parameter(torch.empty(cells, width))
        self.camera = nn.Parameter(torch.empty(len(spec.cameras), width))
        self.words = nn.Embedding(len(self.tokenizer), width)
        self.word_position = nn.Parameter(torch.empty(spec.text_length, width))
        self.state_in = nn.Linear(spec.state_dim, width)
        self.queries = nn.Parameter(torch.empty(spec.horizon, width))
        self.layers = nn.Sequential(
            *(Block(width, spec.heads, spec.mlp_ratio, qkv_bias=True) for _ in range(spec.layers))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, spec.action_dim) if spec.diffusion is None else _diffusion_head(spec)
        self.state_norm, self.action_norm = MinMax(spec.state_dim), MinMax(spec.action_dim)
        self._initialise()

    # --- the teacher's interface

    @property
    def num_layers(self) -> int:
        """L."""
        return self.spec.layers

    @property
    def dim(self) -> int:
        """D."""
        return self.spec.width

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.groups["language"][1] + 1 + self.spec.horizon

    @property
    def groups(self) -> Mapping[str, tuple[int, int]]:
        """Ranges of the tokens of pictures and of the instruction; the state's and the action queries' follow them."""
        vision = len(self.spec.cameras) * self.encoder.tokens
        return {"vision": (0, vision), "language": (vision, vision + self.spec.text_length)}

    def embed(self, batch: Observed) -> Tensor:
        """The tokens that enter layer 0, ``[B, T, D]``; pictures are cropped at random in training mode.

        Raises:
            ValueError: a shape or dtype the policy was not made for; the message names both.
        """
        return self.tokens(self.features(batch.images), batch.state, batch.instruction)

    def decode(self, tokens: Tensor, noise: Tensor | None = None) -> Tensor:
        """``[B, T, D]`` after the last layer → normalised actions ``[B, H, A]``, a function of tokens and noise.

        Args:
            tokens: h_L.
            noise: as :meth:`noise` gives it, for diffusion. None: zeros, the centre of the noise: always the same chunk, with
                nothing drawn. Closed loops give each episode its own noise. Regression takes no notice.

        Raises:
            ValueError: noise of another shape.
        """
        asked = self.norm(tokens[:, -self.spec.horizon :])
        if not isinstance(self.head, DiffusionHead):
            return self.head(asked)
        if noise is None:
            noise = asked.new_zeros(self.head.noise_shape(asked.shape[0]))
        return self.head.sample(asked, noise)

    # --- its parts

    def features(self, images: Tensor) -> Tensor:
        """uint8 ``[B, K, 1, H, W, 3]`` of K cameras → the encoder's cells, float ``[B, K, h·w, C]``. In training mode crops fall
        at random (torch's global generator), else in the middle.

        Raises:
            ValueError: another shape (such as a missing camera) or dtype.
        """
        spec = self.spec
        check_pictures(images, spec.cameras, spec.n_obs, spec.image_size)
        cropped = crop_cameras(images, spec.crop, at_random=self.training)[:, :, 0]  # [B, K, S, S, 3]
        pixels = cropped.permute(0, 1, 4, 2, 3).float().div_(255)
        return self.encoder(batch_of(pixels)).unflatten(0, cropped.shape[:2])

    def tokens(self, features: Tensor, state: Tensor, instruction: Tensor) -> Tensor:
        """What :meth:`features` gave, with state and instruction → ``[B, T, D]``.

        Raises:
            ValueError: states or instructions of another shape or dtype.
        """
        rows = features.shape[0]  # not len(): torch.export would take it for a constant
        check_told(self.spec, state, instruction, rows)
        seen = self.vision_in(self.vision_norm(features)) + self.cell_position + self.camera[:, None]  # [B, K, h·w, D]
        told = self.words(instruction) + self.word_position
        felt = self.state_in(self.state_norm(state.float()))
        asked = self.queries.expand(rows, -1, -1).to(seen.dtype)
        return torch.cat([seen.flatten(1, 2), told.to(seen.dtype), felt.to(seen.dtype), asked], dim=1)

    # --- learning

    def loss(self, batch: Observed) -> Tensor:
        r"""Mean distance of the normalised chunk from the demonstrated one, :math:`\mathrm{mean}\,|a - \hat a|` by default; of a
        policy that learns by diffusion, the denoiser's squared error at random steps.

        Args:
            batch: observations, with ``actions`` ``[B, H, A]``, raw.

        Raises:
            ValueError: actions that are not finite, or of another shape; observations as in :meth:`embed`.
        """
        return self.chunk_loss(self.layers(self.embed(batch)), batch.actions)  # type: ignore[attr-defined]

    def chunk_loss(self, tokens: Tensor, actions: Tensor, draws: int = _DRAWS) -> Tensor:
        """:meth:`loss` from the tokens after the last layer.

        Args:
            tokens: ``[B, T, D]``.
            actions: raw, ``[B, H, A]``.
            draws: of noise and diffusion step per sample, from torch's global generator; regression takes no notice.

        Raises:
            ValueError: actions that are not finite, or of another shape.
        """
        if not isinstance(self.head, DiffusionHead):
            return self.action_loss(self.decode(tokens), actions)
        target = self._target(actions, len(tokens))
        return self.head.loss(target, self.norm(tokens[:, -self.spec.horizon :]), draws)

    def action_loss(self, predicted: Tensor, actions: Tensor) -> Tensor:
        """Distance of a chunk that was predicted (or sampled) already, normalised ``[B, H, A]``, from raw actions: smooth L1 for
        that objective, else L1. Errors as in :meth:`chunk_loss`."""
        target, predicted = self._target(actions, len(predicted)), predicted.float()
        if self.spec.objective == "smooth_l1":
            return F.smooth_l1_loss(predicted, target, beta=_BETA)
        return F.l1_loss(predicted, target)

    def _target(self, actions: Tensor, batch: int) -> Tensor:
        check_actions(self.spec, actions, batch)
        return self.action_norm(actions.float())

    # --- acting

    @torch.no_grad()
    def act(self, images: Tensor, state: Tensor, instruction: Tensor, noise: Tensor | None = None) -> Tensor:
        """The next ``n_action`` actions, float32 ``[B, n_action, A]``, in the units of the demonstrations.

        Args:
            images: uint8 ``[B, K, 1, H, W, 3]``.
            state: proprioception ``[B, 1, P]``.
            instruction: int64 ``[B, T_text]``, of ``vla.tokenizer.encode_all(sentences, T_text)``.
            noise: as in :meth:`decode`; None gives the same actions every time.

        Raises:
            ValueError: wrong shapes or dtypes, a state that is not finite, words that are not in the vocabulary.
        """
        if not state.isfinite().all():
            raise ValueError("the state is not finite (NaN or infinity)")
        if instruction.numel() and not 0 <= int(instruction.min()) <= int(instruction.max()) < len(self.tokenizer):
            raise ValueError(
                f"instruction ids must be 0 to {len(self.tokenizer) - 1} (the vocabulary), got {int(instruction.min())} to "
                f"{int(instruction.max())}"
            )
        tokens = self.layers(self.tokens(self.features(images), state, instruction))
        return self.unnormalised(self.decode(tokens, noise))

    def noise(self, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """What diffusion starts from, ``[S, batch, H, A]`` (S = 1 for ddim); regression needs none, ``[0, batch]``.

        Drawn on the CPU, so that a seed means the same on every device."""
        if not isinstance(self.head, DiffusionHead):
            return torch.empty(0, batch, device=device)
        return torch.randn(self.head.noise_shape(batch), generator=generator).to(device)

    def _initialise(self) -> None:
        for embedding in (self.cell_position, self.camera, self.words.weight, self.word_position, self.queries):
            nn.init.normal_(embedding, std=self.spec.width**-0.5)
        for linear in (m for m in (*self.layers.modules(), self.vision_in, self.state_in) if isinstance(m, nn.Linear)):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        for name, parameter in self.layers.named_parameters():
            if name.endswith(("attn.proj.weight", "mlp.fc2.weight")):  # the sum of 2 L branches keeps its scale
                parameter.data.mul_((2 * self.spec.layers) ** -0.5)
        last = self.head.unet.leave if isinstance(self.head, DiffusionHead) else self.head
        nn.init.normal_(last.weight, std=0.1 * last.in_features**-0.5)
        nn.init.zeros_(last.bias)


def _diffusion_head(spec: VLASpec) -> DiffusionHead:
    assert spec.diffusion is not None
    denoiser = ChunkDenoiser(
        spec.action_dim, spec.horizon, spec.width, width=spec.denoiser_width, depth=spec.denoiser_depth
    )
    return DiffusionHead(denoiser, spec.diffusion)
