"""Hugging Face style VLAs (the shapes of OpenVLA, CogACT and SmolVLA) as a teacher for ActDistill, and as a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.nn.convert import route
from xdfast.robot.normalize import MinMax
from xdfast.robot.pictures import batch_of, check_pictures
from xdfast.robot.vla.base import BaseVLA
from xdfast.robot.vla.checks import check_actions, check_told
from xdfast.robot.vla.hf_checks import check_values, check_vocabulary
from xdfast.robot.vla.hf_decoder import DecoderStack, build_decoder, config_of
from xdfast.robot.vla.hf_heads import BinsHead, action_head
from xdfast.robot.vla.hf_spec import BINS, HuggingFaceSpec
from xdfast.robot.vla.hf_text import PromptTokenizer
from xdfast.robot.vla.hf_vision import Projector, VisionTower, vision_encoder
from xdfast.robot.vla.instructions import Tokenizer
from xdfast.robot.vla.interface import Observed

__all__ = ["HuggingFaceVLA"]

#: Where the decoder's list of layers is in a :class:`HuggingFaceVLA`.
_BLOCKS = "layers.model.layers"


class HuggingFaceVLA(BaseVLA):
    r"""A language model of transformers that sees: patch tokens, an instruction and proprioception in, a chunk of actions out.

    .. math::
        h_0 = [\,E[\text{begin}];\; \mathrm{MLP}(\mathrm{enc}(I_k));\; E[w];\; W_s s;\; q_1 \dots q_Q\,], \quad
        a_{1 \dots H} = \mathrm{head}(\mathrm{norm}(h_L)_{\text{last}})

    through a causal decoder (Llama, Qwen, SmolLM, Mistral, Gemma, Phi-3, OLMo 2) with its own rotary positions. It is a
    :class:`xdfast.robot.vla.TeacherVLA`. The shapes of known models, by their spec:

    * **OpenVLA**: two vision encoders, ``vision_level=-2``, ``head="bins"``, ``proprioception=False``, ``horizon=1``. The action's
      tokens are generated one after the other with a KV cache; ``embed`` appends those the model itself chooses, so that one
      pass over its tokens gives the same actions again. Token ranges of the router (``groups``) end before them.
    * **OpenVLA-OFT**: ``head="regression"``: one pass, learned queries, a continuous chunk.
    * **CogACT**: ``head="diffusion"``, ``queries=1``: one cognition token conditions a denoiser of the chunk.
    * **SmolVLA**: the first ``layers`` of a small backbone, few ``queries``. Its separate action expert is not rebuilt.

    Published weights of OpenVLA, CogACT and SmolVLA were never run with it. The layout of OpenVLA's files is tested on a small
    random model; CogACT's (a ``.pt`` of another code base) and SmolVLA's (an expert with cross-attention) cannot be
    loaded, their language backbones can.

    Args:
        spec: sizes and settings.
        decoder: of :func:`xdfast.robot.vla.hf_decoder.build_decoder`, taken over.
        vision: taken over.
        tokenizer: of transformers; None: the words of ``spec.vocabulary``.

    Shape:
        images uint8 [B, K, 1, H, W, 3]; state [B, 1, P]; instruction int64 [B, T_text], padding anywhere; actions [B, horizon, A].
        Tokens, in order: begin [0 or 1], vision [K·t], text [T_text] (padding first), state [0 or 1], then queries [Q] or all
        but the last action token [H·A - 1].

    Raises:
        ValueError: sizes that do not fit together, a backbone that cannot be routed.
        ImportError: transformers is missing or older than 5; diffusion without diffusers.

    Reference:
        OpenVLA, arXiv 2406.09246; OpenVLA-OFT, arXiv 2502.19645; CogACT, arXiv 2411.19650; SmolVLA, arXiv 2506.01844.
    """

    queries: Tensor

    def __init__(self, spec: HuggingFaceSpec, decoder: Any, vision: VisionTower, tokenizer: Any = None) -> None:
        super().__init__()
        spec.validate()
        if tokenizer is None and not spec.vocabulary:
            raise ValueError("give a tokenizer of transformers, or the words that the policy is told (sentences=[...])")
        self.spec = spec
        source = Tokenizer(spec.vocabulary) if tokenizer is None else tokenizer
        self.tokenizer = PromptTokenizer(source, spec.prompt, spec.suffix, spec.lower_case)
        check_vocabulary(spec, len(self.tokenizer), decoder.embed_tokens)
        width, weight = int(decoder.config.hidden_size), decoder.embed_tokens.weight
        self.vision = vision
        self.projector = Projector(vision.channels, width, len(spec.vision) > 1)
        self.norm = decoder.norm
        decoder.norm = nn.Identity()  # states between layers are what is tapped; decode() normalises
        self.layers = DecoderStack(decoder)
        self.state_in = nn.Linear(spec.state_dim, width) if spec.proprioception else None
        self.head = action_head(spec, width)
        queries = torch.empty(spec.queries, width).normal_(std=0.02)
        if spec.queries:
            self.queries = nn.Parameter(queries)
        else:
            self.register_buffer("queries", queries, persistent=False)
        for part in (self.projector, self.state_in, None if spec.head == "diffusion" else self.head):
            if part is not None:  # a chunk is denoised in float32
                part.to(weight.dtype)
        self.queries.data = self.queries.data.to(weight.dtype)
        self.state_norm, self.action_norm = MinMax(spec.state_dim), MinMax(spec.action_dim)

    @classmethod
    def from_config(
        cls,
        backbone: Any,
        vision: Any,
        *,
        tokenizer: Any = None,
        sentences: Sequence[str] = (),
        vision_size: int | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> HuggingFaceVLA:
        """One with random weights; nothing is downloaded.

        Args:
            backbone: configuration of a decoder (``LlamaConfig(...)``), or its dictionary with ``model_type``.
            vision: a timm name, a vision configuration of transformers, or a list of them.
            tokenizer: of transformers; None: the words of ``sentences``.
            sentences: what the policy will be told.
            vision_size: input size of the vision encoders; default: their own.
            dtype: of decoder, projector and head.
            settings: of :class:`HuggingFaceSpec`.

        Raises:
            ValueError: see :class:`HuggingFaceVLA`.

        Example:
            >>> import torch, transformers
            >>> from xdfast.robot.vla import HuggingFaceVLA
            >>> backbone = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            ...     num_attention_heads=2)
            >>> vla = HuggingFaceVLA.from_config(backbone, "test_vit", sentences=["Open the drawer"], action_dim=4, state_dim=9,
            ...     cameras=("front",), image_size=(32, 32), vision_size=32).eval()
            >>> told = vla.tokenizer.encode_all(["Open the drawer"] * 2, vla.spec.text_length)
            >>> vla.act(torch.zeros(2, 1, 1, 32, 32, 3, dtype=torch.uint8), torch.zeros(2, 1, 9), told).shape
            torch.Size([2, 8, 4])
        """
        sources = vision if isinstance(vision, (list, tuple)) else (vision,)
        level = settings.get("vision_level", -1)
        encoders = [vision_encoder(source, level, image_size=vision_size) for source in sources]
        if tokenizer is None and sentences:
            prompt = settings.get("prompt", "{instruction}")
            told = [prompt.replace("{instruction}", sentence) for sentence in sentences]
            settings.setdefault("vocabulary", Tokenizer.of(told).vocabulary)
        spec = HuggingFaceSpec(backbone=config_of(backbone), vision=tuple(facts for _, facts in encoders), **settings)
        spec.validate()
        decoder = build_decoder(spec.backbone, spec.layers, dtype)
        return cls(spec, decoder, VisionTower([encoder for encoder, _ in encoders]), tokenizer)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> HuggingFaceVLA:
        """From a folder or a name on the hub; see :func:`xdfast.robot.vla.hf_pretrained.load_pretrained`."""
        from xdfast.robot.vla.hf_pretrained import load_pretrained

        return load_pretrained(source, **options)

    # --- the teacher's interface

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def dim(self) -> int:
        """D."""
        return int(self.layers.model.config.hidden_size)

    @property
    def groups(self) -> Mapping[str, tuple[int, int]]:
        """Ranges of the tokens of pictures and of the instruction, from the sizes of encoders, cameras and text."""
        first = int(self.spec.begin is not None)
        end = first + len(self.spec.cameras) * self.vision.tokens
        return {"vision": (first, end), "language": (end, end + self.spec.text_length)}

    @property
    def num_tokens(self) -> int:
        """T of a whole decision."""
        asked = self.head.slots - 1 if self.spec.head == "bins" else self.head.slots
        return self.groups["language"][1] + int(self.state_in is not None) + asked

    def embed(self, batch: Observed) -> Tensor:
        """The tokens that enter layer 0, ``[B, T, D]``; those that are all 0 are padding of the instruction. With ``head="bins"``
        they end with the action tokens that the model generates, found without gradients.

        Raises:
            ValueError: a shape or dtype the policy was not made for; on the CPU also states that are not finite, unknown ids, and
                instructions of padding alone.
        """
        if batch.state.device.type == "cpu":  # looking is free
            self._look_at(batch.images, batch.state, batch.instruction)
        return self.tokens(self.features(batch.images), batch.state, batch.instruction)

    def embed_demonstrated(self, batch: Observed) -> Tensor:
        """As :meth:`embed`, for learning: with ``head="bins"`` the action tokens are the demonstrated ones (``batch.actions``)."""
        if not isinstance(self.head, BinsHead):
            return self.embed(batch)
        if batch.state.device.type == "cpu":
            self._look_at(batch.images, batch.state, batch.instruction)
        prompt = self.prompt(self.features(batch.images), batch.state, batch.instruction)
        actions: Tensor = batch.actions  # type: ignore[attr-defined]
        return self._with_actions(prompt, self.head.encode(self._target(actions, len(prompt))))

    def readable(self, tokens: Tensor) -> Tensor:
        """Which tokens graph heads may read, bool ``[B, T]``: no padding, and no action tokens, which are the answer.

        Args:
            tokens: of :meth:`embed`, ``[B, T, D]``.
        """
        found = self.layers.real(tokens).clone()
        if isinstance(self.head, BinsHead):
            found[:, tokens.shape[1] - (self.head.slots - 1) :] = False
        return found

    def decode(self, tokens: Tensor, noise: Tensor | None = None) -> Tensor:
        """``[B, T, D]`` after the last layer → normalised actions ``[B, H, A]``.

        Args:
            tokens: h_L.
            noise: for diffusion, as :meth:`noise` gives it; None: zeros.
        """
        return self.head.decode(self.norm(tokens[:, -self.head.slots :]), noise)

    def route(self, target_flops: float = 0.5, **options: Any) -> Any:
        """:func:`xdfast.nn.route` of the decoder's layers, with this model's token groups in the router.

        Args:
            target_flops: as there.
            options: as there; ``router`` may be a dictionary, to which ``groups`` are added.

        Returns:
            A routed copy (``copy=False``: this model); gates are fixed per sequence at the prompt.

        Raises:
            ValueError: as there, such as decoders that scale their branches.
        """
        router = options.pop("router", None)
        if router is None or isinstance(router, dict):
            router = {"groups": [list(group) for group in self.groups.values()], **(router or {})}
        options = {"blocks": _BLOCKS, "tokens": self.num_tokens, **options}
        return route(self, target_flops, router=router, **options)

    def _look_at(self, images: Tensor, state: Tensor, instruction: Tensor) -> None:
        check_told(self.spec, state, instruction, len(images), proprioception=self.spec.proprioception)
        felt = state if self.spec.proprioception else None
        check_values(felt, instruction, self.layers.model.embed_tokens.num_embeddings, self.tokenizer.pad)

    # --- its parts

    def features(self, images: Tensor) -> Tensor:
        """uint8 ``[B, K, 1, H, W, 3]`` of K cameras → patch tokens ``[B, K, t, C]``.

        Raises:
            ValueError: another shape (such as a missing camera) or dtype.
        """
        check_pictures(images, self.spec.cameras, self.spec.n_obs, self.spec.image_size)
        pixels = images[:, :, 0].permute(0, 1, 4, 2, 3).float() / 255
        return self.vision(batch_of(pixels)).unflatten(0, images.shape[:2])

    def prompt(self, features: Tensor, state: Tensor, instruction: Tensor) -> Tensor:
        """Tokens of what was seen, told and felt, ``[B, T', D]``, without queries and action tokens.

        Raises:
            ValueError: states or instructions of another shape or dtype.
        """
        spec, rows = self.spec, len(features)
        check_told(spec, state, instruction, rows, proprioception=spec.proprioception)
        weight = self.projector.fc1.weight
        seen = self.projector(features.flatten(1, 2).to(weight.dtype))
        real = instruction != self.tokenizer.pad
        order = real.long().argsort(dim=1, stable=True)  # padding to the front: the last token of a prompt is real
        real = real.gather(1, order)
        told = self._words(instruction.gather(1, order).clamp(min=0)).masked_fill(~real[..., None], 0)
        parts = [seen, told]
        if spec.begin is not None:
            parts.insert(0, self._words(instruction.new_full((rows, 1), spec.begin)))
        if self.state_in is not None:
            parts.append(self.state_in(self.state_norm(state.float()).to(self.state_in.weight.dtype)))
        return torch.cat([part.to(weight.dtype) for part in parts], 1)

    def tokens(self, features: Tensor, state: Tensor, instruction: Tensor) -> Tensor:
        """What :meth:`features` gave, with state and instruction → ``[B, T, D]``; errors as in :meth:`prompt`."""
        prompt = self.prompt(features, state, instruction)
        if isinstance(self.head, BinsHead):
            return self._with_actions(prompt, self._generated(prompt))
        return torch.cat([prompt, self.queries.expand(len(prompt), -1, -1).to(prompt.dtype)], 1)

    def _generated(self, prompt: Tensor) -> Tensor:
        """Indices of the action tokens that the model chooses, ``[B, H·A]``."""
        return self.layers.generate(
            prompt,
            self.head.slots,
            lambda states: self.head.linear(self.norm(states)).argmax(-1),
            lambda index: self._action_words(index).to(prompt.dtype),
        )

    def _action_words(self, index: Tensor) -> Tensor:
        last = self.spec.last_bin or self.layers.model.embed_tokens.num_embeddings
        return self._words(last - BINS + index)

    def _words(self, ids: Tensor) -> Tensor:
        """Embeddings ``[..., D]``, none of them all 0: a model may have such a word (Llama's ``<unk>``), which is no padding."""
        found = self.layers.model.embed_tokens(ids)
        least = 6e-8 if found.dtype == torch.float16 else torch.finfo(found.dtype).tiny
        return found.masked_fill((found == 0).all(-1, keepdim=True), least)

    def _with_actions(self, prompt: Tensor, index: Tensor) -> Tensor:
        return torch.cat([prompt, self._action_words(index[:, :-1]).to(prompt.dtype)], 1)

    # --- learning

    def loss(self, batch: Observed) -> Tensor:
        """L1 of the normalised chunk, squared error of the denoiser, or cross entropy of the action tokens (each after the
        demonstrated ones before it).

        Args:
            batch: observations, with ``actions`` ``[B, H, A]``, raw.

        Raises:
            ValueError: actions that are not finite, or of another shape; observations as in :meth:`embed`.
        """
        actions: Tensor = batch.actions  # type: ignore[attr-defined]
        if not isinstance(self.head, BinsHead):
            return self.chunk_loss(self.layers(self.embed(batch)), actions)
        states = self.layers(self.embed_demonstrated(batch))
        return self.head.loss(self.norm(states[:, -self.head.slots :]), self._target(actions, len(states)))

    def chunk_loss(self, tokens: Tensor, actions: Tensor, draws: int = 8) -> Tensor:
        """:meth:`loss` from the tokens after the last layer (with ``head="bins"`` each token after those the model chose itself).

        Args:
            tokens: ``[B, T, D]``.
            actions: raw, ``[B, H, A]``.
            draws: of noise and diffusion step per sample; other heads take no notice.

        Raises:
            ValueError: actions that are not finite, or of another shape.
        """
        target = self._target(actions, len(tokens))
        return self.head.loss(self.norm(tokens[:, -self.head.slots :]), target, draws)

    def action_loss(self, predicted: Tensor, actions: Tensor) -> Tensor:
        """L1 of a normalised chunk ``[B, H, A]`` that was predicted already from raw actions; errors as in :meth:`chunk_loss`."""
        return (predicted.float() - self._target(actions, len(predicted))).abs().mean()

    def _target(self, actions: Tensor, rows: int) -> Tensor:
        check_actions(self.spec, actions, rows)
        return self.action_norm(actions.float())

    # --- acting

    @torch.no_grad()
    def act(self, images: Tensor, state: Tensor, instruction: Tensor, noise: Tensor | None = None) -> Tensor:
        """The next ``n_action`` actions, float32 ``[B, n_action, A]``, in the units of the demonstrations.

        Args:
            images: uint8 ``[B, K, 1, H, W, 3]``.
            state: proprioception ``[B, 1, P]``.
            instruction: int64 ``[B, T_text]``, of ``vla.tokenizer.encode_all(sentences, T_text)``.
            noise: as in :meth:`decode`.

        Raises:
            ValueError: wrong shapes or dtypes, a state that is not finite, unknown ids, instructions of padding alone.
        """
        self._look_at(images, state, instruction)
        features = self.features(images)
        if isinstance(self.head, BinsHead):  # the KV cache computed what one more pass would
            chosen = self._generated(self.prompt(features, state, instruction))
            return self.unnormalised(self.head.centres(chosen))
        return self.unnormalised(self.decode(self.layers(self.tokens(features, state, instruction)), noise))

    def noise(self, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """What diffusion starts from, ``[S, batch, H, A]``; other heads need none, ``[0, batch]``. Drawn on the CPU."""
        return torch.randn(self.head.noise_shape(batch), generator=generator).to(device)
