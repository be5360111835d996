"""What is exported: names and shapes, normalisation, parts of a policy, routed layers; all in eager PyTorch."""

from __future__ import annotations

import pytest
import torch
from policy_parts import make_policy
from torch import nn
from vla_parts import make_vla, observation, routed_vla, split_decisions

from xdfast.deploy import image_graph, policy_graphs, vla_graph
from xdfast.models import create_model
from xdfast.robot.vla import Observation

pytestmark = pytest.mark.usefixtures("one_thread")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def student():
    return create_model("test_resnet", num_classes=5, image_size=32).eval()


@torch.no_grad()
@pytest.mark.parametrize("pixels", ["unit", "uint8", "normalised"])
def test_an_image_graph_is_the_model_on_any_kind_of_pixels(student, pixels) -> None:
    graph = image_graph(student, pixels=pixels, classes=["a", "b", "c", "d", "e"])
    (given,) = graph.example(3, generator())
    assert given.shape == graph.inputs[0].sized(3) == (3, 3, 32, 32)
    assert str(given.dtype) == f"torch.{graph.inputs[0].dtype}"
    raw = image_graph(student, pixels="uint8").example(3, generator())[0]  # the same pictures
    expected = student(raw)
    features, logits = graph.run_eager((given,))
    torch.testing.assert_close(features, expected.features)
    torch.testing.assert_close(logits, expected.logits)
    facts = graph.facts["preprocessing"]
    assert facts["mean"] == list(student.mean) and facts["std"] == list(student.std)
    assert facts["input_size"] == [3, 32, 32] and facts["pixels"] == pixels
    assert ("stated" in facts["normalisation"]) is (pixels == "normalised")
    assert graph.facts["classes"] == ["a", "b", "c", "d", "e"]
    assert [port.shape for port in graph.outputs] == [("batch", student.num_features), ("batch", 5)]


def test_the_model_itself_is_left_alone(student) -> None:
    before = {name: value.clone() for name, value in student.state_dict().items()}
    student.train()
    graph = image_graph(student, pixels="normalised")
    assert student.training and not graph.module.training
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in graph.module.parameters())
    assert torch.equal(student._mean.flatten(), torch.tensor(student.mean))
    with torch.no_grad():
        for parameter in graph.module.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    student.eval()


def test_outputs_can_be_chosen_and_an_encoder_has_features_alone(student) -> None:
    assert [port.name for port in image_graph(student, outputs=["logits"]).outputs] == ["logits"]
    encoder = create_model("test_resnet", num_classes=0, image_size=32)
    assert [port.name for port in image_graph(encoder).outputs] == ["features"]
    with pytest.raises(ValueError, match="has no classifier, so no logits"):
        image_graph(encoder, outputs=["logits"])
    with pytest.raises(ValueError, match="got 'logit'. Did you mean 'logits'"):
        image_graph(student, outputs=["logit"])
    with pytest.raises(ValueError, match="pixels must be one of unit, uint8, normalised, got 'int8'"):
        image_graph(student, pixels="int8")


def test_a_half_precision_model_is_exported_in_float32() -> None:
    half = create_model(
        "test_resnet", num_classes=5, image_size=32, pretrained=False, dtype=torch.bfloat16, frozen=True
    )
    graph = image_graph(half)
    assert {p.dtype for p in graph.module.parameters()} == {torch.float32}
    assert next(half.net.parameters()).dtype == torch.bfloat16


def test_a_module_of_yours(student) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    graph = image_graph(create_model(Mine(), image_size=16))
    features, logits = graph.run_eager(graph.example(2, generator()))
    assert features.shape == (2, 4) and logits.shape == (2, 2)


@torch.no_grad()
@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_a_policy_graph_is_one_decision(scheduler) -> None:
    policy = make_policy(scheduler=scheduler, n_obs=2)
    policy.action_norm.fit(torch.full((4,), -3.0), torch.full((4,), 5.0))
    (graph,) = policy_graphs(policy)
    images, state, noise = graph.example(3, generator())
    expected = policy.act(images, state, noise=noise)
    (found,) = graph.run_eager((images, state, noise))
    assert torch.equal(found, expected)
    assert found.shape == graph.outputs[0].sized(3)
    assert [port.name for port in graph.inputs] == ["images", "state", "noise"]
    assert graph.facts["noise"]["shape"][0] == (5 if scheduler == "ddpm" else 1)


