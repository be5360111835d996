"""Which layers a routed policy ran at each decision, collected in the closed loop and summed up."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from xdfast.nn.routed import Decision, RoutedStack

__all__ = ["EpisodePaths", "PathRecorder", "routed_stack"]

log = logging.getLogger("xdfast")

#: Parts of an episode in ``use_over_time``, and the most frequent paths that are listed.
BINS, MOST = 10, 20

#: Which of a layer's decisions were on, as bits (the first one lowest) → its character in a path.
_LETTERS = {1: "01", 2: "0am1"}


@dataclass
class EpisodePaths:
    """The paths of one episode.

    Attributes:
        paths: of each decision in order, one character per layer: "1" it ran, "0" it was skipped; of layers whose attention and
            MLP are decided apart, "a" and "m": that one alone ran.
        executor: of the stack.
    """

    paths: list[str]
    executor: str


class PathRecorder:
    """Collects what a routed stack decides: ``rollout(policy, task, seeds, on_decision=recorder)``.

    The host reads nothing during the rollout: decisions stay where they were made until somebody asks for them. Rows that
    only fill a batch up are not counted.

    Args:
        stack: of the policy; it decides for whole samples.
        tokens: T, of a sample.

    Raises:
        ValueError: a stack that decides within samples (blocks, tokens), or in more than two parts of a layer.

    Example:
        >>> recorder = PathRecorder.of(policy)                                      # doctest: +SKIP
        >>> rollout(policy, "drawer-open", range(10), on_decision=recorder)         # doctest: +SKIP
        >>> recorder.summary()["paths"][0]                                          # doctest: +SKIP
        ['11010011', 57]
    """

    def __init__(self, stack: RoutedStack, tokens: int) -> None:
        if stack.unit != "sample":
            raise ValueError(f"a path is a decision for a whole sample, the stack decides for each {stack.unit}")
        if stack.branches not in _LETTERS:
            raise ValueError(f"paths have one or two decisions per layer, the stack has {stack.branches}")
        self.stack, self.tokens = stack, tokens
        self._episodes: dict[int, EpisodePaths] = {}
        self._waiting: list[tuple[list[int], list[int], Tensor, str]] = []

    @classmethod
    def of(cls, policy: Any) -> PathRecorder | None:
        """The recorder of a routed VLA, instructed or not; None for other policies (and, with a warning, for stacks that
        decide within samples)."""
        vla = getattr(policy, "vla", policy)
        stack = routed_stack(vla)
        if stack is None:
            return None
        try:
            return cls(stack, vla.num_tokens)
        except ValueError as error:
            log.warning("which layers run is not recorded: %s", error)
            return None

    def __call__(self, seeds: Sequence[int], decisions: Sequence[int]) -> None:
        """What was decided last, for these episodes: row i of the batch is decision ``decisions[i]`` of episode ``seeds[i]``.

        Decision 0 begins an episode, also one that was there before.

        Raises:
            RuntimeError: the stack has decided nothing, or for fewer samples.
        """
        decided = self.stack.decision
        if decided is None or len(decided.gates) < len(seeds):
            made = "nothing" if decided is None else f"for {len(decided.gates)} samples"
            raise RuntimeError(f"the stack decided {made}, paths of {len(seeds)} were to be recorded")
        active = _active(self.stack, decided)[: len(seeds)]
        self._waiting.append((list(seeds), list(decisions), active, decided.executor))

    def episode(self, seed: int) -> EpisodePaths:
        """The paths of an episode so far.

        Raises:
            KeyError: nothing was recorded of it.
        """
        self._settle()
        return self._episodes[seed]

    def add(self, seed: int, episode: EpisodePaths) -> None:
        """An episode that was recorded earlier.

        Raises:
            ValueError: paths of another stack.
        """
        letters = _LETTERS[self.stack.branches]
        for path in episode.paths:
            if len(path) != self.stack.num_layers or not set(path) <= set(letters):
                raise ValueError(
                    f"a path of this stack has {self.stack.num_layers} characters of {letters!r}, got {path!r}"
                )
        self._settle()
        self._episodes[seed] = episode

    def summary(self, seeds: Iterable[int] | None = None) -> dict[str, Any]:
        """Statistics over all decisions of some episodes (default: all), JSON-able; {} if nothing is known of any of them.

        Returns:
            ``layers`` L; ``decisions`` n; ``dense`` FLOPs of the stack without gates for one sample; ``nominal`` and
            ``executed`` FLOPs per decision (mean; router included): what the gates ask for, and what the executor computes for
            such a sample (everything with ``dense_mask``, else the same); ``fraction`` executed / dense; ``use`` [L] fraction
            of decisions in which a layer ran, wholly or in part; ``use_over_time`` [10][L] the same by tenth of the episode,
            None for a tenth without a decision; ``paths`` [[path, count], …] the 20 most frequent; ``distinct`` paths.
        """
        self._settle()
        wanted = self._episodes if seeds is None else [seed for seed in seeds if seed in self._episodes]
        episodes = [self._episodes[seed] for seed in wanted if self._episodes[seed].paths]
        if not episodes:
            return {}
        ran = [np.array([[letter != "0" for letter in path] for path in e.paths], dtype=float) for e in episodes]
        place = np.concatenate([np.arange(len(rows)) * BINS // len(rows) for rows in ran])
        use = np.concatenate(ran)
        counts = Counter(path for e in episodes for path in e.paths)
        costs = self.stack.costs(self.tokens, self.stack.branches)  # [L, S]
        dense = int(costs.sum())
        router = 0 if self.stack.router is None else self.stack.router.flops(self.tokens)
        price = {path: self._price(path, costs) + router for path in counts}
        nominal = sum(price[path] * count for path, count in counts.items()) / len(use)
        whole = {"dense_mask": dense + router}
        executed = sum(whole.get(e.executor, price[path]) for e in episodes for path in e.paths) / len(use)
        frequent = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST]
        return {
            "layers": self.stack.num_layers,
            "decisions": len(use),
            "dense": dense,
            "nominal": nominal,
            "executed": executed,
            "fraction": executed / dense,
            "use": use.mean(0).tolist(),
            "use_over_time": [use[place == b].mean(0).tolist() if (place == b).any() else None for b in range(BINS)],
            "paths": [[path, count] for path, count in frequent],
            "distinct": len(counts),
        }

    def _price(self, path: str, costs: Tensor) -> int:
        letters = _LETTERS[self.stack.branches]
        on = [[letters.index(letter) >> s & 1 for s in range(self.stack.branches)] for letter in path]
        return int((costs * costs.new_tensor(on)).sum())

    def _settle(self) -> None:
        """Brings what was recorded to the host."""
        letters = np.array(list(_LETTERS[self.stack.branches]))
        for seeds, decisions, active, executor in self._waiting:
            bits = 2 ** np.arange(self.stack.branches)
            codes = (active.cpu().numpy() * bits).sum(-1)  # [n, L]
            for seed, decision, row in zip(seeds, decisions, letters[codes]):
                if decision == 0 or seed not in self._episodes:
                    self._episodes[seed] = EpisodePaths([], executor)
                self._episodes[seed].paths.append("".join(row))
        self._waiting.clear()


def routed_stack(vla: Any) -> RoutedStack | None:
    """The routed layers of a VLA, also within a decoder of transformers; None of other policies and of dense ones."""
    layers = getattr(vla, "layers", None)
    layers = getattr(layers, "routed", layers)
    return layers if isinstance(layers, RoutedStack) else None


def _active(stack: RoutedStack, decided: Decision) -> Tensor:
    """What runs, bool [U, L, S] on the device: from the lists, or where there are none by the gates' threshold."""
    if decided.plan is not None:
        return (decided.plan.gate > 0).permute(2, 0, 1)
    return stack.active(decided.gates)
