"""A VLA where other policies act: runner, controller, latency, closed loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sim_process import needs_renderer
from vla_parts import SIZE, make_vla, observation

from xdfast.robot import Controller
from xdfast.robot.rollout import check_task, film, rollout
from xdfast.robot.runner import PolicyRunner, measure_latency
from xdfast.robot.video import read_video

pytestmark = pytest.mark.usefixtures("one_thread")

DRAWERS = ("Pull the drawer open", "Push the drawer closed")


def test_the_runner_decides_as_the_policy_does_and_fills_small_batches() -> None:
    told = make_vla().instructed("Open the drawer")
    images, state, ids = observation(told.vla, rows=3)
    runner = PolicyRunner(told, 4)
    wanted = told.vla.act(images, state, ids)
    np.testing.assert_allclose(runner.act(images, state, told.noise(3)), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told.act(images, state), wanted)
    with pytest.raises(ValueError, match="not finite"):
        runner.act(images, state * float("nan"), told.noise(3))


def test_an_instruction_changes_the_actions_and_bad_ones_are_told() -> None:
    vla = make_vla()
    images, state, _ = observation(vla)
    assert not torch.equal(vla.instructed("open it").act(images, state), vla.instructed("close it").act(images, state))
    for text, message in (("", "is empty"), ("open " * 9, "has 9 words, the policy takes 8"), ("fly", "no word of")):
        with pytest.raises(ValueError, match=message):
            vla.instructed(text)
    assert vla.for_task("drawer-open").text == DRAWERS[0]


def test_one_observation_in_one_action_out() -> None:
    told = make_vla().instructed("Open the drawer")
    images, state, ids = observation(told.vla, rows=1)
    controller = Controller(told)
    acted = [controller.act({"dp3": images[0, 0, 0].numpy()}, state[0, 0].numpy()) for _ in range(8)]
    np.testing.assert_allclose(acted, told.vla.act(images, state, ids)[0], rtol=1e-4, atol=1e-5)


def test_latency_of_its_parts() -> None:
    found = measure_latency(make_vla().instructed("Open the drawer"), runs=3)
    assert found.steps == 1 and min(found.p50, found.encode, found.denoise) > 0


def test_another_robot_is_refused() -> None:
    with pytest.raises(ValueError, match=r"does not fit adroit/door \(it was trained on drawer-open, reach\)"):
        check_task(make_vla(tasks=("drawer-open", "reach")), "adroit/door")


@needs_renderer
def test_an_episode_in_the_simulator(tmp_path) -> None:
    vla = make_vla(sentences=DRAWERS, layers=1)
    (as_usual,) = rollout(vla, "drawer-open", [4], max_steps=12)
    (told,) = rollout(vla.instructed(DRAWERS[0]), "drawer-open", [4], max_steps=12)
    (other,) = rollout(vla.instructed(DRAWERS[1]), "drawer-open", [4], max_steps=12)
    assert as_usual.steps == 12 and as_usual.actions.shape == (12, 4) and np.isfinite(as_usual.actions).all()
    np.testing.assert_allclose(told.actions, as_usual.actions, atol=1e-4)
    assert np.abs(other.actions - told.actions).max() > 1e-3
    seen = film(vla, "drawer-open", [as_usual], [tmp_path / "episode.mp4"], max_steps=12)
    assert len(seen[0]) == 2 and seen[0][0]["images"].shape == (1, 1, SIZE, SIZE, 3)
    assert read_video(tmp_path / "episode.mp4")[0].shape[0] == 13
