"""What our VLAs have in common, whatever their transformer: instructions, units of actions, what they refuse."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from xdfast.robot.normalize import MinMax
from xdfast.robot.sim.names import task_spec
from xdfast.robot.vla.acting import InstructedVLA
from xdfast.robot.vla.interface import Observed

__all__ = ["BaseVLA"]


class BaseVLA(nn.Module, ABC):
    """Base of :class:`xdfast.robot.vla.CompactVLA` and :class:`xdfast.robot.vla.HuggingFaceVLA`, which add ``embed``, ``layers``
    and ``decode``.

    Attributes:
        spec: sizes and settings, with ``horizon``, ``n_action``, ``action_dim``, ``state_dim``, ``n_obs``, ``text_length``.
        action_norm: raw actions → normalised ones.
    """

    spec: Any
    layers: Any
    action_norm: MinMax

    @property
    def chunk(self) -> int:
        """H actions."""
        return self.spec.horizon

    @property
    def action_dim(self) -> int:
        """A."""
        return self.spec.action_dim

    @abstractmethod
    def embed(self, batch: Observed) -> Tensor:
        """The tokens that enter layer 0, ``[B, T, D]``."""

    @abstractmethod
    def decode(self, tokens: Tensor, noise: Tensor | None = None) -> Tensor:
        """``[B, T, D]`` after the last layer → normalised actions ``[B, H, A]``."""

    def actions(self, batch: Observed, noise: Tensor | None = None) -> Tensor:
        """Normalised actions ``[B, H, A]``; errors as in :meth:`embed`."""
        return self.decode(self.layers(self.embed(batch)), noise)

    def forward(self, batch: Observed) -> Tensor:
        """:meth:`actions`."""
        return self.actions(batch)

    def unnormalised(self, chunk: Tensor) -> Tensor:
        """Normalised ``[B, H, A]`` → the part to execute, ``[B, n_action, A]``, in the units of the demonstrations."""
        return self.action_norm.inverse(chunk[:, : self.spec.n_action].float())

    def for_task(self, task: str) -> InstructedVLA:
        """This policy with the usual instruction of a simulated task, as :func:`xdfast.robot.rollout.rollout` runs it.

        Raises:
            ValueError: no such task, or none of its words was learned.
        """
        return self.instructed(task_spec(task).instruction)

    def instructed(self, text: str) -> InstructedVLA:
        """This policy with an instruction of yours; raises as the tokenizer's ``encode``."""
        return InstructedVLA(self, text)
