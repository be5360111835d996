"""``report`` of policies of several tasks: finished runs to a page; teachers found, what is missing told, measured once."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from vla_parts import TASKS, write_task
from vla_runs import evaluated, write_student, write_teacher

import xdfast
from xdfast.pipeline import report_vla_cost
from xdfast.pipeline.folder import RunResult, load_run
from xdfast.pipeline.report_vla import vla_records
from xdfast.robot.vla.cost import measure_vla

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, one_thread) -> dict[str, RunResult]:
    out = tmp_path_factory.mktemp("report")
    teacher = evaluated(write_teacher(out / "vla"), dict(zip(TASKS, (8, 6))), videos=1)
    student = evaluated(write_student(out / "student", teacher), dict(zip(TASKS, (8, 7))), videos=2, first=1)
    static = evaluated(write_student(out / "static", teacher, routing="static"), dict(zip(TASKS, (3, 4))))
    chance = evaluated(write_student(out / "chance", teacher, routing="random"), dict(zip(TASKS, (1, 1))))
    return {"teacher": teacher, "student": student, "static": static, "random": chance}


def test_a_page_of_a_teacher_its_student_and_baselines(runs, tmp_path) -> None:
    report = xdfast.report(list(runs.values()), out=tmp_path / "r.html", measure_speed=False)
    text, data = report.path.read_text(encoding="utf-8"), json.loads(report.json_path.read_text(encoding="utf-8"))
    assert "<title>Vision-language-action policies</title>" in text and "data:video/mp4;base64,dmlkZW8=" in text
    vla = data["vla"]
    assert [column["label"] for column in vla["columns"]] == [
        "teacher",
        "student, 50 %",
        "static, 50 %",
        "random, 50 %",
    ]
    assert data["headline"][0].startswith("The student solves 15 of 20 episodes with ")
    assert [cell["solved"] for cell in vla["success"]["total"]["cells"]] == [14, 15, 7, 2]
    assert len(vla["comparisons"]) == 5 and len(vla["videos"]) == 6 and vla["measurements"] == []
    told = vla["routing"][0]
    assert told["always_on"] == [0, 3] and len(told["tasks"][TASKS[0]]["use"]) == 4
    # nothing was timed, but all is counted
    counted = {row["label"]: row["counted"] for row in vla["cost"]}
    assert counted["teacher"]["decision"]["dense"] > counted["teacher"]["stack"]["dense"] > 0
    assert counted["student, 50 %"]["decision"]["executed"] < counted["teacher"]["decision"]["dense"]
    assert all(row["measured"] == [] for row in vla["cost"])


def test_measured_once_and_kept_in_the_json(runs, tmp_path, monkeypatch) -> None:
    calls = []

    def quick(*args, **kwargs):
        calls.append(kwargs["observations"])
        return measure_vla(*args, **kwargs, seconds=0.1, rounds=(3, 4))

    monkeypatch.setattr(report_vla_cost, "measure_vla", quick)
    options = {"out": tmp_path / "r.html", "batch_sizes": (1, 2)}
    first = xdfast.report([runs["teacher"], runs["student"]], **options)
    (row,) = (row for row in first.data["vla"]["cost"] if row["measured"])
    assert [m["batch"] for m in row["measured"]] == [1, 2] and len(calls) == 1
    assert all(m["stack_speedup"] > 0 and m["decision_speedup"] > 0 for m in row["measured"])
    assert row["machine"].endswith("1 thread; 64 observations drawn at random")
    assert "Transformer, ms" in first.path.read_text(encoding="utf-8")
    again = xdfast.report([runs["teacher"], runs["student"]], **options)
    assert len(calls) == 1 and again.data["vla"]["measurements"] == first.data["vla"]["measurements"]
    xdfast.report([runs["teacher"], runs["student"]], **{**options, "batch_sizes": (1,)})
    assert len(calls) == 2  # another measurement
    with pytest.raises(ValueError, match="at least one size, or measure_speed=False"):
        xdfast.report([runs["student"]], **{**options, "batch_sizes": ()})


def test_observations_are_moments_of_the_demonstrations(runs, tmp_path) -> None:
    write_task(tmp_path / "drawer-open-v3", TASKS[0], 0.5)
    write_task(tmp_path / "drawer-close", TASKS[1], -0.5)
    teacher = runs["teacher"]
    known = RunResult("vla", teacher.path, {**teacher.config, "demos": str(tmp_path)}, teacher.metrics)
    vla = teacher.policy
    seen = report_vla_cost._observations(vla, [teacher, known])  # the first does not say
    assert seen.images.shape == (64, 1, 1, 24, 24, 3) and seen.images.dtype == torch.uint8
    assert seen.state.shape == (64, 1, 9)
    assert torch.equal(seen.instruction[0], vla.for_task(TASKS[0]).instruction[0])
    assert torch.equal(seen.instruction[-1], vla.for_task(TASKS[1]).instruction[0])
    assert report_vla_cost._observations(vla, [teacher]) is None


def test_the_teacher_of_a_student_is_found(runs, tmp_path) -> None:
    report = xdfast.report(runs["student"].path, out=tmp_path / "r.html", measure_speed=False)
    assert [column["role"] for column in report.data["vla"]["columns"]] == ["teacher", "learned"]
    assert "the teacher 14 of 20" in report.data["headline"][0]
    lost = RunResult("vla", runs["student"].path, {**runs["student"].config, "teacher": "gone"}, {"steps": 1})
    alone = xdfast.report([lost], out=tmp_path / "alone.html", measure_speed=False)
    assert "its teacher is not in the report" in " ".join(alone.data["vla"]["remarks"])
    moved, _ = vla_records([runs["teacher"], lost])  # the only dense run
    assert moved.is_teacher and moved.method == "teacher"


def test_what_was_not_evaluated_is_said(runs, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(runs["student"].path, tmp_path / "run")
    shutil.rmtree(folder / "tasks" / "drawer-close-v3")
    (record,) = vla_records([load_run(folder)])
    assert record.remarks == ["was not evaluated in metaworld/drawer-close-v3"] and list(record.paths) == [TASKS[0]]
    shutil.rmtree(folder / "tasks")
    monkeypatch.setenv("MUJOCO_GL", "disable")
    (record,) = vla_records([load_run(folder)])
    assert record.remarks[0].startswith("was not evaluated, and cannot be here: ") and record.tasks == []
    run = load_run(folder)
    lost = RunResult("vla", folder, {**run.config, "teacher": "gone"}, run.metrics)
    report = xdfast.report([lost], out=tmp_path / "r.html", measure_speed=False)
    assert report.data["vla"]["success"]["rows"] == []
    assert 'id="success"' not in report.path.read_text(encoding="utf-8")


def test_other_kinds_of_runs_are_refused(runs, tmp_path) -> None:
    other = RunResult("policy", tmp_path / "x", {}, {})
    with pytest.raises(ValueError, match=r"x is not \(policy\): make two reports, one of each"):
        xdfast.report([runs["teacher"], other], out=tmp_path / "r.html")
