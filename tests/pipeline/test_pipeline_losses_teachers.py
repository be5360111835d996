"""Several teachers: each in its own size, with its own weight, projectors and memory; live, from caches, and continued."""

from __future__ import annotations

import signal

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

import xdfast
from xdfast.cli import parse_config
from xdfast.data.store import TeacherStore
from xdfast.models import create_model
from xdfast.pipeline.config import DistillConfig
from xdfast.pipeline.distill import build_task
from xdfast.pipeline.teachers import Teachers

SETTINGS = {
    "teacher": ["test_vit", "test_resnet"],
    "teacher_size": [32, 64],
    "teacher_weights": (0.75, 0.5),
    "teacher_pretrained": False,
    "teacher_options": {"num_classes": 10},
    "student": "test_resnet",
    "student_size": 32,
    "student_options": {"drop_rate": 0.2},
    "loss": "dkd+rsd:0.01+crd+mse",
    "taps": {"layer2": "1:blocks.1,2:layer3"},
    "data": "sklearn:digits",
    "labels_per_class": 3,
    "epochs": 2,
    "batch_size": 10,
    "augment": "small",
    "optimizer": "adamw",
    "lr": 1e-3,
    "log_every": 1,
    "workers": 0,
    "progress": False,
    "device": "cpu",
}


class Digits(torch.utils.data.Dataset):
    """30 pictures; asks its own process to stop at the picture with this number in the order of reading in training."""

    classes = tuple("0123456789")

    def __init__(self, stop_at: int | None = None) -> None:
        digits = load_digits()
        self.images, self.targets = digits.images[:30], digits.target[:30].tolist()
        self.read, self.stop_at = 0, stop_at

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        self.read += callable(signal.getsignal(signal.SIGTERM))  # the training loop listens: it has begun
        if self.read == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        picture = torch.tensor(self.images[index] / 16, dtype=torch.float32)
        return torch.nn.functional.interpolate(picture[None, None], size=32)[0].repeat(3, 1, 1), self.targets[index]


def weights(run) -> dict:
    return {**load_file(run.path / "student" / "model.safetensors"), **load_file(run.path / "projectors.safetensors")}


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    return xdfast.distill(**SETTINGS, out=str(tmp_path_factory.mktemp("live") / "run"))


def test_each_teacher_has_its_terms_projectors_and_memory(live) -> None:
    row = next(row for row in live.history if row["kind"] == "train")
    terms = {f"{name}_t{n}" for name in ("dkd", "rsd", "crd", "mse", "rsd_at_layer2", "mse_at_layer2") for n in (1, 2)}
    assert terms <= {key.removeprefix("loss_") for key in row}
    assert row["loss"] == pytest.approx(row["loss_ce"] + sum(row[f"loss_{term}"] for term in terms), rel=1e-4)
    saved = load_file(live.path / "projectors.safetensors")
    assert {name.partition(".")[0] for name in saved} == {term for term in terms if not term.startswith("dkd")}
    state = torch.load(live.path / "resume.pt", weights_only=True)
    banks = [state["task"][f"losses.crd_t{n}.teacher_bank"] for n in (1, 2)]
    assert not torch.equal(*banks)
    assert len(state["identity"]["teacher"]) == 2
    assert live.config["teacher"] == "test_vit" and live.config["more_teachers"] == ["test_resnet"]
    assert live.config["teacher_size"] == 32 and live.config["more_teacher_sizes"] == [64]


def test_the_same_from_caches_that_both_fill(live, tmp_path) -> None:
    cached = {"cache": str(tmp_path / "stores"), "cache_views": 1, "cache_dtype": "float32"}
    first = xdfast.distill(**SETTINGS, **cached, out=str(tmp_path / "first"))
    stores = [TeacherStore.load(tmp_path / "stores" / f"teacher-{n}") for n in (1, 2)]
    assert all(store.complete for store in stores)
    assert [set(store.layout.outputs) for store in stores] == [
        {"features", "logits", "tap:blocks.1"}, {"features", "logits", "tap:layer3"}
    ]  # fmt: skip
    assert [store.facts["input"]["size"] for store in stores] == [32, 64]
    for store in stores:
        store.close()
    again = xdfast.distill(**SETTINGS, **cached, out=str(tmp_path / "again"))  # nothing is computed any more
    a, b = weights(first), weights(again)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("stop_at", [25, 48])
