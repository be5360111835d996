"""Which layers a task needs most: paths for a router to start from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xdfast.nn import StaticRouter, routed_stacks
from xdfast.ops._costs import check_target

__all__ = ["task_paths"]


@torch.no_grad()
def task_paths(
    student: Any,
    tasks: Sequence[Sequence[tuple[Tensor, Tensor]]],
    target_flops: float,
) -> Tensor:
    """For each task the layers to keep, by leaving out one after the other: always the one whose loss is least missed.

    A student is as good as its teacher only where the layers that are left carry the task. Which these are differs between tasks,
    and the block influence, a mean over all of them, does not know it. With S samples a task costs S · L² / 2 passes at most.

    Args:
        student: routed (:func:`xdfast.robot.vla.derive_student`), with its teacher's weights; left as it is.
        tasks: of each task, batches of (tokens that enter layer 0 ``[B, T, D]``, demonstrated chunks ``[B, H, A]``).
        target_flops: r*; at most r* · L layers of each task stay, among them those that the student never skips.

    Returns:
        [tasks, L] bool.

    Raises:
        ValueError: a target outside (0, 1] or below the share of the layers that are always on; a task without samples.
    """
    stack: Any = routed_stacks(student)[0]
    layers, given, modes = stack.router.num_layers, stack.router, (student.training, stack.training)
    fixed = set(stack.always_on)
    room = math.floor(check_target(target_flops) * layers + 1e-9)
    if room < max(len(fixed), 1):
        raise ValueError(f"target_flops={target_flops:g} of {layers} layers leaves {room}; {len(fixed)} are always on")
    if not tasks or not all(tasks):
        raise ValueError("every task needs samples to choose its layers by")
    student.eval()

    def loss(batches: Sequence[tuple[Tensor, Tensor]], kept: Sequence[int]) -> float:
        stack.router = StaticRouter(given.dim, layers, kept).to(batches[0][0].device)
        total = 0.0
        for tokens, actions in batches:
            torch.manual_seed(0)  # a head that draws noise draws the same for every path
            total += float(student.chunk_loss(student.layers(tokens), actions)) * len(tokens)
        return total

    paths = torch.zeros(len(tasks), layers, dtype=torch.bool)
    try:
        with torch.random.fork_rng():
            for number, batches in enumerate(tasks):
                kept = list(range(layers))
                while len(kept) > room:
                    tried = {i: loss(batches, [k for k in kept if k != i]) for i in kept if i not in fixed}
                    kept.remove(min(tried, key=tried.__getitem__))
                paths[number, kept] = True
    finally:
        stack.router = given
        student.train(modes[0])
        stack.train(modes[1])
    return paths
