"""Samples of several tasks: one normalisation, every task as often, instructions; and a VLA that listens to them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from vla_parts import SIZE, TASKS, make_vla, two_tasks, write_task

from xdfast.robot.vla import MultiTaskLoader, MultiTaskWindows, Tokenizer, instructions_of

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = {TASKS[0]: ["Open it"], TASKS[1]: ["Close it"]}


def test_batches_hold_every_task_as_often_and_every_sample_once_a_pass(tmp_path) -> None:
    data = two_tasks(tmp_path)
    tokenizer = data.tokenizer()
    assert [len(w) for w in data.windows] == [12, 21] and len(data) == 33 and data.tasks == TASKS
    loader = MultiTaskLoader(data, tokenizer, 10, 6, 7, seed=3)
    batches = list(loader.epoch(0))
    assert all(Counter(b.task.tolist()) == {0: 3, 1: 3} for b in batches)
    ids = [torch.cat([b.ids[b.task == task] for b in batches]).tolist() for task in (0, 1)]
    assert sorted(ids[0][:12]) == list(range(12)) and ids[0][12:] != ids[0][:9]
    assert sorted(ids[1]) == list(range(12, 33))
    batch = batches[0]
    assert batch.images.shape == (6, 1, 1, SIZE, SIZE, 3) and batch.images.dtype == torch.uint8
    assert batch.state.shape == (6, 1, 9) and batch.actions.shape == (6, 8, 4) and batch.instruction.shape == (6, 10)
    for b in batches:  # everything of a row is of the same sample, and the sentence of its task
        for row in range(len(b)):
            windows, local = data.windows[int(b.task[row])], b.ids[row] - data.starts[b.task[row]]
            assert torch.equal(b.images[row, :, 0], windows.images[local])
            assert torch.equal(b.state[row, 0], windows.state[local])
            assert torch.equal(b.actions[row], windows.actions[windows.predicted(local[None])[0]])
            known = [tokenizer.encode(text, 10).tolist() for text in instructions_of(TASKS[b.task[row]])]
            assert b.instruction[row].tolist() in known


def test_the_order_is_a_function_of_the_seed_and_continues_anywhere(tmp_path) -> None:
    data = two_tasks(tmp_path)

    def loader(seed=3, size=6, **ranks) -> MultiTaskLoader:
        return MultiTaskLoader(data, data.tokenizer(), 10, size, 4, seed=seed, **ranks)

    def facts(batches):
        return [(b.ids.tolist(), b.instruction.tolist()) for b in batches]

    assert facts(loader().epoch(1))[2:] == facts(loader().epoch(1, start=2)) and loader().rows(0) == 6
    assert facts(loader().epoch(0)) != facts(loader(seed=4).epoch(0))
    halves = [loader(size=3, rank=r, world_size=2).batch(5) for r in (0, 1)]
    assert facts([loader().batch(5)])[0] == tuple(a + b for a, b in zip(*facts(halves)))
    assert halves[0].task.tolist() == [0, 1, 0] and halves[1].task.tolist() == [1, 0, 1]
    told = torch.cat([b.instruction for b in loader().epoch(0)])
    assert len(told.unique(dim=0)) > 4  # several sentences a task


def test_one_normalisation_for_all_tasks(tmp_path) -> None:
    data = two_tasks(tmp_path)
    vla = make_vla(horizon=8)
    data.fit(vla)
    actions = torch.cat([w.actions for w in data.windows])
    assert vla.action_norm(actions).amin() == -1 and vla.action_norm(actions).amax() == 1
    torch.testing.assert_close(vla.action_norm(data.windows[0].actions[0]), torch.tensor([1.0, -1, 1, -1]))
    states = vla.state_norm(torch.cat([w.state for w in data.windows]))
    torch.testing.assert_close(states.amin(0), -torch.ones(9))


def test_data_that_does_not_go_together_is_refused(tmp_path) -> None:
    def opened(name, task=TASKS[0], **sizes):
        return write_task(tmp_path / name, task, 0.5, **sizes)

    first, wide = opened("a"), opened("b", TASKS[1], action_dim=5)
    unnamed, mine = opened("c", None), opened("d", "my-robot/wave")
    with pytest.raises(ValueError, match=r"one policy needs one action_dim; there are 4 in .*a, 5 in .*b"):
        MultiTaskWindows([first, wide], ("dp3",), horizon=8)
    with pytest.raises(ValueError, match=r"two folders hold demonstrations of metaworld/drawer-open-v3"):
        MultiTaskWindows([first, first], ("dp3",), horizon=8)
    with pytest.raises(ValueError, match=r"c do not name their task; pass tasks="):
        MultiTaskWindows([unnamed], ("dp3",), horizon=8)
    with pytest.raises(ValueError, match=r"unknown task 'my-robot/wave'.* pass sentences="):
        MultiTaskWindows([mine], ("dp3",), horizon=8)
    with pytest.raises(ValueError, match=r"have no camera 'corner'; they have: dp3"):
        MultiTaskWindows([first], ("corner",), horizon=8)
    with pytest.raises(ValueError, match="demonstrations of at least one task"):
        MultiTaskWindows([], ("dp3",), horizon=8)
    with pytest.raises(ValueError, match="must be a list of instructions, got 'Wave'"):
        MultiTaskWindows([mine], ("dp3",), horizon=8, sentences={"my-robot/wave": "Wave"})
    with pytest.raises(ValueError, match="1 folders of demonstrations, but 2 names"):
        MultiTaskWindows([mine], ("dp3",), horizon=8, tasks=["a", "b"])
    data = MultiTaskWindows([mine], ("dp3",), horizon=8, sentences={"my-robot/wave": ["Wave"]}, image_size=(16, 16))
    assert data.image_size == (16, 16) and data.sentences == (("Wave",),)
    with pytest.raises(ValueError, match="no word of the instruction 'Wave' is known"):
        MultiTaskLoader(data, Tokenizer.of(["Open the drawer"]), 8, 4, 4)


def test_a_vla_learns_to_follow_its_instruction(tmp_path) -> None:
    data = two_tasks(tmp_path, sentences=OWN)
    vla = make_vla(sentences=["Open it", "Close it"], horizon=8, n_action=4)
    data.fit(vla)
    loader = MultiTaskLoader(data, vla.tokenizer, vla.spec.text_length, 12, 80)
    optimizer = torch.optim.AdamW(vla.parameters(), lr=2e-3)
    vla.train()
    losses = []
    for batch in loader.epoch(0):
        loss = vla.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    early, late = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert late < early / 5, (early, late)
    vla.eval()
    batch = loader.batch(1000)  # pictures and states are those of both tasks
    wanted = torch.tensor([0.5, -0.5, 0.5, -0.5])
    for text, sign in (("Open it", 1), ("close it!", -1)):
        told = vla.tokenizer.encode_all([text] * len(batch), vla.spec.text_length)
        acted = vla.act(batch.images, batch.state, told)
        torch.testing.assert_close(acted, (sign * wanted).expand_as(acted), rtol=0, atol=0.2)
