"""Cost and paths of a decoder of transformers: its layers lie inside another module, and may be called token by token."""

from __future__ import annotations

import pytest
import torch

from xdfast.robot.runner import fixed_size
from xdfast.robot.vla.cost import count_vla, drawn_observations
from xdfast.robot.vla.paths import PathRecorder

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("xdfast.robot.vla.hf")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("head", ["regression", "bins"])
def test_cost_and_paths(head) -> None:
    backbone = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    teacher = hf.HuggingFaceVLA.from_config(
        backbone, "test_vit", sentences=["Pull the drawer open"], head=head, horizon=2, n_action=2, action_dim=4, state_dim=9,
        cameras=("dp3",), image_size=(48, 48), vision_size=32, tasks=("drawer-open",),
    ).eval()  # fmt: skip
    student = teacher.route(0.8)
    with torch.no_grad():
        student.layers.routed.router.head.bias.copy_(torch.tensor([9.0, -9.0, 9.0, 9.0]))
    seen = drawn_observations(teacher, 2)
    found = count_vla(teacher, student, seen)
    assert found["stack"]["dense"] == student.layers.routed.costs(teacher.num_tokens).sum()
    assert found["fraction"] == pytest.approx(0.75 + found["router"] / found["stack"]["dense"])
    policy = student.for_task("drawer-open")
    recorder = PathRecorder.of(policy)
    policy.act(seen.images, seen.state)
    recorder([4, 5], [0, 0])
    summary = recorder.summary()
    assert summary["paths"] == [["1011", 2]] and summary["fraction"] == pytest.approx(found["fraction"])
    with fixed_size(student, 1, torch.device("cuda")):  # its layers are given masks and a cache
        assert student.layers.routed.executor == "auto"
