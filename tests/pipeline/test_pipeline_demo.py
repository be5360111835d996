"""``demo`` in small: the same code as ``make demo``, a few steps long."""

from __future__ import annotations

import json

import numpy as np
import pytest

from xdfast.data import SubsetSource, open_source, write_image_folder
from xdfast.pipeline.demo import DemoConfig, demo

SHORT = {
    "labels_per_class": 3, "distill_steps": 22, "finetune_steps": 6, "teacher_steps": 22, "workers": 0,
    "progress": False, "measure_speed": False, "device": "cpu",
}  # fmt: skip


METHODS = ("scratch", "rsd")  # make demo has kd as well


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return demo(out=str(out / "demo"), seeds=2, methods=METHODS, **SHORT)


def test_every_method_gets_the_same_steps_and_seeds(result) -> None:
    assert list(result.runs) == list(METHODS)
    assert all([run.config["seed"] for run in runs] == [0, 1] for runs in result.runs.values())
    steps = {record["method"]: record["steps"] for record in result.report.data["runs"]}
    assert steps == {"from scratch": 28, "RSD → fine-tuned": 28}


def test_the_report_compares_with_scratch_and_says_what_the_students_saw(result) -> None:
    data = json.loads(result.report.json_path.read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in data["accuracy"]}
    assert rows["RSD → fine-tuned"]["to_scratch"]["n"] == 2 and rows["from scratch"]["to_scratch"] is None
    assert "cka" in rows["from scratch"]["metrics"]
    assert any("without labels" in note for note in data["notes"])
    assert len(result.verdict) == 1 and "95 % interval" in result.verdict[0]
    assert {row["role"] for row in data["cost"]} == {"teacher", "student"}


def test_a_second_call_repeats_nothing(result) -> None:
    out = result.report.path.parent
    before = {path: path.stat().st_mtime_ns for path in out.rglob("student/model.safetensors")}
    assert len(before) == 1 + 2 + 2 * 2
    again = demo(out=str(out), seeds=2, methods=METHODS, **SHORT)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.verdict == result.verdict


def test_own_folder_own_teacher_and_student(result, tmp_path) -> None:
    digits = open_source("sklearn:digits", val_fraction=None)
    few = [i for i in range(len(digits)) if digits.labels[i] < 3][:90]
    folder = write_image_folder(SubsetSource(digits, np.array(few)), tmp_path / "photos")
    for name in digits.classes[3:]:
        (folder / name).rmdir()
    mine = demo(
        data=str(folder), teacher=result.teacher, student="test_resnet", out=str(tmp_path / "mine"), size=32, seeds=1,
        methods=("scratch", "rsd"), batch_size=16, **{**SHORT, "distill_steps": 4, "finetune_steps": 2, "teacher_steps": 40},
    )  # fmt: skip
    # the teacher's classifier has ten classes, the photographs three: it gets one of its own, its encoder untouched
    assert mine.teacher == str(tmp_path / "mine" / "teacher")
    assert mine.runs["rsd"][0].student.num_classes == 3
    assert mine.verdict and "one seed: no interval" in mine.verdict[0]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"seeds": 0}, "seeds must be > 0"),
        ({"methods": ()}, "methods is empty"),
        ({"methods": ("rsd", "rsd")}, "names one twice"),
        ({"labels_per_clas": 3}, "Did you mean 'labels_per_class'"),
        ({"methods": ("scratch", "rds")}, "unknown 'rds'.*Did you mean 'rsd'"),
        ({"data": "sklearn:digit"}, "Did you mean 'digits'"),
    ],
)
def test_bad_settings_fail_before_any_work(bad, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        demo(out=str(tmp_path / "demo"), **{**SHORT, **bad})
    assert not (tmp_path / "demo").exists()


def test_the_defaults_are_valid() -> None:
    DemoConfig().validate()
