"""One observation in, one action out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from policy_parts import SIZE, make_policy

from xdfast.robot import Controller

pytestmark = pytest.mark.usefixtures("one_thread")


def _episode(cameras, steps=20):
    rng = np.random.default_rng(1)
    for _ in range(steps):
        yield {c: rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for c in cameras}, rng.normal(size=9)


@pytest.mark.parametrize("n_obs", [1, 3])
def test_actions_are_those_of_the_chunks_decided_for(n_obs) -> None:
    cameras = ("a", "b")
    policy = make_policy(cameras=cameras, n_obs=n_obs)
    controller = Controller(policy, seed=5)
    episode = list(_episode(cameras))
    decided, actions = [], []
    for images, state in episode:
        decided.append(controller.decides_next)
        actions.append(controller.act({**images, "another": images["a"]}, state))
    assert np.flatnonzero(decided).tolist() == [0, 8, 16] and actions[0].shape == (4,)
    generator = torch.Generator().manual_seed(5)
    for start in (0, 8, 16):
        times = [max(start - n_obs + 1 + k, 0) for k in range(n_obs)]
        images = np.stack([np.stack([episode[t][0][c] for t in times]) for c in cameras])[None]
        states = torch.tensor(np.stack([episode[t][1] for t in times]), dtype=torch.float32)[None]
        chunk = policy.act(torch.from_numpy(images), states, noise=policy.noise(1, generator))[0]
        np.testing.assert_allclose(actions[start : start + 8], chunk[: len(actions) - start], rtol=1e-4, atol=1e-5)
    controller.reset()
    np.testing.assert_allclose(controller.act(*episode[0]), actions[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i, s: ({}, s), "no picture of camera 'dp3'; given: none"),
        (
            lambda i, s: ({"dp3": i["dp3"][:20]}, s),
            r"camera 'dp3': expected uint8 \[24, 24, 3\], got uint8 \[20, 24, 3\]",
        ),
        (lambda i, s: ({"dp3": i["dp3"] / 255}, s), "got float64"),
        (lambda i, s: (i, s[:8]), r"expected state \[9\], got \[8\]"),
        (lambda i, s: (i, s * np.nan), "not finite"),
    ],
)
def test_bad_observations(change, message) -> None:
    controller = Controller(make_policy())
    with pytest.raises(ValueError, match=message):
        controller.act(*change(*next(_episode(("dp3",)))))
