"""Closed loop: episodes are functions of their seeds, kept as they end, filmed as they were; suites."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from policy_parts import write_demos
from sim_process import needs_renderer
from vla_parts import make_vla, routed_vla, split_decisions

import xdfast
from xdfast.pipeline.evaluate_policy import load_policy_evaluation
from xdfast.pipeline.suite import SuiteConfig, run_suite, suite_tasks
from xdfast.reporting.intervals import wilson_interval
from xdfast.robot.rollout import check_task, rollout
from xdfast.robot.video import read_video
from xdfast.robot.vla.cost import drawn_observations

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "crop": 20, "feature_dim": 8, "unet_widths": (16, 32), "train_steps": 20, "inference_steps": 4, "noise_draws": 2,
    "batch_size": 8, "steps": 4, "warmup_steps": 1, "log_every": 2, "progress": False, "device": "cpu", "episodes": 0,
}  # fmt: skip
SHORT = {"max_steps": 20, "progress": False, "device": "cpu", "eval_seed": 7, "saliency": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    demos = write_demos(folder / "demos")
    return xdfast.finetune("test_resnet", task="drawer-open", demos=demos, out=str(folder / "run"), **SMALL)


@needs_renderer
def test_episodes_are_kept_filmed_and_summed_up(run, tmp_path) -> None:
    out = str(tmp_path / "evaluation")
    first = xdfast.evaluate(run, episodes=2, videos=1, out=out, envs=2, **SHORT)
    low, high = wilson_interval(int(first.metrics["solved"]), 2)
    assert first.metrics["success_low"] == low and first.metrics["success_high"] == high
    assert [e["seed"] for e in first.episodes] == [7, 8] and all(e["steps"] == 20 for e in first.episodes)
    assert first.task == "metaworld/drawer-open-v3" and first.latency["p50"] > 0 and first.routing == {}
    (name, file), *_ = first.videos.items()
    frames, _ = read_video(Path(out) / file)
    assert name == "failure-7" and frames.shape == (21, 24, 24, 3)
    lines = (Path(out) / "episodes.jsonl").read_text().splitlines()
    assert len(lines) == 3
    # cut as a kill would: the last episode is run again, and comes out the same, beside another number of others
    (Path(out) / "episodes.jsonl").write_text("\n".join([*lines[:2], lines[2][:40]]))
    again = xdfast.evaluate(run, episodes=3, videos=0, out=out, envs=1, **SHORT)
    assert again.episodes[:2] == first.episodes and len(again.episodes) == 3
    rows = [json.loads(line) for line in (Path(out) / "episodes.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows[1:]] == [7, 8, 9]
    before = np.frombuffer(base64.b64decode(json.loads(lines[2])["actions"]), "<f4")
    after = np.frombuffer(base64.b64decode(rows[2]["actions"]), "<f4")
    np.testing.assert_allclose(after, before, atol=1e-4)
    assert load_policy_evaluation(Path(out)).episodes == again.episodes


@needs_renderer
def test_another_policy_or_limit_is_another_evaluation(run, tmp_path, caplog) -> None:
    out = tmp_path / "evaluation"
    out.mkdir()
    (out / "episodes.jsonl").write_text(
        '{"policy": "another"}\n{"seed": 7, "success": true, "steps": 1, "actions": ""}\n'
    )
    with caplog.at_level("INFO"):
        result = xdfast.evaluate(run, episodes=1, videos=0, out=str(out), **SHORT)
    assert "another policy or task" in caplog.text
    assert result.metrics["success"] == 0 and result.episodes[0]["steps"] == 20


@needs_renderer
def test_more_episodes_than_environments_another_task_and_none_at_all(run, tmp_path, caplog) -> None:
    seen = []
    elsewhere = {"task": "door-open", "episodes": 1, "videos": 0, "out": str(tmp_path / "door")}
    with caplog.at_level("WARNING"):
        xdfast.evaluate(run, other_task=True, **elsewhere, **SHORT)
    assert "learned metaworld/drawer-open-v3, it is evaluated on metaworld/door-open-v3" in caplog.text
    results = rollout(run.policy, "drawer-open", [3, 1, 2], envs=2, max_steps=10, on_episode=seen.append)
    assert [r.seed for r in results] == [3, 1, 2] and sorted(r.seed for r in seen) == [1, 2, 3]
    assert all(r.steps == 10 and r.actions.shape == (10, 4) and not r.success for r in results)
    assert rollout(run.policy, "drawer-open", []) == []


def test_a_policy_of_another_task_is_refused_with_the_differences(run) -> None:
    with pytest.raises(
        ValueError,
        match=r"does not fit adroit/door \(it was trained on metaworld/drawer-open-v3\): it has actions of 4",
    ):
        xdfast.evaluate(run, task="adroit/door", episodes=1)
    with pytest.raises(
        ValueError, match=r"learned metaworld/drawer-open-v3, not metaworld/door-open-v3.*other_task=True"
    ):
        xdfast.evaluate(run, task="door-open", episodes=1)
    check_task(run.policy, "door-open")  # the same robot
    with pytest.raises(ValueError, match="unknown task 'dor-open'"):
        check_task(run.policy, "dor-open")
    with pytest.raises(FileNotFoundError, match="was not evaluated while it trained"):
        xdfast.evaluate(run, which="best", episodes=1)
    with pytest.raises(ValueError, match="episodes must be > 0, got 0"):
        xdfast.evaluate(run, episodes=0)


def test_an_evaluation_under_torchrun_is_refused(run, monkeypatch) -> None:
    monkeypatch.setattr("xdfast.distributed.world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="a policy is evaluated in one process"):
        xdfast.evaluate(run, episodes=1)


# --- routed policies


@pytest.fixture
def routed():
    sentences = ("Pull the drawer open", "Push the drawer closed")
    tasks = ("metaworld/drawer-open-v3", "metaworld/drawer-close-v3")
    vla = routed_vla(make_vla(sentences=sentences, tasks=tasks, layers=5, n_action=4))
    split_decisions(vla, drawn_observations(vla, 8))
    return vla


@needs_renderer
def test_the_paths_of_an_interrupted_evaluation_are_those_of_an_unbroken_one(routed, tmp_path) -> None:
    given = {**SHORT, "task": "drawer-open", "episodes": 3, "videos": 0}
    whole = xdfast.evaluate(routed, out=str(tmp_path / "whole"), envs=2, **given)
    assert whole.routing["decisions"] == 15 and whole.routing["layers"] == 5  # 3 episodes of 20 steps, 4 a decision
    assert whole.metrics["flops_fraction"] == whole.routing["fraction"] < 1
    assert whole.routing["use"][0] == 1 and len(whole.routing["use_over_time"]) == 10
    assert load_policy_evaluation(tmp_path / "whole").routing == whole.routing
    lines = (tmp_path / "whole" / "episodes.jsonl").read_text().splitlines()
    assert all(len(json.loads(line)["paths"]) == 5 for line in lines[1:])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "episodes.jsonl").write_text("\n".join([*lines[:2], lines[2][:-40]]))  # cut within the second episode
    again = xdfast.evaluate(routed, out=str(broken), envs=1, **given)
    assert again.routing == whole.routing and again.episodes == whole.episodes
    # of more episodes than are asked for, the others do not count
    fewer = xdfast.evaluate(routed, out=str(broken), **{**given, "episodes": 2})
    assert fewer.routing["decisions"] == 10


@needs_renderer
def test_logs_and_evaluations_of_before_still_load(routed, tmp_path) -> None:
    given = {**SHORT, "task": "drawer-open", "episodes": 1, "videos": 0, "out": str(tmp_path)}
    first = xdfast.evaluate(routed.for_task("drawer-open"), **given)
    assert first.routing["decisions"] == 5
    log, file = tmp_path / "episodes.jsonl", tmp_path / "evaluation.json"
    head, row = (json.loads(line) for line in log.read_text().splitlines())
    log.write_text(json.dumps(head) + "\n" + json.dumps({k: row[k] for k in ("seed", "success", "steps", "actions")}))
    without = xdfast.evaluate(routed, **given)
    assert without.routing == {} and "flops_fraction" not in without.metrics
    assert without.episodes == first.episodes
    kept = json.loads(file.read_text())
    del kept["routing"]
    file.write_text(json.dumps(kept))
    assert load_policy_evaluation(tmp_path).routing == {}


def test_a_policy_of_several_tasks_needs_one_named(routed) -> None:
    with pytest.raises(ValueError, match="the policy knows 2 tasks; name one: task='metaworld/drawer-open-v3'"):
        xdfast.evaluate(routed, episodes=1)


@needs_renderer
def test_evaluations_while_training_keep_the_best(tmp_path) -> None:
    demos = write_demos(tmp_path / "demos")
    given = {**SMALL, "steps": 4, "evaluate_every": 2, "episodes": 1, "max_steps": 4}
    run = xdfast.finetune("test_resnet", task="drawer-open", demos=demos, out=str(tmp_path / "run"), **given)
    rows = [row for row in run.history if row["kind"] == "val"]
    assert [row["step"] for row in rows] == [2, 4] and all(row["success"] == 0 for row in rows)
    assert run.metrics["best_success"] == 0
    assert (run.path / "policy-best" / "policy.json").is_file()
    assert xdfast.evaluate(run, which="best", episodes=1, videos=0, **SHORT).metrics["success"] == 0


# --- suites


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": "metaworld-esy"}, "metaworld-easy"),
        ({"encoders": {}}, "encoders is empty"),
        ({"encoders": {"a b": "resnet18"}}, "becomes a folder's name"),
        ({"settings": {"stepz": 1}}, "no setting 'stepz'. Did you mean 'steps'"),
        ({"settings": {"steps": 0}}, "steps must be > 0"),
        ({"encoder_settings": {"scrach": {}}}, "no encoder 'scrach'. Did you mean 'scratch'"),
        ({"encoder_settings": {"scratch": {"stepz": 1}}}, "no setting 'stepz'"),
        ({"tasks": "adroit"}, "no scripted expert; give a folder of demonstrations"),
        ({"policy": "policy-metawrld"}, "policy-metaworld"),
        ({"seeds": 0}, "seeds must be > 0"),
    ],
)
def test_a_bad_suite_is_told_before_anything_runs(tmp_path, settings, message) -> None:
    given = {"tasks": "drawer-open", "encoders": {"scratch": "resnet18"}, "out": str(tmp_path / "suite"), **settings}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_suite(**given)
    assert not (tmp_path / "suite").exists()


def test_suites_are_lists_of_tasks() -> None:
    assert len(suite_tasks("metaworld-50")) == 50
    assert suite_tasks("drawer-open, adroit/door") == ["metaworld/drawer-open-v3", "adroit/door"]
    assert SuiteConfig(tasks="drawer-open", encoders={"a": "resnet18"}, out="x").seeds == 3


@needs_renderer
@pytest.mark.slow
def test_a_suite_goes_on_after_a_failure_and_does_not_repeat_what_is_finished(tmp_path) -> None:
    settings = {
        **{k: v for k, v in SMALL.items() if k not in ("progress", "device", "crop")},
        "image_size": 32,
        "crop": 28,
        "demos": "1",
    }
    given = {
        "tasks": "drawer-close,button-press", "encoders": {"scratch": "test_resnet", "frozen": f"frozen:{tmp_path}/encoder"},
        "out": str(tmp_path / "suite"), "seeds": 1, "episodes": 1, "settings": settings, "jobs": 2, "progress": False,
        "device": "cpu", "videos": 0,
    }  # fmt: skip
    result = run_suite(**given)
    assert set(result.results) == {(f"metaworld/{t}-v3", "scratch") for t in ("drawer-close", "button-press")}
    assert len(result.failed) == 2 and all("encoder" in why for why in result.failed.values())
    assert result.report.path.is_file()
    from xdfast.models import create_model, save_student

    save_student(create_model("test_resnet", num_classes=2, image_size=28), tmp_path / "encoder")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "suite").rglob("scratch-seed0/summary.json")}
    result = run_suite(**given)
    assert not result.failed and len(result.results) == 4 and len(before) == 2
    assert all(p.stat().st_mtime_ns == then for p, then in before.items())
    rows = json.loads((tmp_path / "suite" / "results.json").read_text())
    assert {row["encoder"] for row in rows} == {"scratch", "frozen"} and set(result.metrics) == {
        "success_scratch",
        "success_frozen",
    }
    with pytest.raises(ValueError, match=r"holds a run with other settings \(steps: "):
        run_suite(**{**given, "settings": {**settings, "steps": settings["steps"] + 1}})


@needs_renderer
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill-9", "sigterm"])
def test_the_runs_of_a_suite_end_with_it_and_go_on(tmp_path, number) -> None:
    demos = write_demos(tmp_path / "demos" / "drawer-open-v3").parent
    kept = ("progress", "device")
    settings = {
        **{k: v for k, v in SMALL.items() if k not in kept},
        "image_size": 24,
        "steps": 120,
        "checkpoint_seconds": 0.0,
    }
    given = {
        "tasks": "drawer-open", "encoders": {"scratch": "test_resnet"}, "out": str(tmp_path / "suite"), "seeds": 1,
        "episodes": 1, "settings": settings, "demos": str(demos), "progress": False, "device": "cpu", "videos": 0,
    }  # fmt: skip
    code = "import json, sys; from xdfast.pipeline.suite import run_suite; run_suite(**json.loads(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(given)])
    resume = tmp_path / "suite" / "drawer-open-v3" / "scratch-seed0" / "resume.pt"
    while not resume.is_file() and process.poll() is None:
        time.sleep(0.05)
    runs = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    process.wait(90)
    assert runs and not psutil.wait_procs(runs, timeout=60)[1]
    log = (resume.parent / "log.txt").read_text()
    assert "the same command continues" in log
    result = run_suite(**given)
    assert not result.failed and "continuing" in (resume.parent / "log.txt").read_text()


# --- intervals


@pytest.mark.parametrize(
    ("solved", "trials", "low", "high"),
    # Newcombe (Statistics in Medicine 17, 1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_published_values(solved, trials, low, high) -> None:
    assert wilson_interval(solved, trials) == pytest.approx((low, high), abs=6e-5)


def test_wilson_at_the_ends_and_nonsense() -> None:
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=6e-5)
    for solved, trials in ((0, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="successes"):
            wilson_interval(solved, trials)
