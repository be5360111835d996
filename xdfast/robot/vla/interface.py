"""What a vision-language-action model has to offer so that ActDistill can teach with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["Observation", "Observed", "TeacherVLA", "check_teacher", "hidden_states"]


class Observed(Protocol):
    """What :meth:`TeacherVLA.embed` reads of a batch."""

    @property
    def images(self) -> Tensor:
        """uint8 ``[B, K, T_obs, h, w, 3]``."""

    @property
    def state(self) -> Tensor:
        """float ``[B, T_obs, P]``, raw."""

    @property
    def instruction(self) -> Tensor:
        """int64 ``[B, T_text]``."""


@dataclass(frozen=True)
class Observation:
    """B observations with their instructions; any object with these three attributes does as well."""

    images: Tensor
    state: Tensor
    instruction: Tensor


class TeacherVLA(Protocol):
    """(images, instruction, proprioception) → action chunk, through a stack of residual layers over tokens.

    .. math::
        h_0 = \\mathrm{embed}(o), \\quad h_{l+1} = \\mathrm{layer}_l(h_l), \\quad a = \\mathrm{decode}(h_L)

    B samples, T tokens (vision, text, state, H action queries), D width, L layers, A numbers in an action. Actions are those
    the policy was trained on: normalised.

    Two further methods are used where they exist: ``embed_demonstrated(batch)``, the tokens of :meth:`embed` with the
    demonstrated actions (``batch.actions``) where the model would generate its own; and ``readable(tokens)``, bool ``[B, T]``:
    the tokens graph heads may read (no padding, no action tokens).

    Attributes:
        layers: tokens ``[B, T, D]`` → ``[B, T, D]``: an ``nn.Sequential`` of layers with timm's names ``norm1, attn, norm2,
            mlp`` (so that :func:`xdfast.nn.route` knows them), or the routed stack that took its place.
        groups: ``{"vision": (a, b), "language": (c, d)}``: ranges of tokens, for ``LayerRouter(groups=...)``.
        num_layers, dim, chunk, action_dim: L, D, H, A.
    """

    layers: Any

    @property
    def groups(self) -> Mapping[str, tuple[int, int]]: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def chunk(self) -> int: ...

    @property
    def action_dim(self) -> int: ...

    def embed(self, batch: Observed) -> Tensor:
        """The tokens that enter layer 0, ``[B, T, D]``."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Final norm and action head on the action queries: ``[B, T, D]`` → ``[B, H, A]``."""

    def actions(self, batch: Observed) -> Tensor:
        """``decode(layers(embed(batch)))``, normalised, ``[B, H, A]``."""


def check_teacher(vla: Any) -> None:
    """Whether an object is a :class:`TeacherVLA`.

    Raises:
        TypeError: it lacks something; everything missing is named.
        ValueError: its stack of layers cannot be tapped layer by layer, or its token groups overlap or are empty.
    """
    wanted = ("embed", "layers", "decode", "actions", "groups", "num_layers", "dim", "chunk", "action_dim")
    missing = [name for name in wanted if not hasattr(vla, name)]
    if missing:
        raise TypeError(
            f"{type(vla).__name__} is no teacher VLA: it has no {', '.join(missing)} (xdfast.robot.vla.TeacherVLA says what "
            "each of them is)"
        )
    count = len(vla.layers) if hasattr(vla.layers, "__len__") else None
    if count != vla.num_layers or not all(isinstance(vla.layers[i], nn.Module) for i in range(count or 0)):
        raise ValueError(
            f"layers must be a list of {vla.num_layers} modules (num_layers) whose outputs can be tapped, "
            f"got {type(vla.layers).__name__} of {count}"
        )
    last = 0
    for name, (first, end) in sorted(vla.groups.items(), key=lambda item: item[1]):
        if not last <= first < end:
            raise ValueError(f"groups must be ranges of tokens that do not overlap, got {dict(vla.groups)} ({name!r})")
        last = end


def hidden_states(layers: Any, tokens: Tensor) -> list[Tensor]:
    """h₀ … h_L of a stack, dense or routed, each ``[B, T, D]``; h_L is what ``layers(tokens)`` returns.

    Gradients flow where they are recorded. A layer that is skipped gives the state before it.

    Args:
        layers: of a :class:`TeacherVLA`.
        tokens: ``[B, T, D]``.
    """
    states = [tokens]
    handles = [
        layers[i].register_forward_hook(lambda module, given, made: states.append(made)) for i in range(len(layers))
    ]
    try:
        layers(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return states
