"""A task as an environment: spaces without a simulator, episodes that a seed decides, chunks, limits, bad actions."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from sim_process import digests, needs_renderer, run_python

from xdfast.robot.sim.env import SimEnv, check_actions
from xdfast.robot.sim.names import task_spec


def test_spaces_are_known_without_a_simulator():
    env = SimEnv("drawer-open", image_size=64, cameras=("dp3", "corner"), n_obs=2, chunk=4)
    assert env.observation_space["images"].shape == (2, 2, 64, 64, 3)
    assert env.observation_space["images"].dtype == np.uint8
    assert env.observation_space["state"].shape == (2, 9)
    assert env.action_space.shape == (4, 4) and env.action_space.dtype == np.float32
    env.close()
    assert SimEnv("adroit/door").action_space.shape == (8, 28)
    assert "mujoco" not in sys.modules


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "draw-open"}, "Did you mean 'drawer-open'"),
        ({"image_size": 0}, "image_size=0"),
        ({"cameras": ("dp4",)}, "no camera 'dp4'.*Did you mean 'dp3'"),
        ({"n_obs": 0}, "n_obs=0"),
        ({"chunk": 0}, "chunk=0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"chunk": 2.5}, "chunk=2.5"),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SimEnv(**{"task": "drawer-open", **settings})


def test_bad_actions_are_named():
    spec = task_spec("drawer-open")
    good = np.zeros((8, 4), np.float64)
    assert check_actions(spec, good, (8, 4)).dtype == np.float32
    for bad, message in [
        (np.zeros((8, 5)), r"\[8, 4\].*got float64 \[8, 5\]"),
        (np.zeros((4, 4)), r"got float64 \[4, 4\]"),
        (np.array([["a"] * 4] * 8), r"must be numbers \[8, 4\]"),
        (np.where(np.arange(32).reshape(8, 4) == 13, np.nan, good), r"contain nan at index \(3, 1\)"),
        (np.where(np.arange(32).reshape(8, 4) == 31, np.inf, good), r"contain inf at index \(7, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_actions(spec, bad, (8, 4))


def test_step_before_reset_and_unknown_options():
    env = SimEnv("drawer-open")
    with pytest.raises(RuntimeError, match="reset comes before step"):
        env.step(np.zeros((8, 4)))
    with pytest.raises(ValueError, match="unknown reset option 'film'"):
        env.reset(seed=0, options={"film": "a.mp4"})
    with pytest.raises(ValueError, match="must end in .mp4"):
        env.reset(seed=0, options={"record": "a.avi"})


@needs_renderer
def test_a_seed_decides_the_episode_in_any_process_and_after_any_other_episode():
    names = ("metaworld/basketball-v3", "metaworld/shelf-place-v3", "adroit/relocate")
    assert digests(0, *names) == digests(2, *names)


def test_a_process_with_torch_is_told_to_start_another():
    assert "torch" in sys.modules
    with pytest.raises(RuntimeError, match=r"has torch loaded.*vector_env\('metaworld/drawer-open-v3', 1\)"):
        SimEnv("drawer-open").reset(seed=0)
    assert "mujoco" not in sys.modules


_EPISODES = """
import json, sys
import numpy as np
from xdfast.robot.sim.env import SimEnv
facts = {}

def run(env, seed, action=None, options=None):
    observation, info = env.reset(seed=seed, options=options)
    log = [info["executed"]]
    while True:
        given = np.zeros(env.action_space.shape, np.float32) if action is None else action(env)
        observation, reward, terminated, truncated, info = env.step(given)
        assert env.observation_space.contains(observation)
        log.append(info["executed"])
        if terminated or truncated:
            return observation, terminated, truncated, info, log

# an episode that nothing solves ends at max_steps, within a chunk; afterwards steps do nothing
env = SimEnv("drawer-open", image_size=32, n_obs=2, max_steps=20)
first, _ = env.reset(seed=1)
facts["repeated"] = bool((first["images"][:, 0] == first["images"][:, 1]).all())
observation, terminated, truncated, info, log = run(env, 1)
facts["limit"] = [terminated, truncated, info["steps"], log]
again, reward, terminated, truncated, info = env.step(np.zeros((8, 4)))
facts["after"] = [terminated, truncated, info["steps"], info["executed"], reward,
                  bool((again["images"] == observation["images"]).all())]
env.close()

# two observation steps are two steps of the simulator apart
env = SimEnv("drawer-open", image_size=32, n_obs=2, chunk=1, max_steps=20)
env.reset(seed=1)
one, *_ = env.step(np.full((1, 4), 0.5))
two, *_ = env.step(np.full((1, 4), 0.5))
facts["slides"] = bool((one["images"][:, 1] == two["images"][:, 0]).all() and (one["state"][1] == two["state"][0]).all())
env.close()

# frames only where an observation needs them
env = SimEnv("drawer-open", image_size=32, n_obs=2, chunk=8)
env.reset(seed=1)
drawn = []
look = env._look
env._look = lambda task: drawn.append(1) or look(task)
env.step(np.zeros((8, 4)))
facts["drawn"] = len(drawn)
env.close()

# the expert solves it through the chunks, filmed: one frame more than steps
env = SimEnv("reach", image_size=33, chunk=1)
path = sys.argv[1]
_, terminated, truncated, info, log = run(env, 0, lambda e: e._task.expert()[None], {"record": path})
from xdfast.robot.video import read_video
frames, fps = read_video(path)
facts["solved"] = [terminated, truncated, info["success"], len(frames) == info["steps"] + 1, fps, list(frames.shape[1:])]
for bad in (np.full((1, 4), np.nan), np.zeros((2, 4))):
    try:
        env.step(bad)
        facts["bad"] = "accepted"
    except ValueError:
        pass
env.close()
print(json.dumps(facts))
"""


@needs_renderer
def test_chunks_limits_and_films(tmp_path: Path):
    facts = run_python(_EPISODES, str(tmp_path / "film.mp4"))
    assert facts == {
        "repeated": True,
        "limit": [False, True, 20, [0, 8, 8, 4]],
        "after": [False, True, 20, 0, 0.0, True],
        "slides": True,
        "drawn": 2,
        "solved": [True, False, True, True, 80.0, [34, 34, 3]],
    }
