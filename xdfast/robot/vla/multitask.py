"""Training samples of several tasks at once, each with its instruction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdfast.robot.vla.compact import CompactVLA
from xdfast.robot.vla.instructions import Tokenizer, instructions_of
from xdfast.robot.windows import WindowBatch, Windows

__all__ = ["MultiTaskLoader", "MultiTaskWindows", "VLABatch"]


class MultiTaskWindows:
    """:class:`xdfast.robot.windows.Windows` of one folder of demonstrations per task, and what they are told to do.

    Args:
        demos: opened demonstrations, one per task.
        cameras: which of their cameras.
        horizon: H.
        image_size: (height, width) pictures are brought to; default: their own, which must then be alike.
        tasks: names of the tasks; default: the demonstrations' own.
        sentences: task → instructions; default: :func:`xdfast.robot.vla.instructions_of` of the simulated task.
        scratch: folder for files that hold the pictures where memory is too small for them.

    Attributes:
        tasks: names.
        windows: samples of each.
        sentences: of each.
        starts: the number of each task's first sample; samples are numbered through.

    Raises:
        ValueError: no demonstrations, a task twice or without name or instruction, actions, states or pictures of different
            sizes, a camera that is missing.
    """

    def __init__(
        self,
        demos: Sequence[Any],
        cameras: Sequence[str],
        *,
        horizon: int,
        image_size: tuple[int, int] | None = None,
        tasks: Sequence[str] | None = None,
        sentences: Mapping[str, Sequence[str]] | None = None,
        scratch: Path | None = None,
    ) -> None:
        if not demos:
            raise ValueError("give demonstrations of at least one task")
        names = [d.task for d in demos] if tasks is None else list(tasks)
        if len(names) != len(demos):
            raise ValueError(f"{len(demos)} folders of demonstrations, but {len(names)} names of tasks")
        for folder, name in zip(demos, names):
            if not name:
                raise ValueError(f"the demonstrations in {folder.path} do not name their task; pass tasks=")
            if names.count(name) > 1:
                raise ValueError(f"two folders hold demonstrations of {name}; put them into one")
        self.tasks: tuple[str, ...] = tuple(names)
        self.sentences = tuple(self._told(name, sentences or {}) for name in names)
        for what in ("action_dim", "state_dim"):
            sizes = {getattr(d, what): d.path for d in demos}
            if len(sizes) > 1:
                told = ", ".join(f"{size} in {path}" for size, path in sizes.items())
                raise ValueError(f"one policy needs one {what}; there are {told}")
        self.windows = [
            Windows(d, cameras, n_obs=1, horizon=horizon, image_size=image_size, scratch=scratch) for d in demos
        ]
        sizes = {w.image_size: d.path for w, d in zip(self.windows, demos)}
        if len(sizes) > 1:
            told = ", ".join(f"{size} in {path}" for size, path in sizes.items())
            raise ValueError(f"pictures of different sizes, {told}; set image_size to bring them to one")
        self.image_size = self.windows[0].image_size
        self.starts = torch.tensor([0, *np.cumsum([len(w) for w in self.windows])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def tokenizer(self) -> Tokenizer:
        """One that knows the words of all sentences."""
        return Tokenizer.of(sentence for sentences in self.sentences for sentence in sentences)

    def fit(self, policy: CompactVLA) -> None:
        """Sets the policy's normalisation of states and actions, one for all tasks together."""
        for norm, name in ((policy.action_norm, "actions"), (policy.state_norm, "state")):
            low = torch.stack([getattr(w, name).amin(0) for w in self.windows]).amin(0)
            high = torch.stack([getattr(w, name).amax(0) for w in self.windows]).amax(0)
            norm.fit(low, high)

    @staticmethod
    def _told(task: str, given: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        if task in given:
            if isinstance(given[task], str) or not given[task]:
                raise ValueError(f"sentences[{task!r}] must be a list of instructions, got {given[task]!r}")
            return tuple(given[task])
        try:
            return instructions_of(task)
        except ValueError as error:
            raise ValueError(f"{error}; for a task of yours pass sentences={{{task!r}: [...]}}") from error


@dataclass
class VLABatch(WindowBatch):
    """B samples with their instructions.

    Attributes:
        instruction: int64 ``[B, T_text]``.
        task: int64 ``[B]``, which of the tasks.
    """

    instruction: Tensor
    task: Tensor


class MultiTaskLoader:
    """Batches in which all tasks are equally often, however many demonstrations each has; with the interface of
    :class:`xdfast.robot.windows.WindowLoader`.

    Rows of all processes and steps form one sequence; row p is of task p mod N. Each task's samples come from an endless
    sequence of passes of its own, each a shuffle. The sentence of a sample is drawn from (seed, step, sample). All is a
    function of (seed, step, rank): a run continues anywhere.

    Args:
        data: samples.
        tokenizer: of the policy.
        text_length: T_text of the policy.
        batch_size: B of each process.
        steps: in an epoch.
        seed: of shuffles and sentences.
        rank, world_size: this process among all.

    Raises:
        ValueError: a sentence the tokenizer cannot encode.
    """

    def __init__(
        self,
        data: MultiTaskWindows,
        tokenizer: Tokenizer,
        text_length: int,
        batch_size: int,
        steps: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.data, self.batch_size, self.batches_per_epoch = data, batch_size, steps
        self.bad: dict[str, str] = {}
        self._seed, self._rank, self._world = seed, rank, world_size
        self._encoded = [tokenizer.encode_all(sentences, text_length) for sentences in data.sentences]
        self._passes: dict[int, tuple[int, np.ndarray]] = {}

    def rows(self, index: int) -> int:
        """Samples of a step, all processes together."""
        return self.batch_size * self._world

    def epoch(self, epoch: int, start: int = 0) -> Iterator[VLABatch]:
        """Batches ``start``, ``start + 1``, … of an epoch."""
        for index in range(start, self.batches_per_epoch):
            yield self.batch(epoch * self.batches_per_epoch + index)

    def batch(self, step: int) -> VLABatch:
        """The batch of a step, counted from the start of the run."""
        tasks, local, _ = self._drawn(step)
        numbers = (local + self.data.starts[tasks]).tolist()
        told = [self._sentence(step, task, number) for task, number in zip(tasks.tolist(), numbers)]
        return VLABatch(*self._gathered(tasks, local), torch.stack(told), tasks)

    def _drawn(self, step: int, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(task, sample within it, pass over the task's samples) of each row of a process, int64 ``[B]``."""
        first = (step * self._world + (self._rank if rank is None else rank)) * self.batch_size
        rows = range(first, first + self.batch_size)
        places = [self._place(row) for row in rows]
        tasks = torch.tensor([row % len(self.data.tasks) for row in rows])
        return tasks, torch.tensor([sample for sample, _ in places]), torch.tensor([number for _, number in places])

    def _gathered(self, tasks: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(ids, images, state, actions) of samples, given by task and number within it."""
        parts = []
        for task, windows in enumerate(self.data.windows):
            rows = local[tasks == task]
            actions = windows.actions[windows.predicted(rows)]
            parts.append((windows.images[rows][:, :, None], windows.state[rows][:, None], actions))
        order = tasks.argsort(stable=True).argsort()  # from one task after the other to rows
        images, state, actions = (torch.cat(part)[order] for part in zip(*parts))
        return local + self.data.starts[tasks], images, state, actions

    def _place(self, row: int) -> tuple[int, int]:
        """(sample, pass over the samples) of a row; the sample is counted from the start of its task."""
        position, task = divmod(row, len(self.data.tasks))
        count = len(self.data.windows[task])
        number, offset = divmod(position, count)
        if task not in self._passes or self._passes[task][0] != number:
            self._passes[task] = number, np.random.default_rng((self._seed, 0, task, number)).permutation(count)
        return int(self._passes[task][1][offset]), number

    def _sentence(self, step: int, task: int, number: int) -> Tensor:
        ways = self._encoded[task]
        return ways[int(np.random.default_rng((self._seed, 1, step, number)).integers(len(ways)))]
