"""make demo-robot, in seconds instead of minutes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from sim_process import needs_renderer

from xdfast.pipeline.demo_robot import DemoRobotConfig, _photographs, _verdict, demo_robot
from xdfast.pipeline.evaluate_policy import PolicyEvaluation

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "drawr-open"}, "unknown task"),
        ({"task": "adroit/door"}, "no scripted expert; the demo needs a MetaWorld task"),
        ({"size": 90}, "size must be a multiple of 16"),
        ({"steps": 0}, "steps must be > 0"),
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


@needs_renderer
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_demo(tmp_path) -> None:
    settings = {
        "out": str(tmp_path / "demo"), "size": 48, "other_tasks": 1, "other_episodes": 1, "demos": 2, "teacher_epochs": 1,
        "distill_epochs": 1, "steps": 60, "episodes": 2, "progress": False, "device": "cpu",
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
