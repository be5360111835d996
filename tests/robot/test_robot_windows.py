"""Samples cut from demonstrations, and their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from policy_parts import SIZE, write_demos

from xdfast.robot.demos.open import open_demos
from xdfast.robot.windows import WindowLoader, Windows

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def demos(tmp_path):
    return open_demos(write_demos(tmp_path / "demos", cameras=("dp3", "corner")))


@pytest.mark.parametrize("n_obs", [1, 2, 3])
def test_a_sample_is_the_window_written_out_by_hand(demos, n_obs) -> None:
    horizon = 8
    windows = Windows(demos, ("corner", "dp3"), n_obs=n_obs, horizon=horizon)
    assert len(windows) == 12 + 13 + 14
    frame = 0
    for number in range(len(demos)):
        episode = demos.episode(number)
        for t in range(len(episode)):
            times = [min(max(t - n_obs + 1 + k, 0), len(episode) - 1) for k in range(max(horizon, n_obs))]
            ids = torch.tensor([frame])
            seen = windows.observed(ids)[0]
            np.testing.assert_array_equal(windows.state[seen], episode.state[times[:n_obs]])
            np.testing.assert_array_equal(windows.images[seen, 1], episode.images["dp3"][times[:n_obs]])
            np.testing.assert_array_equal(windows.actions[windows.predicted(ids)[0]], episode.actions[times[:horizon]])
            frame += 1


def test_batches_are_a_function_of_seed_and_step_and_every_sample_comes_once_a_pass(demos) -> None:
    windows = Windows(demos, ("dp3",), n_obs=1, horizon=8)
    loader = WindowLoader(windows, 13, 3, seed=5)
    assert sorted(torch.cat([b.ids for b in loader.epoch(0)]).tolist()) == list(range(39))
    later = list(WindowLoader(windows, 13, 3, seed=5).epoch(1, start=1))
    assert [b.ids.tolist() for b in loader.epoch(1)][1:] == [b.ids.tolist() for b in later]
    assert loader.batch(0).ids.tolist() != WindowLoader(windows, 13, 3, seed=6).batch(0).ids.tolist()
    batch = loader.batch(0)
    assert batch.images.shape == (13, 1, 1, SIZE, SIZE, 3) and batch.images.dtype == torch.uint8
    assert batch.state.shape == (13, 1, 9) and batch.actions.shape == (13, 8, 4)


def test_two_ranks_share_a_batch(demos) -> None:
    windows = Windows(demos, ("dp3",), n_obs=1, horizon=8)
    whole = WindowLoader(windows, 8, 4, seed=1).batch(3).ids.tolist()
    halves = [WindowLoader(windows, 4, 4, seed=1, rank=r, world_size=2).batch(3).ids.tolist() for r in (0, 1)]
    assert halves[0] + halves[1] == whole


def test_features_take_the_place_of_pictures(demos) -> None:
    windows = Windows(demos, ("dp3", "corner"), n_obs=2, horizon=8)
    frames = torch.arange(39.0)[None, :, None, None] + 1000 * torch.arange(4.0)[:, None, None, None]
    features = frames.expand(4, 39, 2, 5) + torch.tensor([0.0, 0.5])[None, None, :, None]
    batch = WindowLoader(windows, 16, 1, features=features).batch(0)
    assert batch.images.shape == (16, 2, 2, 5)
    np.testing.assert_array_equal(batch.images[:, 0, :, 0] % 1000, windows.observed(batch.ids))
    np.testing.assert_array_equal(batch.images[:, 1] - batch.images[:, 0], np.full((16, 2, 5), 0.5))
    draws = batch.images[:, 0, :, 0] // 1000
    assert (draws[:, 0] == draws[:, 1]).all() and len(draws.unique()) > 1  # one crop for a sample


def test_pictures_that_do_not_fit_go_to_a_file_or_are_refused(demos, tmp_path, monkeypatch) -> None:
    import xdfast.robot.windows as module

    inside = Windows(demos, ("dp3",), n_obs=1, horizon=8)
    monkeypatch.setattr(module, "_free_memory", lambda: 1000)
    outside = Windows(demos, ("dp3",), n_obs=1, horizon=8, scratch=tmp_path / "scratch")
    assert torch.equal(inside.images, outside.images) and not list((tmp_path / "scratch").iterdir())
    assert torch.equal(WindowLoader(inside, 8, 1).batch(0).images, WindowLoader(outside, 8, 1).batch(0).images)
    with pytest.raises(ValueError, match="smaller image_size, fewer demonstrations"):
        Windows(demos, ("dp3",), n_obs=1, horizon=8)


def test_pictures_are_brought_to_size_and_strangers_refused(demos) -> None:
    small = Windows(demos, ("dp3",), n_obs=1, horizon=8, image_size=(12, 12))
    assert small.images.shape[2:4] == (12, 12)
    full = Windows(demos, ("dp3",), n_obs=1, horizon=8)
    means = [w.images.float().mean((1, 2, 3, 4)) for w in (small, full)]
    torch.testing.assert_close(*means, rtol=0.05, atol=4)
    with pytest.raises(ValueError, match="have no camera 'wrist'; they have: dp3, corner"):
        Windows(demos, ("wrist",), n_obs=1, horizon=8)
