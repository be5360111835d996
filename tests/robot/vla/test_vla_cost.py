"""What a routed VLA costs beside its teacher: FLOPs against torch's counter, and figures that hold together."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from vla_parts import make_vla, observation, routed_vla, split_decisions

from xdfast.ops._flops import missing_formulas
from xdfast.robot.vla import Observation
from xdfast.robot.vla.cost import count_vla, drawn_observations, measure_vla

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pair():
    teacher = make_vla(layers=4, tasks=("drawer-open", "drawer-close"), sentences=("Pull the drawer open",))
    student = routed_vla(teacher)
    split_decisions(student, drawn_observations(teacher, 6))
    return teacher, student


def test_flops_of_the_parts_add_up_to_what_torch_counts_and_the_paths_are_the_routers(pair) -> None:
    teacher, student = pair
    seen = Observation(*observation(teacher, rows=5))
    found = count_vla(teacher, student, seen)
    with FlopCounterMode(display=False, custom_mapping=missing_formulas()) as counter:
        teacher.act(seen.images[:1], seen.state[:1], seen.instruction[:1])
    assert found["decision"]["dense"] == counter.get_total_flops()
    assert found["stack"]["dense"] == student.layers.costs(teacher.num_tokens).sum()
    executed = 0
    for row in range(5):
        student.act(seen.images[row, None], seen.state[row, None], seen.instruction[row, None])
        executed += student.layers.flops(student.num_tokens).executed
    assert found["stack"]["executed"] == found["stack"]["nominal"] == executed / 5 < found["stack"]["dense"]
    assert found["router"] == student.layers.router.flops(student.num_tokens)
    around = found["encoder"] + found["embed"] + found["head"]
    assert found["decision"]["executed"] == around + found["stack"]["executed"]
    assert found["fraction"] == found["stack"]["executed"] / found["stack"]["dense"] < found["decision_fraction"] < 1


def test_a_head_that_denoises_counts_all_of_its_steps() -> None:
    pytest.importorskip("diffusers")
    teacher = make_vla(objective="diffusion")
    seen = drawn_observations(teacher, 1)
    found = count_vla(teacher, routed_vla(teacher), seen)
    with FlopCounterMode(display=False, custom_mapping=missing_formulas()) as counter:
        teacher.act(seen.images, seen.state, seen.instruction)
    assert found["decision"]["dense"] == counter.get_total_flops() and found["head"] > found["stack"]["dense"] / 10


def test_models_are_timed_in_turns_on_the_given_observations(pair) -> None:
    teacher, student = pair
    seen = Observation(*observation(teacher, rows=3))
    passes: dict[str, list[int]] = {"dense": [], "routed": []}
    handles = [
        model.layers.register_forward_hook(lambda _, given, made, name=name: passes[name].append(len(given[0])))
        for name, model in (("dense", teacher), ("routed", student))
    ]
    student.train()
    found = measure_vla(
        teacher, student, (1, 4), observations=seen, others={"again": teacher}, seconds=0.2, rounds=(5, 5)
    )
    for handle in handles:
        handle.remove()
    assert json.loads(json.dumps(found)) == found
    assert found["baseline"].startswith("the teacher as plain PyTorch, eager")
    assert found["observations"] == "3 given" and (found["tokens"], found["layers"]) == (student.num_tokens, 4)
    for entry, batch in zip(found["batches"], (1, 4)):
        assert (entry["batch"], entry["executor"], entry["rounds"]) == (batch, "cpu", 5) and entry["why"]
        for what in ("stack", "decision"):
            figures = entry[what]
            assert all(0 < figures[name]["p50"] <= figures[name]["p95"] for name in ("dense", "routed", "again"))
            assert figures["speedup"] == pytest.approx(figures["dense"]["p50"] / figures["routed"]["p50"])
            assert figures["speedup_low"] <= figures["speedup"] <= figures["speedup_high"]
        assert entry["stack"]["ideal"] == found["flops"]["stack"]["dense"] / found["flops"]["stack"]["nominal"]
    assert passes["routed"].count(4) > 5 and passes["dense"].count(1) > 5  # the last batch is filled up, too
    assert student.training and not teacher.training and student.layers.executor == "auto"


def test_observations_are_drawn_where_none_are_given(pair) -> None:
    teacher, student = pair
    drawn = drawn_observations(teacher, 3)
    assert drawn.images.shape == (3, 1, 1, 24, 24, 3) and len(drawn.instruction.unique(dim=0)) == 2
    assert torch.equal(drawn.images, drawn_observations(teacher, 3).images)
    assert drawn_observations(make_vla(), 2).instruction.shape == (2, 8)
    found = measure_vla(teacher, student, (2,), seconds=0.1, rounds=(5, 5))
    assert "64 drawn at random" in found["observations"]


def test_models_that_cannot_be_compared_are_told(pair) -> None:
    teacher, student = pair
    with pytest.raises(ValueError, match="the first VLA must be dense"):
        measure_vla(student, student)
    with pytest.raises(ValueError, match="the second VLA has no routed layers"):
        measure_vla(teacher, teacher)
    with pytest.raises(ValueError, match=r"batches must be positive whole numbers, got \(0,\)"):
        measure_vla(teacher, student, (0,))
    with pytest.raises(ValueError, match=r"cameras of routed is \('dp3',\), not \('a', 'b'\)"):
        measure_vla(make_vla(cameras=("a", "b")), student)
    none = Observation(*(x[:0] for x in observation(teacher, rows=1)))
    with pytest.raises(ValueError, match="at least one observation"):
        measure_vla(teacher, student, observations=none)
