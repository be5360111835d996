"""One definition for Python, YAML and the command line; bad values are named before any work."""

from __future__ import annotations

import pytest
import yaml

from xdfast.cli import parse_config
from xdfast.pipeline import ActDistillConfig, DistillConfig, EvaluateConfig, FinetuneConfig, PolicyConfig, VLAConfig
from xdfast.recipes import load_recipe, recipe_names

BASE = {"teacher": "a", "student": "b", "data": "c", "out": "d"}
FLAGS = ["--teacher", "a", "--student", "b", "--data", "c", "--out", "d"]


def test_the_command_line_gives_the_same_config_as_python() -> None:
    flags = [
        *FLAGS,
        "--epochs",
        "3",
        "--loss",
        "kd",
        "--lr",
        "0.2",
        "--ema",
        "0.99",
        "--labels-per-class",
        "4",
        "--tensorboard",
    ]
    expected = DistillConfig(**BASE, epochs=3, loss="kd", lr=0.2, ema=0.99, labels_per_class=4, tensorboard=True)
    assert parse_config(DistillConfig, flags, "distill") == expected


def test_yaml_round_trip(tmp_path) -> None:
    config = FinetuneConfig(model="m", data="c", out="d", epochs=7, student_options={"drop_path_rate": 0.1})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert parse_config(FinetuneConfig, ["--recipe", str(path)], "finetune") == config
    assert parse_config(FinetuneConfig, [f"--recipe={path}", "--epochs", "9"], "finetune").epochs == 9


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith(("suite-", "compare-"))])
def test_every_shipped_recipe_makes_a_valid_config(name) -> None:
    recipe = load_recipe(name)
    values = recipe.settings
    if "tasks" in values:
        config = parse_config(VLAConfig, ["--recipe", name, "--out", "o"], "finetune")
        assert config.steps == values["steps"] and list(config.tasks) == values["tasks"]
    elif "target_flops" in values:
        config = parse_config(ActDistillConfig, ["--recipe", name, "--teacher", "t", "--out", "o"], "distill")
        assert config.steps == values["steps"] and config.target_flops == values["target_flops"]
    elif recipe.verb == "finetune":  # of a policy
        flags = ["--recipe", name, "--task", "drawer-open", "--out", "o"]
        config = parse_config(PolicyConfig, flags, "finetune")
        assert config.steps == values["steps"] and config.unet_widths == tuple(values["unet_widths"])
    else:
        config = parse_config(DistillConfig, ["--recipe", name, *FLAGS], "distill")
        assert config.epochs == values["epochs"]
    config.validate()
    assert config.lr == values["lr"]


def test_a_recipe_for_another_verb_and_an_unknown_one() -> None:
    with pytest.raises(ValueError, match="is for `xdfast distill`, not `xdfast finetune`"):
        parse_config(FinetuneConfig, ["--recipe", "rsd-cifar-cnn"], "finetune")
    with pytest.raises(FileNotFoundError, match="unknown recipe 'rsd-cifar'.*Did you mean"):
        parse_config(DistillConfig, ["--recipe", "rsd-cifar"], "distill")


def test_unknown_and_missing_settings() -> None:
    with pytest.raises(ValueError, match="DistillConfig has no setting 'epoch'.*Did you mean 'epochs'"):
        DistillConfig.from_dict({**BASE, "epoch": 3})
    with pytest.raises(ValueError, match="DistillConfig needs data, student"):
        DistillConfig.from_dict({"teacher": "a", "out": "d"})


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("kappa", -0.1, "kappa must be ≥ 0, got -0.1"),
        ("epochs", 0, "epochs must be > 0, got 0"),
        ("batch_size", 0, "batch_size must be > 0, got 0"),
        ("lr", -1.0, "lr must be > 0"),
        ("loss", "rds", "unknown 'rds'.*Did you mean 'rsd'"),
        ("schedule", "cosin", "schedule must be one of .*Did you mean 'cosine'"),
        ("amp", "half", "amp must be one of"),
        ("ema", 1.5, "ema must be a decay between 0 and 1"),
        ("warmup_epochs", 100, r"warmup_epochs \(100\) must be below epochs \(100\)"),
        ("label_smoothing", 1.0, r"label_smoothing must be in \[0, 1\)"),
        ("label_loss", "bse", "label_loss must be one of ce, bce, got 'bse'. Did you mean 'bce'"),
        ("crop_pct", 1.2, r"crop_pct must be in \(0, 1\], got 1.2"),
        ("aug_repeats", 0, "aug_repeats must be > 0, got 0"),
        ("workers", -1, "workers must be 'auto' or an integer"),
        ("val_fraction", 0.0, "val_fraction must be between 0 and 1"),
        ("temperature", 0.0, "temperature must be > 0"),
        ("random_erase", 2.0, "random_erase must be a probability"),
        ("teacher_precision", "int8", "teacher_precision must be"),
    ],
)
def test_bad_values_are_named(setting, value, message) -> None:
    config = DistillConfig(**{**BASE, setting: value})
    with pytest.raises(ValueError, match=message):
        config.validate()


def test_repeated_augmentation_goes_with_neither_exact_tails_nor_fixed_views() -> None:
    for other, message in (
        ({"tail": "exact"}, "tail='exact' shows"),
        ({"cache": "auto"}, "cache='auto' keeps fixed views"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillConfig(**{**BASE, "aug_repeats": 3, **other}).validate()
    DistillConfig(**{**BASE, "aug_repeats": 3}).validate()


def test_evaluate_needs_data() -> None:
    config = EvaluateConfig(model="resnet18", knn=-1, data="x")
    with pytest.raises(ValueError, match="knn must be ≥ 0"):
        config.validate()
