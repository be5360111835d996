"""Views of samples: a pure function of seed, sample and view; all that a run will see is known before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vla_parts import TASKS, make_vla, two_tasks

from xdfast.robot.pictures import crop
from xdfast.robot.vla import Observation, ViewLoader
from xdfast.robot.vla.views import shifted

pytestmark = pytest.mark.usefixtures("one_thread")


def loader_of(data, **options) -> ViewLoader:
    return ViewLoader(data, data.tokenizer(), 10, 6, 9, **{"views": 3, "shift": 2, **options})


def test_a_moved_picture_cut_in_the_middle_is_a_crop_elsewhere() -> None:
    picture = torch.randint(0, 256, (2, 1, 24, 24, 3), dtype=torch.uint8)
    for down, right in ((-2, -2), (-2, 2), (0, 1), (2, 0)):
        middle = crop(shifted(picture, down, right), 20, at_random=False)
        assert torch.equal(middle, picture[:, :, 2 + down : 22 + down, 2 + right : 22 + right])
    assert torch.equal(shifted(picture, 0, 0), picture)
    assert torch.equal(shifted(picture, 30, 0)[..., 5, :, :], picture[..., 23, :, :])  # the border repeats


def test_views_come_in_turns_and_are_the_same_however_they_are_asked_for(tmp_path) -> None:
    data = two_tasks(tmp_path)
    loader = loader_of(data)
    batches = list(loader.epoch(0))
    assert [b.step for b in batches] == list(range(9))
    rows = torch.cat([torch.stack([b.ids, b.views], 1)[b.task == 0] for b in batches])  # 27 rows of 12 samples
    assert [sorted(rows[i : i + 12, 1].unique().tolist()) for i in (0, 12)] == [[0], [1]]
    for batch in batches:
        again = loader.read(batch.ids.numpy(), batch.views.numpy())
        for name in ("images", "state", "actions", "instruction", "task"):
            assert torch.equal(getattr(again, name), getattr(batch, name)), name
    ids, views = loader.visited(9)
    assert len(set(zip(ids.tolist(), views.tolist()))) == len(ids)
    seen = {(int(i), int(v)) for b in batches for i, v in zip(b.ids, b.views)}
    assert set(zip(ids.tolist(), views.tolist())) == seen and ids.dtype == np.int64


def test_view_0_is_the_sample_with_the_usual_instruction(tmp_path) -> None:
    data = two_tasks(tmp_path)
    loader = loader_of(data)
    batch = loader.read([3, 20], [0, 0])
    assert torch.equal(batch.images[0, :, 0], data.windows[0].images[3])
    assert torch.equal(batch.images[1, :, 0], data.windows[1].images[20 - 12])
    assert torch.equal(batch.instruction[1], data.tokenizer().encode(data.sentences[1][0], 10))
    moved = loader.read([3, 20], [1, 2])
    assert not torch.equal(moved.images, batch.images) and torch.equal(moved.actions, batch.actions)
    assert not torch.equal(loader_of(data, seed=1).read([3], [1]).images, moved.images[:1])
    told = {tuple(loader.read([n], [v]).instruction[0].tolist()) for n in range(12) for v in range(1, 3)}
    assert len(told) > 1  # other words


def test_ranks_see_other_rows_and_know_of_each_other(tmp_path) -> None:
    data = two_tasks(tmp_path)
    ranks = [loader_of(data, rank=rank, world_size=2) for rank in (0, 1)]
    one = loader_of(data)
    assert torch.equal(torch.cat([r.batch(0).ids for r in ranks]), torch.cat([one.batch(s).ids for s in (0, 1)]))
    a, b = (np.stack(loader.visited(3)) for loader in ranks)
    assert np.array_equal(a, b) and np.array_equal(a, np.stack(one.visited(6)))
    short = ViewLoader.like(one, 2)
    assert len(list(short.epoch(0))) == 2 and one.batches_per_epoch == 9
    assert short.facts() == one.facts()


def test_a_policy_in_eval_mode_takes_them(tmp_path) -> None:
    data = two_tasks(tmp_path, tasks=TASKS)
    vla = make_vla(sentences=[text for ways in data.sentences for text in ways], text_length=10)
    batch = loader_of(data).batch(0)
    with torch.no_grad():
        actions = vla.actions(Observation(batch.images, batch.state, batch.instruction))
    assert actions.shape == (6, vla.chunk, 4) and actions.isfinite().all()


def test_bad_options(tmp_path) -> None:
    data = two_tasks(tmp_path)
    for options in ({"views": 0}, {"shift": -1}):
        with pytest.raises(ValueError, match="views must be ≥ 1 and shift ≥ 0"):
            loader_of(data, **options)
