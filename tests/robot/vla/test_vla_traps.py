"""The traps seen in ActDistill's public code (METHODS.md, section 3), on a whole student.

Traps 3, 5, 6 and 7 are tested where their parts are: tests/ops/test_graph.py, tests/nn/test_graph_encapsulation.py,
tests/losses/test_actdistill.py, tests/pipeline/test_pipeline_actdistill.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from vla_parts import make_vla, observation, split_decisions

from xdfast.models import budget_loss
from xdfast.nn import fixed_gates
from xdfast.nn.actdistill_compat import actdistill_inference, actdistill_training
from xdfast.robot.vla import Observation, derive_student, hidden_states

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def student():
    vla = derive_student(make_vla(layers=6), 0.6, router={"hidden": 8})
    with torch.no_grad():
        for name, parameter in vla.layers.named_parameters():
            if parameter.dim() == 2 and "router" not in name:
                parameter.mul_(2)  # far from the identity, as trained layers are
        vla.layers.router.head.weight.normal_()
    return vla.eval()


def test_trap_1_training_and_inference_are_one_function(student) -> None:
    seen = Observation(*observation(student, 6))
    split_decisions(student, seen)
    with torch.no_grad():
        inference = student.layers(student.embed(seen))
    decided = student.layers.decision
    assert decided.executor == "cpu" and 0 < float(decided.gates.mean()) < 1
    student.layers.train()
    training = student.layers(student.embed(seen))
    assert student.layers.decision.executor == "dense_mask" and training.requires_grad
    assert torch.allclose(training, inference, rtol=1e-4, atol=1e-4)
    # as published: two functions, even where the gates are as sure as can be
    layers, x = [student.layers[i] for i in range(6)], student.embed(seen).detach()
    gates = decided.gates[:, :, 0] * 0.98 + 0.01
    theirs = [student.norm(f(layers, x, gates)) for f in (actdistill_training, actdistill_inference)]
    assert F.cosine_similarity(theirs[0].flatten(1), theirs[1].flatten(1)).mean() < 0.9


def test_trap_2_all_layers_on_costs_and_pulls_towards_the_budget(student) -> None:
    seen = Observation(*observation(student))
    student.layers.train()
    with torch.no_grad():
        student.layers.router.head.bias.fill_(9.0)
        student.layers.router.head.weight.mul_(0.01)
    student.actions(seen)
    assert bool((student.layers.decision.gates == 1).all())
    loss = budget_loss(student)(student.layers.decision.gates)
    assert float(loss.detach()) == pytest.approx(0.4**2)
    loss.backward()
    pull = student.layers.router.head.bias.grad
    assert bool((pull[1:-1] > 0).all()) and pull[0] == pull[-1] == 0  # less of every layer that is not always on


def test_trap_4_one_map_decides_and_nothing_is_stored_by_reference(student) -> None:
    seen = Observation(*observation(student, 6))
    split_decisions(student, seen)
    linears = [m for m in student.layers.router.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == len(student.groups) + 1  # one projection per modality, one map for all layers
    with torch.no_grad():
        tokens = student.embed(seen)
        before = tokens.clone()
        states = hidden_states(student.layers, tokens)
        gates = student.layers.decision.gates
        assert student.layers.decision.executor == "cpu" and torch.equal(tokens, before)
        x = tokens
        for number, state in enumerate(states[1:]):  # what was stored is not overwritten by layers after it
            x = torch.where(gates[:, number, :, None] > 0.5, student.layers[number](x), x)
            assert torch.allclose(state, x, rtol=1e-4, atol=1e-4), number
        # partly active batches: each sample as if it were alone
        for row in range(6):
            with fixed_gates(student, gates[row : row + 1]):
                assert torch.allclose(
                    student.layers(tokens[row : row + 1]), states[-1][row : row + 1], rtol=1e-4, atol=1e-4
                )


@pytest.mark.parametrize("options", [{}, {"cameras": ("dp3", "corner")}, {"text_length": 5}])
def test_trap_4_where_pictures_and_words_are_follows_from_the_sizes(options) -> None:
    vla = make_vla(**options)
    cells = len(vla.spec.cameras) * vla.encoder.tokens
    assert vla.groups == {"vision": (0, cells), "language": (cells, cells + vla.spec.text_length)}
    student = derive_student(vla, 0.7, always_on=(0,), router={"hidden": 8})
    assert [(g.start, g.stop) for g in student.layers.router.groups] == list(vla.groups.values())
    seen = Observation(*observation(vla, 2))
    tokens = student.embed(seen)
    moved = tokens.detach().clone()
    moved[:, cells + vla.spec.text_length :] += 1  # state and queries: of no modality
    router = student.layers.router
    assert torch.equal(router(tokens), router(moved))
    moved[:, 0] += 1
    assert not torch.equal(router(tokens), router(moved))
