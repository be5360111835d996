"""A VLA with one instruction looks like any other policy: what the closed loop, the runner and the controller ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    pass

__all__ = ["InstructedVLA"]


class InstructedVLA(nn.Module):
    """The decisions of a VLA that was told what to do, with the methods of :class:`xdfast.robot.DiffusionPolicy`.

    Args:
        vla: decides; shared, not copied.
        text: the instruction.

    Raises:
        ValueError: an instruction that is empty, too long, or without one known word.

    Example:
        >>> told = load_vla("runs/vla").instructed("Open the drawer")  # doctest: +SKIP
        >>> results = rollout(told, "drawer-open", range(10))          # doctest: +SKIP
    """

    instruction: Tensor

    def __init__(self, vla: Any, text: str) -> None:
        super().__init__()
        self.vla, self.text = vla, text
        encoded = vla.tokenizer.encode(text, vla.spec.text_length)
        self.register_buffer("instruction", encoded[None].to(vla.queries.device))

    @property
    def spec(self) -> Any:
        return self.vla.spec

    def features(self, images: Tensor) -> Tensor:
        """The VLA's features of pictures."""
        return self.vla.features(images)

    def condition(self, features: Tensor | None, state: Tensor) -> Tensor:
        """Tokens ``[B, T, D]`` of what was seen, told and felt."""
        assert features is not None  # a VLA has a camera
        return self.vla.tokens(features, state, self.instruction.expand(len(state), -1))

    def core(self, condition: Tensor, noise: Tensor) -> Tensor:
        """Tokens → normalised chunk ``[B, H, A]``."""
        return self.vla.decode(self.vla.layers(condition), noise)

    @torch.no_grad()
    def act(self, images: Tensor, state: Tensor, noise: Tensor | None = None) -> Tensor:
        """As :meth:`CompactVLA.act`."""
        return self.vla.act(images, state, self.instruction.expand(len(state), -1), noise)

    def decide(self, images: Tensor | None, state: Tensor, noise: Tensor, sample: Any = None) -> Tensor:
        """:meth:`act` without checks that wait for the device."""
        assert images is not None
        chunk = (sample or self.core)(self.condition(self.features(images), state), noise)
        return self.vla.unnormalised(chunk)

    def noise(self, batch: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """As :meth:`CompactVLA.noise`; a closed loop seeds the generator by episode and decision."""
        return self.vla.noise(batch, generator, device)
