"""Layers of its own for every task: copies of those that matter most, where nobody would use the others."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.nn import most_influential, routed_stacks

__all__ = ["task_experts"]


@torch.no_grad()
def task_experts(student: Any, tasks: int, target_flops: float, influence: Tensor) -> Tensor:
    r"""Turns a routed student into static pruning of which every task has a copy.

    Static pruning keeps the r* · L layers of the greatest influence, for every input; the others are lost. Here their places take
    copies of the layers kept, and each task's path leads over its own ones: every task starts with exactly what static pruning
    computes, at the same FLOPs, and with the parameters of the whole teacher to learn on. What two tasks need no longer has to
    fit into the same weights.

    The deepest kept layer is copied first, up to once for each task, then the one before it; where there are fewer copies than
    tasks, neighbours share one. They stand in the order of the layers they are copies of, as early as possible: heads on the states
    of all layers (:class:`xdfast.losses.ActDistillLoss`) learn nothing before a task's first layer. Layers that are always on are
    shared by all and stay where they are.

    Args:
        student: routed (:func:`xdfast.robot.vla.derive_student`), with its teacher's weights; its layers' weights are overwritten.
        tasks: T ≥ 1.
        target_flops: r*; ⌊r* · L⌋ layers of each path.
        influence: [L] of the teacher's layers, :func:`xdfast.nn.block_influence`.

    Returns:
        [T, L] bool, the path of each task, for a router to tell apart (:meth:`xdfast.nn.LayerRouter.fit`).

    Raises:
        ValueError: no tasks, an influence of another shape, layers of different sizes; a target outside (0, 1] or below the
            share of the layers that are always on.

    Reference:
        "Sparse Upcycling" (Komatsuzaki et al., arXiv 2212.05055) makes experts of an MLP by copying it; here of whole layers,
        chosen once for each decision.
    """
    stack: Any = routed_stacks(student)[0]
    if tasks < 1:
        raise ValueError(f"task_experts needs at least one task, got {tasks}")
    if influence.shape != (stack.num_layers,):
        raise ValueError(f"influence must be [{stack.num_layers}], one number per layer, got {list(influence.shape)}")
    kept = most_influential(influence, target_flops, stack.always_on)
    modules: list[nn.Module] = [stack.get_submodule(str(number)) for number in range(stack.num_layers)]
    placed = _places(kept, stack.always_on, stack.num_layers, tasks)
    for layer, slots in placed.items():
        for slot in slots:
            if _shapes(modules[slot]) != _shapes(modules[layer]):
                raise ValueError(
                    f"layers {layer} and {slot} have weights of different shapes: a copy of one cannot stand in the other's place"
                )
    weights = {layer: {k: v.clone() for k, v in modules[layer].state_dict().items()} for layer in placed}
    paths = torch.zeros(tasks, stack.num_layers, dtype=torch.bool)
    paths[:, list(stack.always_on)] = True
    for layer, slots in placed.items():
        for slot in slots:
            modules[slot].load_state_dict(weights[layer])
        for task in range(tasks):
            paths[task, slots[task * len(slots) // tasks]] = True
    stack.refold()
    return paths


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def _places(kept: tuple[int, ...], always_on: tuple[int, ...], layers: int, tasks: int) -> dict[int, list[int]]:
    """Kept layer → where its copies stand, in ascending order; between two layers that are always on, as before."""
    placed: dict[int, list[int]] = {}
    edges = [-1, *always_on, layers]
    for first, last in pairwise(edges):
        chosen = [layer for layer in kept if first < layer < last]
        counts, room = [0] * len(chosen), last - first - 1
        for number in range(len(chosen) - 1, -1, -1):  # deepest first
            counts[number] = min(tasks, room - number)
            room -= counts[number]
        slot = (
            first + 1
        )  # as early as possible: what follows a copy says what it says, what precedes it knows nothing yet
        for layer, count in zip(chosen, counts):
            placed[layer] = list(range(slot, slot + count))
            slot += count
    return placed
