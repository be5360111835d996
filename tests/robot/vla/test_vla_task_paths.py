"""Paths by task: the layers that a task needs are found, and bad input is named."""

from __future__ import annotations

import pytest
import torch
from vla_parts import make_vla, observation

from xdfast.nn import fixed_gates, routed_stacks
from xdfast.robot.vla import Observation, derive_student, task_paths

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def student():
    return derive_student(make_vla(layers=4), 0.5, always_on=(), router={"hidden": 8})


@torch.no_grad()
def samples(student, needed, count=6):
    """Tokens, and the chunks that the given layers alone predict: what a task that needs just them looks like."""
    seen = Observation(*observation(student, count))
    tokens = student.embed(seen)
    gates = torch.zeros(count, 4)
    gates[:, list(needed)] = 1
    with fixed_gates(student, gates):
        chunk = student.decode(student.layers(tokens))
    return tokens, student.action_norm.inverse(chunk)


@torch.no_grad()
def loss_of(student, samples_, kept) -> float:
    gates = torch.zeros(len(samples_[0]), 4)
    gates[:, list(kept)] = 1
    with fixed_gates(student, gates):
        return float(student.chunk_loss(student.layers(samples_[0]), samples_[1]))


def test_each_task_keeps_the_layers_it_needs(student) -> None:
    with torch.no_grad():
        for p in student.layers.parameters():  # far from the identity, so that a layer that is missing is missed
            p.mul_(1.5)
    router, mode = student.layers.router, student.training
    # one layer too many: it is the one that is left out
    tasks = [[samples(student, needed)] for needed in ((0, 1, 2), (1, 2, 3), (0, 2, 3), (0, 1, 3))]
    paths = task_paths(student, tasks, 0.75)
    assert paths.dtype == torch.bool
    assert [tuple(row.nonzero().flatten().tolist()) for row in paths] == [(0, 1, 2), (1, 2, 3), (0, 2, 3), (0, 1, 3)]
    # two: one after the other, each time the one whose loss is smallest; in batches as in one
    parted = [[(t[:2], a[:2]), (t[2:], a[2:])] for ((t, a),) in tasks]
    for (batch,), path in zip(tasks, task_paths(student, parted, 0.5)):
        kept = {0, 1, 2, 3}
        while len(kept) > 2:
            kept.remove(min(kept, key=lambda i, kept=kept: loss_of(student, batch, kept - {i})))
        assert set(path.nonzero().flatten().tolist()) == kept
    assert routed_stacks(student)[0].router is router and student.training == mode
    assert task_paths(student, tasks, 1.0).all()


def test_bad_input(student) -> None:
    tasks = [[samples(student, (0, 1))]]
    ends = derive_student(make_vla(layers=4), 0.5, router={"hidden": 8})
    assert task_paths(ends, tasks, 0.5).tolist() == [[True, False, False, True]]
    with pytest.raises(ValueError, match="leaves 1; 2 are always on"):
        task_paths(ends, tasks, 0.3)
    with pytest.raises(ValueError, match="needs samples"):
        task_paths(student, [*tasks, []], 0.5)
    with pytest.raises(ValueError, match="target"):
        task_paths(student, tasks, 1.5)
