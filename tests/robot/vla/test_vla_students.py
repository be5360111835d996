"""Students of a VLA: the teacher's weights and a router, three ways to choose layers, saved and found again."""

from __future__ import annotations

import json

import pytest
import torch
from vla_parts import make_vla, observation, split_decisions

from xdfast.models.checkpoint import CheckpointError
from xdfast.nn import LayerRouter, fixed_gates
from xdfast.robot.vla import Observation, derive_student, hidden_states, load_vla, save_vla
from xdfast.robot.vla.students import ROUTINGS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def vla():
    return make_vla(layers=4)


def student_of(vla, **options):
    with torch.no_grad():
        states = hidden_states(vla.layers, vla.embed(Observation(*observation(vla, 4))))
    return derive_student(vla, 0.5, states=states, **{"router": {"hidden": 8}, **options})


def test_a_student_starts_as_its_teacher(vla) -> None:
    seen = Observation(*observation(vla))
    before = {name: value.clone() for name, value in vla.state_dict().items()}
    student = student_of(vla)
    with torch.no_grad():
        assert torch.allclose(student.actions(seen), vla.actions(seen), atol=1e-5)  # everything is on at first
        assert bool((student.layers.decision.gates == 1).all())
        with fixed_gates(student, torch.ones(3, 4)):
            assert torch.allclose(student.actions(seen), vla.actions(seen), atol=1e-5)
    student.queries.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in vla.state_dict().items())  # a copy
    # one linear map for the logits of all layers (trap 4), told where the modalities are
    assert student.layers.router.head.out_features == 4
    assert [(g.start, g.stop) for g in student.layers.router.groups] == list(vla.groups.values())


@pytest.mark.parametrize("routing", ROUTINGS)
def test_students_are_saved_with_their_router(vla, routing, tmp_path) -> None:
    student = student_of(vla, routing=routing).eval()
    seen = Observation(*observation(vla, 6))
    if routing == "learned":
        split_decisions(student, seen)
        student.layers.gate.set(threshold=0.4)
    save_vla(student, tmp_path / "vla")
    again = load_vla(tmp_path)
    assert type(again.layers.router) is type(student.layers.router)
    with torch.no_grad():
        assert torch.equal(again.actions(seen), student.actions(seen))
    gates = again.layers.decision.gates
    assert torch.equal(gates, student.layers.decision.gates) and again.xdfast_route.target_flops == 0.5
    if routing != "learned":
        assert gates.sum((1, 2)).tolist() == [2] * 6
    assert again.for_task("drawer-open").vla is again


def test_adapters_are_frozen_weights_and_a_router(vla) -> None:
    student = student_of(vla, lora=4)
    seen = Observation(*observation(vla))
    with torch.no_grad():
        assert torch.allclose(student.actions(seen), vla.actions(seen), atol=1e-5)
    names = {name for name, p in student.layers.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1] for name in names if not name.startswith("router")} == {"lora_a", "lora_b"}


def test_bad_input(vla, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"routing must be one of.*got 'lerned'"):
        derive_student(vla, 0.5, routing="lerned")
    with pytest.raises(ValueError, match="pass states="):
        derive_student(vla, 0.5, routing="static")
    with pytest.raises(ValueError, match="cannot be reached"):
        derive_student(vla, 0.3)
    student = student_of(vla)
    with pytest.raises(ValueError, match="routed already"):
        derive_student(student, 0.5)

    class Mine(LayerRouter):
        pass

    student.layers.router.__class__ = Mine
    with pytest.raises(ValueError, match="a Mine cannot be saved"):
        save_vla(student, tmp_path / "mine")
    save_vla(student_of(vla), tmp_path / "vla")
    file = tmp_path / "vla" / "vla.json"
    facts = json.loads(file.read_text())
    facts["route"]["router"]["hidden"] = "wide"
    file.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"vla\.json is damaged \(route"):
        load_vla(tmp_path)