@torch.no_grad()
@pytest.mark.parametrize(("scheduler", "prediction"), [("ddim", "sample"), ("ddpm", "epsilon")])
def test_the_parts_of_a_policy_are_the_whole(scheduler, prediction) -> None:
    policy = make_policy(scheduler=scheduler, prediction=prediction)
    policy.action_norm.fit(torch.full((4,), -3.0), torch.full((4,), 5.0))
    encode, step = policy_graphs(policy, parts=True)
    images, state = encode.example(3, generator())
    noise = policy.noise(3, generator(1))
    (film,) = encode.run_eager((images, state))
    x = noise[0]
    for index in range(4):
        added = (noise[1 + index],) if scheduler == "ddpm" else ()
        (x,) = step.run_eager((x, film, torch.tensor([index]), *added))
    facts = encode.facts["actions"]
    first, last = facts["rows"]
    actions = (x[:, first:last] - torch.tensor(facts["offset"])) / torch.tensor(facts["scale"])
    # sums of one step's embedding come in another order, and a step divides by √ᾱ or √(1 − ᾱ): measured 8e-6 of values up to 5
    torch.testing.assert_close(actions, policy.act(images, state, noise=noise), rtol=0, atol=1e-4)
    assert [len(graph.inputs) for graph in (encode, step)] == [2, 4 if scheduler == "ddpm" else 3]


@torch.no_grad()
def test_a_policy_without_cameras() -> None:
    policy = make_policy(cameras=())
    (graph,) = policy_graphs(policy)
    state, noise = graph.example(2, generator())
    assert torch.equal(graph.run_eager((state, noise))[0], policy.act(None, state, noise=noise))
    assert [len(part.inputs) for part in policy_graphs(policy, parts=True)] == [1, 3]


@torch.no_grad()
@pytest.mark.parametrize("objective", ["l1", "diffusion"])
def test_a_vla_graph_is_one_decision(objective) -> None:
    vla = make_vla(objective=objective)
    graph = vla_graph(vla)
    given = graph.example(3, generator())
    images, state, told = given[:3]
    noise = given[3] if objective == "diffusion" else None
    assert torch.equal(graph.run_eager(given)[0], vla.act(images, state, told, noise))
    assert graph.facts["instruction"]["vocabulary"] == list(vla.spec.vocabulary)
    assert len(graph.inputs) == len(given) == (4 if objective == "diffusion" else 3)


@torch.no_grad()
def test_routed_layers_without_conditions_give_what_the_lists_give() -> None:
    vla = routed_vla(make_vla(layers=3))
    seen = observation(vla, 6)
    split_decisions(vla, Observation(*seen))
    graph = vla_graph(vla, skip=False)
    assert graph.free_batch and "all layers are computed" in graph.facts["routing"]
    expected = graph.run_eager(seen)[0]
    assert graph.eager.vla.layers.decision.executor == "cpu"
    gates = graph.eager.vla.layers.decision.gates
    assert 0 < float(gates.mean()) < 1  # some layers run, some do not
    torch.testing.assert_close(graph.module(*seen)[0], expected, rtol=1e-5, atol=1e-5)
    assert graph.module.vla.layers.decision.executor == "dense_mask"
    assert vla.layers.executor == "auto"


@torch.no_grad()
def test_soft_gates_below_the_threshold_are_left_out_too() -> None:
    vla = routed_vla(make_vla(layers=3), gate="soft")
    seen = observation(vla, 6)
    split_decisions(vla, Observation(*seen))
    graph = vla_graph(vla, skip=False)
    expected = graph.run_eager(seen)[0]
    torch.testing.assert_close(graph.module(*seen)[0], expected, rtol=1e-5, atol=1e-5)


def test_routed_layers_with_conditions_take_one_sample() -> None:
    graph = vla_graph(routed_vla(make_vla(layers=3)))
    assert not graph.free_batch
    assert [port.shape[0] for port in graph.inputs] == [1, 1, 1]
    assert "not computed" in graph.facts["routing"]


def test_a_policy_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="only a CompactVLA can be exported, got Linear"):
        vla_graph(nn.Linear(2, 2))
