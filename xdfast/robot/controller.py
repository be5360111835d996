"""A policy as a robot's loop wants it: one observation in, one action out, at every tick."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from xdfast.robot.runner import PolicyRunner

if TYPE_CHECKING:
    from xdfast.robot.policy import DiffusionPolicy
    from xdfast.robot.vla import InstructedVLA

__all__ = ["Controller"]


class Controller:
    """Remembers the last observations and the rest of the action chunk; decides when the chunk is used up.

    Args:
        policy: decides; a VLA is given its instruction first, ``vla.instructed("Open the drawer")``.
        device: where it runs.
        seed: of the noise; the same seed and observations give the same actions.
        compile: torch.compile of what follows the encoder.

    Example:
        >>> controller = Controller(xd.load_policy("runs/drawer"))          # doctest: +SKIP
        >>> controller.reset()                                              # doctest: +SKIP
        >>> while running:                                                  # doctest: +SKIP
        ...     robot.apply(controller.act({"dp3": robot.picture()}, robot.state()))
    """

    def __init__(
        self,
        policy: DiffusionPolicy | InstructedVLA,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        self.policy = policy
        self._runner = PolicyRunner(policy, 1, device=device, compile=compile)
        self._seed = seed
        self.reset()

    def reset(self) -> None:
        """Before an episode: forgets observations and actions, and starts the noise anew."""
        self._generator = torch.Generator().manual_seed(self._seed)
        self._seen: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=self.policy.spec.n_obs)
        self._actions: deque[np.ndarray] = deque()

    @property
    def decides_next(self) -> bool:
        """Whether the next :meth:`act` runs the network (the others take an action that is there already)."""
        return not self._actions

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray) -> np.ndarray:
        """The action for now, float32 ``[A]``.

        Args:
            images: camera → uint8 ``[H, W, 3]`` of the size the policy was trained with; others than its cameras are ignored.
            state: proprioception ``[P]``.

        Raises:
            ValueError: a camera is missing, a picture or state of another size or type, a state that is not finite.
        """
        spec = self.policy.spec
        missing = [camera for camera in spec.cameras if camera not in images]
        if missing:
            raise ValueError(f"no picture of camera {missing[0]!r}; given: {', '.join(images) or 'none'}")
        size = (*spec.image_size, 3)
        for camera in spec.cameras:
            picture = np.asarray(images[camera])
            if picture.shape != size or picture.dtype != np.uint8:
                raise ValueError(
                    f"camera {camera!r}: expected uint8 {list(size)}, got {picture.dtype} {list(picture.shape)}; pictures have "
                    "the size of the demonstrations"
                )
        state = np.asarray(state, dtype=np.float32)
        if state.shape != (spec.state_dim,):
            raise ValueError(f"expected state [{spec.state_dim}], got {list(state.shape)}")
        pictures = np.stack([images[camera] for camera in spec.cameras]) if spec.cameras else np.zeros(0, np.uint8)
        self._seen.append((pictures, state))
        while len(self._seen) < spec.n_obs:  # at the start the first observation stands for those before it
            self._seen.appendleft(self._seen[0])
        if not self._actions:
            self._actions.extend(self._decide())
        return self._actions.popleft()

    def _decide(self) -> np.ndarray:
        seen = np.stack([pictures for pictures, _ in self._seen], axis=1)[None] if self.policy.spec.cameras else None
        states = np.stack([state for _, state in self._seen])[None]
        return self._runner.act(seen, states, self.policy.noise(1, self._generator))[0]
