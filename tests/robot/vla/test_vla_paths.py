"""Which layers a routed VLA runs: at every decision of every episode, counted once, in any batch; and with it the controller."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sim_process import needs_renderer
from vla_parts import make_vla, observation, routed_vla, split_decisions

import xdfast.nn
from xdfast.nn import fixed_gates
from xdfast.robot import Controller
from xdfast.robot.rollout import film, rollout
from xdfast.robot.runner import PolicyRunner, fixed_size
from xdfast.robot.vla import Observation
from xdfast.robot.vla.paths import EpisodePaths, PathRecorder

pytestmark = pytest.mark.usefixtures("one_thread")


def _asked(vla, images, state, told) -> list[str]:
    """The paths of observations, one by one."""
    found = []
    for row in range(len(images)):
        with torch.no_grad():
            gates, _ = vla.layers.route(vla.embed(Observation(images[row, None], state[row, None], told[row, None])))
        gates[:, list(vla.layers.always_on)] = 1
        found.append("".join(str(int(g)) for g in gates[0, :, 0]))
    return found


def test_rows_that_fill_up_a_batch_are_not_counted_and_decisions_are_those_of_the_router() -> None:
    vla = routed_vla(make_vla(layers=5))
    images, state, told = observation(vla, rows=3)
    split_decisions(vla, Observation(images, state, told))
    policy = vla.instructed("Open the drawer")
    runner, recorder = PolicyRunner(policy, 8), PathRecorder.of(policy)
    runner.act(images, state, policy.noise(3))
    recorder([7, 3, 9], [0, 0, 0])
    runner.act(images[1:], state[1:], policy.noise(2))  # episode 7 is over
    recorder([3, 9], [1, 1])
    asked = _asked(vla, images, state, told)
    assert len(set(asked)) > 1
    assert [recorder.episode(seed).paths for seed in (7, 3, 9)] == [asked[:1], [asked[1]] * 2, [asked[2]] * 2]
    assert recorder.episode(7).executor == vla.layers.decision.executor == "cpu"
    summary = recorder.summary()
    assert summary["decisions"] == 5 and summary["layers"] == 5 and sum(n for _, n in summary["paths"]) == 5
    recorder([3], [0])  # the episode begins anew
    assert len(recorder.episode(3).paths) == 1


@pytest.mark.parametrize("branches", [1, 2])
def test_flops_are_those_that_the_stack_counts_itself(branches) -> None:
    vla = routed_vla(make_vla(layers=4), branches=branches)
    seen = Observation(*observation(vla, rows=4))
    split_decisions(vla, seen)
    recorder = PathRecorder.of(vla)
    vla.act(seen.images, seen.state, seen.instruction)
    recorder(range(4), [0] * 4)
    counted, summary = vla.layers.flops(vla.num_tokens), recorder.summary()
    assert summary["dense"] * 4 == counted.dense and counted.executed < counted.dense
    assert summary["nominal"] * 4 == counted.nominal and summary["executed"] * 4 == counted.executed
    assert summary["fraction"] == pytest.approx(counted.fraction_executed)
    vla.layers.executor = "dense_mask"
    vla.act(seen.images, seen.state, seen.instruction)
    recorder(range(4), [0] * 4)
    counted, summary = vla.layers.flops(vla.num_tokens), recorder.summary()
    assert summary["nominal"] * 4 == counted.nominal
    assert summary["executed"] * 4 == counted.executed > counted.dense
    if branches == 2:
        assert set("".join(path for path, _ in summary["paths"])) & set("am")


def test_a_summary_by_hand() -> None:
    recorder = PathRecorder.of(routed_vla(make_vla(layers=4)))
    recorder.add(1, EpisodePaths(["1111"] * 10 + ["1001"] * 10, "cpu"))
    recorder.add(2, EpisodePaths(["1101"] * 5, "cpu"))
    recorder.add(3, EpisodePaths([], "cpu"))
    found = recorder.summary()
    assert found["decisions"] == 25 and found["distinct"] == 3
    assert found["paths"] == [["1001", 10], ["1111", 10], ["1101", 5]]
    assert found["use"] == pytest.approx([1, 0.6, 0.4, 1])
    over_time = np.array(found["use_over_time"], dtype=float)
    # two decisions of the long episode in each tenth, one of the short one in every other
    assert (
        over_time.shape == (10, 4) and over_time[1].tolist() == [1, 1, 1, 1] and over_time[9].tolist() == [1, 0, 0, 1]
    )
    assert over_time[0] == pytest.approx([1, 1, 2 / 3, 1]) and over_time[8] == pytest.approx([1, 1 / 3, 0, 1])
    assert recorder.summary([2])["use_over_time"][1] is None and recorder.summary([2])["use"] == [1, 1, 0, 1]
    assert recorder.summary([3, 8]) == {}
    router = recorder.stack.router.flops(recorder.tokens)
    assert recorder.summary([2])["nominal"] == 0.75 * found["dense"] + router
    assert recorder.summary([1])["fraction"] == pytest.approx(0.75 + router / found["dense"])


def test_only_routed_vlas_are_recorded_and_misuse_is_told(caplog) -> None:
    vla = make_vla()
    assert PathRecorder.of(vla) is None and PathRecorder.of(vla.instructed("Open the drawer")) is None
    recorder = PathRecorder.of(routed_vla(vla).instructed("Open the drawer"))
    with pytest.raises(RuntimeError, match="the stack decided nothing, paths of 2"):
        recorder([1, 2], [0, 0])
    for path in ("1", "1m"):
        with pytest.raises(ValueError, match=f"has 2 characters of '01', got '{path}'"):
            recorder.add(1, EpisodePaths([path], "cpu"))
    images, state, told = observation(vla, rows=1)
    recorder.stack.executor = "planned"
    with torch.no_grad():
        recorder.stack(vla.tokens(vla.features(images), state, told))
    with pytest.raises(RuntimeError, match="for 1 samples, paths of 2"):
        recorder([1, 2], [0, 0])
    tokens = xdfast.nn.route(vla, 0.9, blocks="layers", tokens=vla.num_tokens, unit="token", always_on=(0,))
    assert PathRecorder.of(tokens) is None
    assert "which layers run is not recorded: a path is a decision for a whole sample" in caplog.text


@needs_renderer
def test_every_decision_of_every_episode_is_recorded_once() -> None:
    sentences = ("Pull the drawer open", "Push the drawer closed")
    vla = routed_vla(make_vla(sentences=sentences, layers=5, n_action=3))
    policy = vla.for_task("drawer-open")
    first = rollout(policy, "drawer-open", [5], max_steps=12)
    seen = _seen(policy, first, 12)
    split_decisions(vla, seen[0])
    recorder = PathRecorder.of(policy)
    episodes = rollout(policy, "drawer-open", [5, 2, 8], envs=2, max_steps=11, on_decision=recorder)  # one runs alone
    for episode, observations in zip(episodes, _seen(policy, episodes, 11)):
        paths = recorder.episode(episode.seed).paths
        assert paths == _asked(vla, observations.images, observations.state, observations.instruction)
        assert len(paths) == math.ceil(episode.steps / 3) == 4
    assert recorder.summary()["decisions"] == 12 and recorder.summary()["distinct"] > 1


def _seen(policy, episodes, steps) -> list[Observation]:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as aside:
        paths = [Path(aside) / f"{e.seed}.mp4" for e in episodes]
        found = film(policy, "drawer-open", episodes, paths, max_steps=steps)
    stacked = []
    for rows in found:
        images, state = (torch.from_numpy(np.stack([row[key] for row in rows])) for key in ("images", "state"))
        stacked.append(Observation(images, state.float(), policy.instruction.expand(len(rows), -1)))
    return stacked


# --- deciding with a routed VLA


def test_acting_skips_what_is_off_and_computes_what_masks_do() -> None:
    vla = routed_vla(make_vla(layers=4))
    seen = observation(vla, rows=2)
    split_decisions(vla, Observation(*seen))
    assert vla.layers.executor == "auto"
    acted = vla.act(*seen)  # without torch.no_grad() around it
    assert vla.layers.decision.executor == "cpu" and vla.layers.decision.plan is not None
    gates = vla.layers.decision.gates
    assert 0 < int(gates.sum()) < gates.numel()
    vla.layers.executor = "dense_mask"
    with fixed_gates(vla, gates):
        torch.testing.assert_close(vla.act(*seen), acted, rtol=1e-4, atol=1e-5)


def test_one_sample_on_a_gpu_runs_by_graphs_and_nothing_else_is_changed() -> None:
    vla = routed_vla(make_vla())
    for batch, device, wanted in ((1, "cuda", "graph"), (2, "cuda", "auto"), (1, "cpu", "auto")):
        with fixed_size(vla, batch, torch.device(device)):
            assert vla.layers.executor == wanted
        assert vla.layers.executor == "auto"
    vla.layers.executor = "list"
    with pytest.raises(RuntimeError), fixed_size(vla, 1, torch.device("cuda")):
        assert vla.layers.executor == "list"
        raise RuntimeError
    with pytest.raises(ValueError, match="graph=True captures CUDA work"):
        PolicyRunner(vla.instructed("Open the drawer"), 1, graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_a_runner_on_a_gpu_decides_as_on_the_cpu(batch) -> None:
    vla = routed_vla(make_vla(layers=4))
    images, state, told = observation(vla, rows=batch)
    split_decisions(vla, Observation(images, state, told))
    policy = vla.instructed("Open the drawer")
    wanted = PolicyRunner(policy, batch).act(images, state, policy.noise(batch))
    asked = _asked(vla, images, state, told)
    runner, recorder = PolicyRunner(policy, batch, device="cuda"), PathRecorder.of(policy)
    for decision in range(2):
        np.testing.assert_allclose(runner.act(images, state, policy.noise(batch)), wanted, rtol=1e-2, atol=1e-3)
        recorder(range(batch), [decision] * batch)
    assert vla.layers.decision.executor == ("graph" if batch == 1 else "planned")
    assert [recorder.episode(row).paths for row in range(batch)] == [[path] * 2 for path in asked]
    with pytest.raises(ValueError, match="whose lists the host reads"):
        PolicyRunner(policy, batch, device="cuda", graph=True)


@pytest.mark.parametrize("steps", [1, 7, 10])
def test_a_controller_decides_once_per_chunk(steps) -> None:
    vla = routed_vla(make_vla(layers=3, n_action=5))
    images, state, told = observation(vla, rows=steps)
    split_decisions(vla, Observation(images, state, told))
    controller, decided = Controller(vla.instructed("Open the drawer")), []
    handle = vla.layers.register_forward_hook(lambda *_: decided.append(vla.layers.decision.executor))
    acted, fresh = [], []
    for now in range(steps):
        fresh.append(controller.decides_next)
        acted.append(controller.act({"dp3": images[now, 0, 0].numpy()}, state[now, 0].numpy()))
    handle.remove()
    assert decided == ["cpu"] * math.ceil(steps / 5) and np.flatnonzero(fresh).tolist() == list(range(0, steps, 5))
    chunks = vla.act(images[::5], state[::5], told[::5]).flatten(0, 1)[:steps]
    np.testing.assert_allclose(acted, chunks, rtol=1e-4, atol=1e-5)
