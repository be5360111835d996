"""Layers of its own for each task: copies stand where they should, compute what static pruning does, and bad input is named."""

from __future__ import annotations

import pytest
import torch
from vla_parts import make_vla, observation

from xdfast.nn import block_influence, fixed_gates
from xdfast.robot.vla import Observation, derive_student, hidden_states, task_experts

pytestmark = pytest.mark.usefixtures("one_thread")


def student_of(layers: int, target: float, always_on=()):
    return derive_student(make_vla(layers=layers), target, always_on=always_on, router={"hidden": 8})


def weights(student, layer: int) -> torch.Tensor:
    return student.layers.get_submodule(str(layer)).attn.qkv.weight.detach().clone()


def test_every_task_starts_as_static_pruning_and_learns_alone() -> None:
    teacher = make_vla(layers=4)
    seen = Observation(*observation(teacher, 3))
    with torch.no_grad():
        states = hidden_states(teacher.layers, teacher.embed(seen))
    static = derive_student(teacher, 0.25, routing="static", always_on=(), states=states)
    student = derive_student(teacher, 0.25, always_on=(), router={"hidden": 8})
    paths = task_experts(student, 3, 0.25, block_influence(states))
    assert paths.dtype == torch.bool and paths.sum(1).tolist() == [1, 1, 1]
    assert paths.any(0).sum() == 3  # three tasks, three layers
    with torch.no_grad():
        wanted = static.actions(seen)
        for path in paths:
            with fixed_gates(student, path.float().expand(3, -1)):
                torch.testing.assert_close(student.actions(seen), wanted, rtol=1e-5, atol=1e-6)
    # what one task learns, the others do not
    with fixed_gates(student, paths[:1].float().expand(3, -1)):
        student.train()
        student.chunk_loss(
            student.layers(student.embed(seen)), torch.zeros(3, teacher.chunk, teacher.action_dim)
        ).backward()
    moved = [
        p.grad is not None and bool(p.grad.any())
        for p in (student.layers.get_submodule(str(i)).attn.qkv.weight for i in range(4))
    ]
    assert moved == paths[0].tolist()


@pytest.mark.parametrize(
    ("ranks", "target", "always_on", "tasks", "paths", "sources"),
    [
        # one layer is kept: a copy for each task
        ((9, 1, 2, 3), 0.25, (), 3, ["1000", "0100", "0010"], [0, 0, 0, 3]),
        # two are kept: the deeper one has as many copies as there are tasks, the other what room is left
        ((9, 8, 1, 2, 3, 4), 0.34, (), 4, ["101000", "100100", "010010", "010001"], [0, 0, 1, 1, 1, 1]),
        # the ends are always on and shared; the middle has copies
        ((1, 9, 2, 1, 1), 0.6, (0, -1), 3, ["11001", "10101", "10011"], [0, 1, 1, 1, 4]),
        # fewer copies than tasks: neighbours share
        ((9, 1), 0.5, (), 4, ["10", "10", "01", "01"], [0, 0]),
        # everything is kept: the teacher, for all
        ((1, 2, 3), 1.0, (), 2, ["111", "111"], [0, 1, 2]),
        # one task: static pruning
        ((1, 2, 9, 3), 0.5, (), 1, ["1100"], [2, 3, 2, 3]),
    ],
)
def test_places(ranks, target, always_on, tasks, paths, sources) -> None:
    student = student_of(len(ranks), target, always_on)
    before = [weights(student, i) for i in range(len(ranks))]
    found = task_experts(student, tasks, target, torch.tensor(ranks))
    for layer, source in enumerate(sources):
        assert torch.equal(weights(student, layer), before[source]), (layer, source)
    assert ["".join(str(int(on)) for on in path) for path in found] == paths


def test_bad_input() -> None:
    student = student_of(4, 0.5, (0, -1))
    ranks = torch.tensor([1.0, 2, 3, 4])
    with pytest.raises(ValueError, match="at least one task, got 0"):
        task_experts(student, 0, 0.75, ranks)
    with pytest.raises(ValueError, match=r"influence must be \[4\], one number per layer, got \[3\]"):
        task_experts(student, 2, 0.75, ranks[:3])
    with pytest.raises(ValueError, match="less than the 2 that are always on"):
        task_experts(student, 2, 0.25, ranks)
    with pytest.raises(ValueError, match="target"):
        task_experts(student, 2, 1.5, ranks)
    student = student_of(3, 0.34)
    student.layers.get_submodule("1").mlp.fc1 = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="layers 0 and 1 have weights of different shapes"):
        task_experts(student, 3, 0.34, torch.tensor([3.0, 1, 1]))
