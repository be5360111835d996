"""Every distillation recipe builds its teacher and student by name, of the right classes, with a projector that fits; on torch's
meta device, which costs nothing."""

from __future__ import annotations

import pytest
import timm
import torch
from recipe_parts import config_of, distillations
from timm.models import ConvNeXt, EfficientNet, MlpMixer, ResNet, SwinTransformer, VisionTransformer

from xdfast.models import create_model, save_student
from xdfast.pipeline import DistillConfig
from xdfast.pipeline.distill import build_task
from xdfast.pipeline.terms import taps_of
from xdfast.recipes import load_recipe, recipe_names

#: Names in recipes → class, features, millions of parameters with 1000 classes (a teacher's and a student's alike).
MODELS = {
    "resnet18": (ResNet, 512, 11.7),
    "mobilenetv2": (EfficientNet, 1280, 3.5),
    "resnet50": (ResNet, 2048, 25.6),
    "convnext-t": (ConvNeXt, 768, 28.6),
    "deit-t": (VisionTransformer, 192, 5.7),
    "vit-s": (VisionTransformer, 384, 22.1),
    "swin-t": (SwinTransformer, 768, 28.3),
    "swin-n": (SwinTransformer, 512, 9.6),
    "swin-p": (SwinTransformer, 384, 5.5),
    "mixer-b": (MlpMixer, 768, 59.9),
    "resmlp-s12": (MlpMixer, 384, 15.4),
}

CIFAR = [(t, s) for t in ("swin-t", "vit-s", "mixer-b") for s in ("resnet18", "mobilenetv2")]
CIFAR += [(t, s) for t in ("convnext-t", "mixer-b") for s in ("deit-t", "swin-p")]
CIFAR += [(t, "resmlp-s12") for t in ("convnext-t", "swin-t")]
IMAGENET = [(t, s) for t in ("deit-t", "swin-t", "mixer-b") for s in ("resnet18", "mobilenetv2")]
IMAGENET += [(t, s) for t in ("resnet50", "convnext-t", "mixer-b") for s in ("deit-t", "swin-n")]
IMAGENET += [(t, "resmlp-s12") for t in ("resnet50", "convnext-t", "swin-t")]


def on_meta(name: str, classes: int) -> tuple[DistillConfig, torch.nn.Module, torch.nn.Module]:
    config = config_of(name)
    taps = taps_of(config)[0]
    with torch.device("meta"):
        teacher = create_model(
            config.teacher, pretrained=False, image_size=config.teacher_size, frozen=True, options=config.teacher_options,
            taps=tuple(taps.values()), device="meta",
        )  # fmt: skip
        student = create_model(
            config.student, num_classes=classes, image_size=config.student_size, options=config.student_options,
            taps=tuple(taps), device="meta",
        )  # fmt: skip
    return config, teacher, student


def test_the_pairs_are_the_papers() -> None:
    assert (len(set(CIFAR)), len(set(IMAGENET))) == (12, 15)
    shipped = [name for name in recipe_names() if load_recipe(name).extends and name.startswith("rsd-")]
    wanted = [f"rsd-cifar100-{t}-{s}" for t, s in CIFAR] + [f"rsd-imagenet-{t}-{s}" for t, s in IMAGENET]
    assert sorted(shipped) == sorted(wanted)


@pytest.mark.parametrize("name", distillations())
def test_models_are_built_and_the_projector_fits(name: str) -> None:
    classes = 100 if "cifar100" in name else 10 if "cifar" in name else 1000
    config, teacher, student = on_meta(name, classes)
    with torch.device("meta"):
        task = build_task(config, student, teacher, classes)
        features = student(torch.empty(2, 3, student.image_size, student.image_size, device="meta")).features
        assert features.shape == (2, student.num_features)
        for key, projector in task.projectors.items():
            if key in ("rsd", "mse"):
                assert projector(features).shape == (2, teacher.num_features)
    assert student.num_classes == classes and task.projectors
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("name", "teacher", "student"),
    [(f"rsd-cifar100-{t}-{s}", t, s) for t, s in CIFAR] + [(f"rsd-imagenet-{t}-{s}", t, s) for t, s in IMAGENET],
)
def test_a_pair_is_what_its_name_says(name: str, teacher: str, student: str) -> None:
    _, *nets = on_meta(name, 1000)
    for key, net in zip((teacher, student), nets, strict=True):
        kind, features, millions = MODELS[key]
        assert type(net.net) is kind and net.num_features == features
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    recipe = load_recipe(name)
    conv = student in ("resnet18", "mobilenetv2")
    assert recipe.extends == (f"rsd-{'cifar' if 'cifar' in name else 'imagenet'}-{'cnn' if conv else 'vit'}",)
    assert recipe.settings["optimizer"] == ("sgd" if conv else "adamw")


def test_plain_timm_loads_a_saved_swin_nano(tmp_path) -> None:
    config = config_of("rsd-imagenet-convnext-t-swin-n")
    student = create_model(config.student, num_classes=7, options=config.student_options)
    again = timm.create_model(f"local-dir:{save_student(student, tmp_path)}", pretrained=True)
    state = student.net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert again.num_classes == 7 and [len(stage.blocks) for stage in again.layers] == [2, 2, 2, 2]


def test_the_published_swin_teacher_is_read(tmp_path) -> None:
    """Files of timm 0.6, which the public code used: "head" is "head.fc" now, and stages begin with what ended the one before."""
    import re

    net = timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1), num_heads=(1, 2), num_classes=5
    )
    old = {
        re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", k).replace(
            "head.fc", "head"
        ): v
        for k, v in net.state_dict().items()
    }
    torch.save({"state_dict": old}, tmp_path / "swin.pth")
    read = create_model(
        f"swin_tiny_patch4_window7_224@{tmp_path / 'swin.pth'}",
        options={"embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2)},
        frozen=True,
    )
    assert read.num_classes == 5
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in read.net.state_dict().items())