def test_interrupted_and_continued_equals_unbroken(stop_at, tmp_path) -> None:
    settings = {k: v for k, v in SETTINGS.items() if k not in ("data", "labels_per_class")}
    settings |= {"checkpoint_seconds": 0.0, "val_fraction": 0.3}
    unbroken = xdfast.distill(**settings, data=Digits(), val_data=Digits(), out=str(tmp_path / "unbroken"))
    broken = {**settings, "val_data": Digits(), "out": str(tmp_path / "broken")}
    with pytest.raises(SystemExit):
        xdfast.distill(**broken, data=Digits(stop_at))
    state = torch.load(tmp_path / "broken" / "resume.pt", weights_only=True)["state"]
    assert 0 < state["step"] < 6
    continued = xdfast.distill(**broken, data=Digits())
    a, b = weights(unbroken), weights(continued)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_loss_is_the_weighted_sum_over_teachers() -> None:
    config = DistillConfig.from_dict({**SETTINGS, "loss": "kd+mse", "taps": {}, "ce_weight": 0.0, "out": "o"})
    nets = [
        create_model(name, num_classes=10, image_size=size, frozen=True, pretrained=False)
        for name, size in (("test_vit", 32), ("test_resnet", 64))
    ]
    student = create_model("test_resnet", num_classes=10, image_size=32, pretrained=False)
    task = build_task(config, student, nets, 10).eval()
    assert isinstance(task.teacher, Teachers)
    images = torch.rand(5, 3, 32, 32)
    taught = task.teacher.targets(images, None)
    assert set(taught) == {"features", "logits", "2:features", "2:logits"}
    torch.testing.assert_close(
        taught["2:features"], nets[1](images).features
    )  # at its own size, with its own mean and std
    value = task(images, torch.arange(5), **{f"teacher_{kind}": x for kind, x in taught.items()})["loss"]
    output, expected = student(images), 0.0
    for n, (net, weight) in enumerate(zip(nets, (0.75, 0.5), strict=True), 1):
        told = net(images)
        kd = xdfast.KDLoss()(output.logits, told.logits)
        mse = torch.nn.functional.mse_loss(task.projectors[f"mse_t{n}"](output.features), told.features)
        expected = expected + weight * (kd + mse)
    torch.testing.assert_close(value, expected)


def test_two_teachers_on_the_command_line_and_in_a_recipe(tmp_path) -> None:
    flags = ["--student", "b", "--data", "c", "--out", "d"]
    made = parse_config(
        DistillConfig, ["--teacher", "x", "--teacher-size", "64", *flags, "--teacher=y", "--teacher", "z"], "distill"
    )
    made.validate()
    assert (made.teacher, made.more_teachers, made.teacher_size) == ("x", ("y", "z"), 64)
    made = parse_config(
        DistillConfig,
        ["--teacher", "x", "--teacher", "y", "--teacher-size", "64", "--teacher-size", "32", *flags],
        "distill",
    )
    assert (made.teacher_size, made.more_teacher_sizes) == (64, (32,))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("teacher: [p, q]\nteacher_weights: [1.0, 0.5]\n", encoding="utf-8")
    made = parse_config(DistillConfig, [f"--recipe={recipe}", *flags], "distill")
    made.validate()
    assert (made.teacher, made.more_teachers, made.teacher_weights) == ("p", ("q",), (1.0, 0.5))
    made = parse_config(DistillConfig, [f"--recipe={recipe}", "--teacher", "x", *flags], "distill")
    assert (made.teacher, made.more_teachers) == ("x", ())
    with pytest.raises(ValueError, match="teacher must be one value or a list"):
        DistillConfig.from_dict({"teacher": [], "student": "s", "data": "d", "out": "o"})


def test_taps_name_the_teacher_they_belong_to(tmp_path) -> None:
    for taps in ({"layer2": "blocks.1"}, {"layer2": "3:blocks.1"}):
        with pytest.raises(ValueError, match=r"with 2 teachers layer2 needs a teacher's number before each module"):
            xdfast.distill(**{**SETTINGS, "taps": taps}, out=str(tmp_path / "x"))


def test_another_second_teacher_is_another_run(live) -> None:
    with pytest.raises(ValueError, match="holds a run with other settings .*more_teachers"):
        xdfast.distill(**{**SETTINGS, "teacher": ["test_vit", "test_vit2"]}, out=str(live.path))
