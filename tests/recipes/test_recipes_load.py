"""Recipes that extend others: what is merged, what stays a recipe's own, and every way to get it wrong."""

from __future__ import annotations

import pytest
import yaml

from xdfast.cli import main, parse_config
from xdfast.pipeline import DistillConfig, FinetuneConfig
from xdfast.pipeline.suite import SuiteConfig
from xdfast.recipes import load_recipe, recipe_names, recipe_path


def write(folder, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def test_settings_are_merged_and_facts_stay_a_recipes_own(tmp_path) -> None:
    write(
        tmp_path,
        base="verb: distill\nabout: base\nneeds: {data: /d, teacher: t}\npublished: {metric: top1, value: 80, source: s}\n"
        "lr: 0.1\nepochs: 3\nstudent_options: {drop_rate: 0.1, norm: {eps: 1}}\ntaps: {a: b}\n",
        middle="extends: base.yaml\nlr: 0.2\nstudent_options: {norm: {momentum: 2}}\n",
        top="extends: middle.yaml\nabout: top\nteacher: x\nstudent_options: {drop_rate: 0.3}\ntaps: null\n",
    )
    recipe = load_recipe(str(tmp_path / "top.yaml"))
    assert recipe.settings == {
        "lr": 0.2,
        "epochs": 3,
        "student_options": {"drop_rate": 0.3, "norm": {"eps": 1, "momentum": 2}},
        "taps": None,
        "teacher": "x",
    }
    assert (recipe.verb, recipe.about, recipe.extends) == ("distill", "top", ("middle.yaml", "base.yaml"))
    assert recipe.needs == {"data": "/d"}  # the teacher is set
    assert recipe.published is None  # of the recipe below it
    assert load_recipe(str(tmp_path / "base.yaml")).published["value"] == 80
    assert recipe.command == f"xdfast distill --recipe {tmp_path}/top.yaml --data /d --out runs/top"


def test_a_file_of_yours_extends_a_shipped_recipe(tmp_path) -> None:
    write(tmp_path, mine="extends: rsd-cifar-cnn\nepochs: 7\nstudent: resnet18\n")
    flags = ["--recipe", str(tmp_path / "mine.yaml"), "--teacher", "t", "--data", "d", "--out", "o"]
    config = parse_config(DistillConfig, flags, "distill")
    assert (config.epochs, config.student, config.lr, config.augment) == (7, "resnet18", 0.05, "cifar-cnn")
    assert parse_config(DistillConfig, [*flags, "--epochs", "9"], "distill").epochs == 9
    with pytest.raises(ValueError, match="is for `xdfast distill`, not `xdfast finetune`"):
        parse_config(FinetuneConfig, ["--recipe", str(tmp_path / "mine.yaml")], "finetune")


def test_a_suite_takes_a_policy_that_extends(tmp_path) -> None:
    from xdfast.pipeline.suite import _jobs

    write(tmp_path, mine="extends: policy-metaworld\nsteps: 321\n")
    policy = str(tmp_path / "mine.yaml")
    suite = SuiteConfig(tasks="drawer-open", encoders={"s": "resnet18"}, out="o", policy=policy, seeds=1)
    suite.validate()
    (job,) = _jobs(suite)
    assert (job.config.steps, job.config.unet_widths) == (321, (64, 128))


@pytest.mark.parametrize("verb_first", [True, False])
def test_the_verb_is_the_same_all_along(tmp_path, verb_first: bool) -> None:
    write(tmp_path, mine=f"{'verb: finetune' if verb_first else 'verb: suite'}\nextends: rsd-cifar-cnn\n")
    with pytest.raises(ValueError, match="but extends 'rsd-cifar-cnn', which is for `xdfast distill`"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_a_circle_is_named(tmp_path) -> None:
    write(tmp_path, a="extends: b.yaml\n", b="extends: c.yaml\n", c="extends: a.yaml\n", own="extends: own.yaml\n")
    with pytest.raises(ValueError, match=r"a.yaml' extends 'b.yaml' extends 'c.yaml' extends 'a.yaml': a circle"):
        load_recipe(str(tmp_path / "a.yaml"))
    with pytest.raises(ValueError, match=r"own.yaml' extends 'own.yaml': a circle"):
        load_recipe(str(tmp_path / "own.yaml"))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "extends: rsd-cifar-cn",
            FileNotFoundError,
            "extends what is not there: unknown recipe.*Did you mean 'rsd-cifar-cnn'",
        ),
        ("extends: missing.yaml", FileNotFoundError, "extends what is not there: no recipe file .*missing.yaml"),
        ("extends: [a, b]", ValueError, "extends must be like `extends: rsd-cifar-cnn`, got \\['a', 'b'\\]"),
        ("extends:", ValueError, "extends must be like .*, got None"),
        ("verb: 3", ValueError, "verb must be like `verb: distill`, got 3"),
        ("needs: data", ValueError, "needs must be like"),
        ("published: 83.92", ValueError, "published must be like .*, got 83.92"),
        ("published: {metric: top1}", ValueError, "published needs metric, value and source, got metric"),
        ("- lr: 3", ValueError, "must hold `setting: value` lines, got list"),
        ("a: [", ValueError, "is not valid YAML"),
        ("", ValueError, "must hold `setting: value` lines, got NoneType"),
    ],
)
def test_bad_recipes_are_named(tmp_path, text: str, error: type, message: str) -> None:
    write(tmp_path, mine=text)
    with pytest.raises(error, match=message):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_bytes_that_are_no_text(tmp_path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"lr: \xff\xfe")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_an_unknown_setting_of_an_extended_recipe_offers_the_nearest(tmp_path, capsys) -> None:
    write(tmp_path, mine="extends: rsd-cifar-cnn\nepoch: 7\n")
    flags = ["--recipe", str(tmp_path / "mine.yaml"), "--teacher", "t", "--student", "s", "--data", "d", "--out", "o"]
    assert main(["distill", *flags]) == 1
    assert "has no setting 'epoch'. Did you mean 'epochs'" in capsys.readouterr().err


def test_shipped_recipes_say_no_setting_twice() -> None:
    """What a recipe repeats of the one it extends would stay behind when that one changes."""
    for name in recipe_names():
        own = yaml.safe_load(recipe_path(name).read_text(encoding="utf-8"))
        if "extends" in own:
            base = load_recipe(own["extends"]).settings
            assert not [key for key, value in own.items() if key in base and base[key] == value], name
