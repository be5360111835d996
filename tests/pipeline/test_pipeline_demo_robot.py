"""make demo-robot, in seconds instead of minutes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sim_process import needs_renderer

from xdfast.pipeline.demo_robot import DemoRobotConfig, _fitted, _fitted_note, _photographs, _verdict, demo_robot
from xdfast.pipeline.demo_robot_plan import Costs, DemoPlan, fit, planned
from xdfast.pipeline.evaluate_policy import PolicyEvaluation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "drawr-open"}, "unknown task"),
        ({"task": "adroit/door"}, "no scripted expert; the demo needs a MetaWorld task"),
        ({"size": 90}, "size must be a multiple of 16"),
        ({"steps": 0}, "steps must be > 0"),
        ({"minutes": -1}, "minutes must be ≥ 0"),
        ({"episodez": 3}, "no setting 'episodez'. Did you mean 'episodes'"),
    ],
)
def test_bad_settings(settings, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        demo_robot(out=str(tmp_path / "demo"), **settings)
    assert not (tmp_path / "demo").exists()


def test_photographs_are_those_of_scikit_learn_or_ones_own(tmp_path) -> None:
    crops = list(_photographs(DemoRobotConfig(size=32)))
    assert len(crops) == 300 and all(picture.size == (32, 32) for picture in crops)
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "deep/b.jpg"):
        Image.fromarray(np.full((40, 50, 3), 7, np.uint8)).save(tmp_path / name)
    own = list(_photographs(DemoRobotConfig(size=32, images=str(tmp_path))))
    assert len(own) == 2 and np.abs(np.asarray(own[0]).astype(int) - 7).max() <= 1


@pytest.mark.parametrize(
    ("scratch", "distilled", "said"),
    [(5, 20, "The distilled encoder is better."), (20, 5, "The encoder from scratch is better."), (15, 17, "overlap")],
)
def test_the_verdict_claims_nothing_that_the_intervals_do_not(scratch, distilled, said) -> None:
    def result(solved: int) -> PolicyEvaluation:
        return PolicyEvaluation("m", None, "t", {"solved": solved, "episodes": 20, "latency_ms": 30})

    lines = _verdict({"from scratch": [result(scratch)], "distilled": [result(distilled)]})
    assert said in lines[-1] and f"{scratch} of 20 episodes solved" in lines[0]


FAST, SLOW = Costs(0.05, 0.2, 0.25), Costs(0.4, 1.6, 0.9)


def test_a_fast_machine_does_all_that_is_asked() -> None:
    config = DemoRobotConfig()
    plan = fit(config, FAST, batches=46, gone=30)
    assert (plan.teacher_epochs, plan.distill_epochs, plan.steps) == (4, 4, 500)
    # by hand: 30 gone, evaluations 2 (25 + 20), report 30, stage 1 1.25·46·4·0.25, policies 2·500·1.1·0.25
    assert plan.seconds == pytest.approx(30 + 90 + 30 + 57.5 + 275)
    assert _fitted_note(config, config) == []


def test_a_slow_machine_does_less_and_ends_in_time() -> None:
    config = DemoRobotConfig()
    plan = fit(config, SLOW, batches=46, gone=60)
    assert (plan.teacher_epochs, plan.distill_epochs) == (1, 1) and 50 <= plan.steps < 500 and plan.steps % 10 == 0
    assert 60 * config.minutes - 25 < plan.seconds <= 60 * config.minutes  # ten more updates would be too many
    more = fit(DemoRobotConfig(minutes=20.0), SLOW, batches=46, gone=60)
    assert more.steps > plan.steps and more.distill_epochs >= plan.distill_epochs
    several = fit(DemoRobotConfig(seeds=2), SLOW, batches=46, gone=60)
    assert several.steps < plan.steps / 1.9
    hopeless = fit(config, Costs(4.0, 16.0, 9.0), batches=46, gone=60)
    assert hopeless.steps == 50 and hopeless.seconds > 60 * config.minutes  # it is done, and its time is told
    (note,) = _fitted_note(config, DemoRobotConfig(teacher_epochs=1, steps=120))
    assert (
        note.startswith("To end within 11 minutes") and "120 instead of 500 updates" in note and "stage 1" not in note
    )


def test_a_plan_is_made_once_and_only_where_time_is_short(tmp_path) -> None:
    asked = []

    def measure() -> Costs:
        asked.append(1)
        return SLOW

    cpu, config = torch.device("cpu"), DemoRobotConfig()
    plan = planned(config, tmp_path, 46, 60.0, cpu, measure)
    assert planned(config, tmp_path, 46, 300.0, cpu, measure) == plan and len(asked) == 1  # continued
    assert planned(DemoRobotConfig(steps=60), tmp_path, 46, 60.0, cpu, measure).steps == 60 and len(asked) == 2
    whole = DemoPlan(4, 4, 500, 0.0)
    assert planned(config, tmp_path, 46, 60.0, torch.device("cuda"), measure) == whole
    assert planned(DemoRobotConfig(minutes=0), tmp_path, 46, 60.0, cpu, measure) == whole and len(asked) == 2


@pytest.mark.timeout(600)  # seconds, but of a busy machine many
def test_the_demo_times_its_own_updates(tmp_path, caplog) -> None:
    frames = tmp_path / "frames"
    (frames / "photograph").mkdir(parents=True)
    for number in range(80):
        Image.new("RGB", (16, 16)).save(frames / "photograph" / f"{number}.png")
    config = DemoRobotConfig(size=16, minutes=0.001, device="cpu")
    with caplog.at_level("WARNING", logger="xdfast"):
        fitted = _fitted(config, tmp_path, frames, 1.0)
    assert (fitted.teacher_epochs, fitted.distill_epochs, fitted.steps) == (1, 1, 50)
    assert "50 instead of 500 updates of each policy" in caplog.text
    costs = json.loads((tmp_path / "plan.json").read_text())["costs"]
    assert set(costs) == {"teacher", "imitation", "policy"} and all(seconds > 0 for seconds in costs.values())
    own = DemoRobotConfig(teacher="vit_small_patch14_dinov2.lvd142m", minutes=0.001, device="cpu")
    assert _fitted(own, tmp_path, frames, 1.0) == own


@needs_renderer
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_demo(tmp_path) -> None:
    settings = {
        "out": str(tmp_path / "demo"), "size": 48, "other_tasks": 1, "other_episodes": 1, "demos": 2, "teacher_epochs": 1,
        "distill_epochs": 1, "steps": 60, "episodes": 2, "progress": False, "device": "cpu", "minutes": 0,
    }  # fmt: skip
    result = demo_robot(**settings)
    assert {name: len(runs) for name, runs in result.runs.items()} == {"from scratch": 1, "distilled": 1}
    page = result.report.path.read_text(encoding="utf-8")
    assert "data:video/mp4" in page and "Saliency" in page
    figures = json.loads(result.report.json_path.read_text(encoding="utf-8"))
    assert len(figures["runs"]) == 2
    again = demo_robot(**settings)  # finished: nothing is trained again
    told = [[line.split(";")[0] for line in found.verdict] for found in (result, again)]  # without the latency
    assert told[0] == told[1]
