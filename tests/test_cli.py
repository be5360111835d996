"""The command line: one line for an error a user can mend, the verbs end to end, recipes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm

from xdfast import ActDistillConfig, DistillConfig, PolicyConfig, VLAConfig, __version__
from xdfast.cli import main
from xdfast.data import augment_preset
from xdfast.pipeline.compare import CompareConfig
from xdfast.pipeline.suite import SuiteConfig
from xdfast.recipes import load_recipe, recipe_names

SMALL = [
    "--data", "sklearn:digits", "--labels-per-class", "8", "--student-size", "32", "--epochs", "1", "--batch-size", "40",
    "--augment", "none", "--optimizer", "adamw", "--lr", "1e-3", "--workers", "0", "--no-progress", "--device", "cpu",
]  # fmt: skip


def test_help_lists_every_verb(capsys) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for verb in (
        "distill",
        "finetune",
        "evaluate",
        "report",
        "demo",
        "demo-robot",
        "suite",
        "demos",
        "recipes",
        "doctor",
    ):
        assert f"  {verb}" in text


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("verb", ["distill", "finetune", "evaluate", "demo"])
def test_every_setting_is_an_option_with_its_docstring(verb, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([verb, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--batch-size" in text and "--workers" in text


def test_unknown_verb_offers_the_nearest(capsys) -> None:
    assert main(["distil"]) == 2
    assert "Did you mean 'distill'" in capsys.readouterr().err


def test_an_error_is_one_line_and_status_1(capsys, tmp_path) -> None:
    assert main(["finetune", "--model", "resnet19", "--out", str(tmp_path / "x"), *SMALL]) == 1
    text = capsys.readouterr().err
    assert "unknown model 'resnet19'" in text and "Traceback" not in text
    with pytest.raises(ValueError, match="unknown model"):
        main(["finetune", "--model", "resnet19", "--out", str(tmp_path / "x"), "--traceback", *SMALL])


def test_the_verbs_from_teacher_to_report(tmp_path, capsys) -> None:
    teacher, student, page = (str(tmp_path / name) for name in ("teacher", "student", "page.html"))
    assert main(["finetune", "--model", "test_vit", "--out", teacher, *SMALL]) == 0
    assert main(["distill", "--teacher", teacher, "--student", "test_resnet", "--out", student, *SMALL]) == 0
    assert main(["evaluate", "--model", student, "--knn", "5", "--no-progress"]) == 0
    out = capsys.readouterr().out
    assert "top1" in out and "cka" in out and student in out
    assert main(["report", student, "--out", page, "--batch-sizes", "1"]) == 0
    assert (tmp_path / "page.html").is_file() and (tmp_path / "page.json").is_file()


def test_recipes_are_listed_and_set_defaults(tmp_path, capsys) -> None:
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in recipe_names())
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("verb: finetune\nmodel: test_resnet\nepochs: 3\nlr: 0.5\n", encoding="utf-8")
    # the command line wins over the recipe: one epoch, not three
    assert main(["finetune", "--recipe", str(recipe), "--out", str(tmp_path / "run"), *SMALL]) == 0
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "epochs: 1\n" in saved and "model: test_resnet" in saved
    assert main(["distill", "--recipe", str(recipe), "--out", str(tmp_path / "run2"), *SMALL]) == 1
    assert "is for `xdfast finetune`" in capsys.readouterr().err


def test_a_recipe_that_is_not_there_offers_the_nearest(capsys, tmp_path) -> None:
    assert main(["distill", "--recipe", "rsd-cifar-cn", "--out", str(tmp_path / "x"), *SMALL]) == 1
    assert "rsd-cifar-cnn" in capsys.readouterr().err


def test_doctor_runs(capsys) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "rsd_loss" in text


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_valid_config(name) -> None:
    recipe = load_recipe(name)
    verb, values = recipe.verb, recipe.settings
    assert recipe.about
    if verb == "suite":
        SuiteConfig.from_dict({"out": "o", "encoders": {"scratch": "resnet18"}, **values}, source=name).validate()
        return
    if verb == "compare":
        CompareConfig.from_dict({"data": "d", "out": "o", **values}, source=name).validate()
        return
    assert verb in ("distill", "finetune")
    if "tasks" in values:
        VLAConfig.from_dict({"out": "o", **values}, source=name).validate()
        return
    if "target_flops" in values:
        ActDistillConfig.from_dict({"teacher": "t", "out": "o", **values}, source=name).validate()
        return
    if verb == "finetune":  # of a policy
        PolicyConfig.from_dict({"task": "drawer-open", "out": "o", **values}, source=name).validate()
        return
    config = DistillConfig.from_dict({"teacher": "t", "student": "s", "data": "d", "out": "o", **values}, source=name)
    config.validate()
    augment_preset(config.augment, num_classes=10)
    if "@" not in config.teacher and config.teacher != "t":
        assert timm.is_model(config.teacher.split(".")[0]) and timm.is_model(config.student)


def test_a_group_norm_recipe_makes_a_student_without_batch_norm() -> None:
    values = load_recipe("xdistill-imagenet-gn").settings
    student = timm.create_model(values["student"], **values["student_options"])
    assert not any("BatchNorm" in type(part).__name__ for part in student.modules())


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`xdfast --help | head -1`."""
    code = "import sys; from xdfast.cli import main; sys.exit(main(['recipes', '--json']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(120) == 1 and "Traceback" not in error and "BrokenPipe" not in error
