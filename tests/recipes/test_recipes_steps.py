"""Two real training steps of every recipe that trains, on a handful of generated pictures and random weights.

What is quick has small pictures; the sweep (``slow``) has every recipe at its own sizes. Given otherwise than in a recipe are only
data, batch, epochs or steps with their warm-up, random weights and what the machine decides.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import policy_parts
import pytest
import timm
import torch
import vla_parts
from PIL import Image
from recipe_parts import config_of, distillations
from vla_runs import write_teacher

import xdfast
from xdfast.models import create_model
from xdfast.recipes import load_recipe, recipe_names

pytestmark = pytest.mark.usefixtures("one_thread")

#: Of any training: two steps of two samples.
TWO_STEPS = {"batch_size": 2, "log_every": 1, "device": "cpu", "progress": False}
IMAGES = {**TWO_STEPS, "epochs": 1, "warmup_epochs": 0, "workers": 0, "labels_per_class": 2, "decoder": "pillow"}
#: Sizes of the quick part; steps of DINOv2 are multiples of 14.
QUICK = {
    "rsd-cifar100-vit-s-resnet18": {"teacher_size": 32, "student_size": 32, "image_size": 32},
    "rsd-imagenet-resnet50-deit-t": {"teacher_size": 32, "student_size": 32},
    "rsd-imagenet-convnext-t-swin-n": {"teacher_size": 64, "student_size": 64},
    "rsd-imagenet-stronger": {"teacher": "test_vit", "teacher_size": 32, "student": "resnet18", "student_size": 32},
    "xdistill-imagenet-small": {"teacher_size": 28, "student_size": 32, "image_size": 32},
}


def write_pictures(folder: Path, size: int) -> str:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in ("one", "two"):
            for number in range(2):
                file = folder / part / label / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file)
    return str(folder)


def losses(run: xdfast.RunResult) -> list[float]:
    return [row["loss"] for row in run.history if row["kind"] == "train"]


def check(run: xdfast.RunResult) -> None:
    found = losses(run)
    assert len(found) == 2 and all(np.isfinite(found)), found


def distil(name: str, tmp_path: Path, teacher: Any = None, size: int = 40, **others: Any) -> xdfast.RunResult:
    settings = {k: v for k, v in config_of(name).to_dict().items() if k in load_recipe(name).settings}
    settings |= {"student": config_of(name).student, "teacher": config_of(name).teacher, "teacher_pretrained": False}
    settings |= {**IMAGES, **others, "out": str(tmp_path / "run"), "data": write_pictures(tmp_path / "pictures", size)}
    settings.pop("val_data", None)
    if teacher is not None:
        settings["teacher"] = teacher
    if settings.get("cache") == "auto":
        settings["cache"] = str(tmp_path / "cache")
    return xdfast.distill(**settings)


@pytest.mark.parametrize("name", list(QUICK))
def test_two_steps_of_a_distillation(name: str, tmp_path) -> None:
    run = distil(name, tmp_path, **QUICK[name])
    check(run)
    saved = timm.create_model(f"local-dir:{run.path / 'student'}", pretrained=True)
    size = QUICK[name]["student_size"]
    assert torch.isfinite(saved.eval()(torch.rand(1, 3, size, size))).all()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", distillations())
def test_two_steps_of_every_distillation(name: str, tmp_path) -> None:
    config = config_of(name)
    check(distil(name, tmp_path, teacher_of(config.teacher, config.teacher_size), size=64))


@functools.cache
def teacher_of(architecture: str, size: int | None) -> torch.nn.Module:
    """Built once for all recipes that have it."""
    return create_model(architecture, pretrained=False, image_size=size)


def policies() -> list[str]:
    return [name for name in recipe_names() if "unet_widths" in load_recipe(name).settings]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n == "policy-metaworld" else [pytest.mark.slow, pytest.mark.timeout(1800)])
        for n in policies()
    ],
)
def test_two_steps_of_a_policy(name: str, tmp_path, monkeypatch) -> None:
    settings = load_recipe(name).settings
    monkeypatch.setattr(policy_parts, "SIZE", settings["image_size"])
    demos = policy_parts.write_demos(tmp_path / "demos", episodes=2)
    given = {**settings, **TWO_STEPS, "steps": 2, "warmup_steps": 0, "model_pretrained": False, "episodes": 0}
    given |= {"task": "my-robot", "demos": str(demos), "evaluate_every": None, "out": str(tmp_path / "run")}
    run = xdfast.finetune(**given)
    check(run)
    assert run.policy.spec.horizon == settings["horizon"]


@pytest.mark.parametrize("recipe", ["vla-metaworld", pytest.param("vla-metaworld-words", marks=pytest.mark.slow)])
def test_two_steps_of_a_vla(recipe, tmp_path, monkeypatch) -> None:
    settings = load_recipe(recipe).settings
    monkeypatch.setattr(vla_parts, "SIZE", settings["image_size"])
    demos = vla_parts.task_folders(tmp_path / "demos")
    given = {**settings, **TWO_STEPS, "steps": 2, "warmup_steps": 0, "demos": demos, "out": str(tmp_path / "run")}
    run = xdfast.finetune(**{**given, "tasks": ["drawer-open", "drawer-close"]})
    check(run)
    assert run.policy.num_layers == settings["layers"]


ACTDISTILL = ["actdistill-metaworld", "actdistill-metaworld-experts", "actdistill-metaworld-words"]


@pytest.mark.parametrize("recipe", [*ACTDISTILL[:2], pytest.param(ACTDISTILL[2], marks=pytest.mark.slow)])
def test_two_steps_of_actdistill(recipe, tmp_path) -> None:
    teacher = write_teacher(tmp_path / "vla")
    demos = vla_parts.task_folders(tmp_path / "demos")
    given = {**load_recipe(recipe).settings, **TWO_STEPS, "steps": 2, "warmup_steps": 0}
    given |= {"heads_steps": 2, "views": 1, "demos": demos, "out": str(tmp_path / "half")}
    check(xdfast.distill(teacher=teacher, **given))


def test_every_recipe_that_trains_is_among_them() -> None:
    trained = {*distillations(), *policies(), "vla-metaworld", "vla-metaworld-words", *ACTDISTILL}
    others = [load_recipe(name) for name in recipe_names() if name not in trained]
    assert {recipe.verb for recipe in others} <= {"suite", "compare"}
