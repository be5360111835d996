"""distill, finetune, evaluate and report on real scanned digits: what they write, and that it can be used elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn

import xdfast
from xdfast.pipeline import load_run

SMALL = {
    "data": "sklearn:digits",
    "labels_per_class": 8,
    "student_size": 32,
    "epochs": 2,
    "batch_size": 20,
    "augment": "small",
    "optimizer": "adamw",
    "lr": 2e-3,
    "progress": False,
    "workers": 0,
    "log_every": 2,
}
TEACHER = {"student_options": {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> xdfast.pipeline.RunResult:
    out = str(tmp_path_factory.mktemp("teacher") / "run")
    settings = {**SMALL, **TEACHER, "labels_per_class": None, "epochs": 10, "batch_size": 64, "augment": "none"}
    return xdfast.finetune("vit_tiny_patch16_224", out=out, **settings)


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory) -> xdfast.pipeline.RunResult:
    out = str(tmp_path_factory.mktemp("student") / "run")
    return xdfast.distill(teacher=str(teacher.path), student="test_resnet", loss="rsd", out=out, **SMALL)


def test_a_run_learns_and_writes_what_it_says(teacher) -> None:
    rows = teacher.history
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    assert teacher.metrics["top1"] > 0.5  # ten classes: chance is 0.1
    assert {p.name for p in teacher.path.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "resume.pt",
        "student",
        "summary.json",
    }
    assert [row["kind"] for row in rows].count("val") == 10
    assert {"loss", "loss_ce", "lr", "images_per_s", "time", "epoch", "step"} <= set(rows[0])


def test_distill_logs_its_terms_and_pulls_the_diagonal_up(student) -> None:
    rows = [row for row in student.history if row["kind"] == "train"]
    assert {"loss_ce", "loss_rsd", "loss_rsd_diagonal"} <= set(rows[0])
    assert rows[-1]["loss_rsd_diagonal"] > rows[0]["loss_rsd_diagonal"]


def test_the_student_loads_in_plain_timm(student) -> None:
    plain = timm.create_model(f"local-dir:{student.path / 'student'}", pretrained=True).eval()
    other = timm.create_model(
        "test_resnet", num_classes=10, checkpoint_path=str(student.path / "student" / "model.safetensors")
    ).eval()
    x = torch.rand(2, 3, 32, 32)
    prepared = student.student.prepare(x)
    expected = student.student.net(prepared)
    torch.testing.assert_close(plain(prepared), expected, rtol=0, atol=0)
    torch.testing.assert_close(other(prepared), expected, rtol=0, atol=0)
    assert not any("projector" in key or "aad" in key.lower() for key in plain.state_dict())


def test_projector_and_optimiser_are_in_the_resume_file(student) -> None:
    saved = torch.load(student.path / "resume.pt", weights_only=True)
    assert any(key.startswith("projectors.rsd") for key in saved["task"])
    assert saved["optimizer"]["state"]
    assert saved["identity"]["world_size"] == 1


def test_a_finished_run_is_returned_not_repeated(student, teacher) -> None:
    before = (student.path / "summary.json").stat().st_mtime_ns
    again = xdfast.distill(teacher=str(teacher.path), student="test_resnet", loss="rsd", out=str(student.path), **SMALL)
    assert again.metrics == student.metrics
    assert (student.path / "summary.json").stat().st_mtime_ns == before


def test_the_folder_of_another_config_is_refused_and_overwritten_on_request(student, tmp_path) -> None:
    settings = {**SMALL, "epochs": 1}
    xdfast.finetune("test_resnet", out=str(tmp_path / "a"), **settings)
    with pytest.raises(ValueError, match=r"other settings \(lr: 0.002 there, 0.01 asked for\).*overwrite"):
        xdfast.finetune("test_resnet", out=str(tmp_path / "a"), **{**settings, "lr": 0.01})
    run = xdfast.finetune("test_resnet", out=str(tmp_path / "a"), **{**settings, "lr": 0.01}, overwrite=True)
    assert run.config["lr"] == 0.01
    with pytest.raises(ValueError, match="kind: 'finetune' there, 'distill' asked for"):
        xdfast.distill(teacher="test_vit", student="test_resnet", out=str(tmp_path / "a"), **settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        xdfast.finetune("test_resnet", out=str(tmp_path / "file"), **settings)


def test_a_run_of_an_older_version_has_the_defaults_of_settings_that_are_new(tmp_path) -> None:
    settings = {**SMALL, "epochs": 1}
    first = xdfast.finetune("test_resnet", out=str(tmp_path / "a"), **settings)
    file = tmp_path / "a" / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith(("aug_repeats:", "label_loss:"))]
    assert len(older) == len(lines) - 2
    file.write_text("".join(older))
    assert xdfast.finetune("test_resnet", out=str(tmp_path / "a"), **settings).metrics == first.metrics
    file.write_text("".join(older))
    with pytest.raises(ValueError, match=r"other settings \(label_loss: 'ce' there, 'bce' asked for\)"):
        xdfast.finetune("test_resnet", out=str(tmp_path / "a"), **{**settings, "label_loss": "bce"})


def test_code_of_ones_own_is_part_of_the_run(tmp_path, monkeypatch) -> None:
    from own_net import CODE

    monkeypatch.setenv("XDFAST_OWN_CODE", "")
    file, settings = tmp_path / "net.py", {**SMALL, "epochs": 1}
    file.write_text(CODE)
    first = xdfast.finetune(f"{file}:Net", out=str(tmp_path / "a"), **settings)
    assert xdfast.finetune(f"{file}:Net", out=str(tmp_path / "a"), **settings).metrics == first.metrics
    assert first.student.num_classes == 10
    assert xdfast.evaluate(first).metrics["top1"] == pytest.approx(first.metrics["top1"])
    file.write_text(CODE.replace("mean((2, 3))", "amax((2, 3))"))
    with pytest.raises(ValueError, match="other settings .weights: .*model code"):
        xdfast.finetune(f"{file}:Net", out=str(tmp_path / "a"), **settings)


def test_a_run_that_started_from_other_weights_does_not_pass_for_this_one(tmp_path) -> None:
    first = xdfast.finetune("test_resnet", out=str(tmp_path / "first"), **SMALL)
    second = xdfast.finetune(first, out=str(tmp_path / "second"), **SMALL)
    assert xdfast.finetune(first, out=str(tmp_path / "second"), **SMALL).metrics == second.metrics
    xdfast.finetune("test_resnet", out=str(tmp_path / "first"), **{**SMALL, "seed": 1, "overwrite": True})
    with pytest.raises(ValueError, match="other settings .weights: "):
        xdfast.finetune(str(first.path), out=str(tmp_path / "second"), **SMALL)


@pytest.mark.parametrize("loss", ["kd", "rsd-logits", "mse", "kd+rsd"])
def test_other_losses(teacher, tmp_path, loss) -> None:
    run = xdfast.distill(
        teacher=str(teacher.path), student="test_resnet", loss=loss, out=str(tmp_path / "run"), **{**SMALL, "epochs": 1}
    )
    row = next(row for row in run.history if row["kind"] == "train")
    assert all(f"loss_{name}" in row for name in loss.split("+"))


def test_without_labels_the_classifier_stays_and_the_features_move(teacher, tmp_path) -> None:
    run = xdfast.distill(
        teacher=str(teacher.path),
        student="test_resnet",
        loss="mse",
        ce_weight=0,
        out=str(tmp_path / "run"),
        **{**SMALL, "epochs": 1},
    )
    assert "loss_ce" not in run.history[0]


def test_modules_and_datasets_as_arguments(teacher, tmp_path) -> None:
    class Digits(torch.utils.data.Dataset):
        classes = ("dark", "light")

        def __len__(self) -> int:
            return 24

        def __getitem__(self, i: int):
            return torch.full((3, 32, 32), 40 + 150 * (i % 2), dtype=torch.uint8), i % 2

    student = timm.create_model("test_resnet", num_classes=2)
    settings = {**SMALL, "labels_per_class": None, "batch_size": 8, "student_size": None}
    del settings["data"]
    run = xdfast.distill(
        teacher=teacher.student,
        student=student,
        data=Digits(),
        val_data=Digits(),
        out=str(tmp_path / "run"),
        **settings,
    )
    assert run.config["student"].startswith("object:")
    assert run.config["data"].startswith("object:")
    assert isinstance(run.student.net, nn.Module)


def test_accumulation_clipping_ema_mixed_precision_and_step_schedule(tmp_path) -> None:
    run = xdfast.finetune(
        "test_resnet",
        out=str(tmp_path / "run"),
        **{
            **SMALL,
            "accumulate": 3,
            "clip_grad": 1.0,
            "ema": 0.9,
            "amp": "bf16",
            "schedule": "step",
            "decay_epochs": 1,
        },
        mixup=0.2,
        cutmix=1.0,
        random_erase=0.2,
        auto_augment="rand-m5-mstd0.5-inc1",
    )
    rates = {row["epoch"]: row["lr"] for row in run.history if row["kind"] == "train"}
    assert rates[1] == pytest.approx(0.1 * rates[0])
    saved = torch.load(run.path / "resume.pt", weights_only=True)
    kept = run.student.net.state_dict()
    differs = [k for k, v in saved["ema"].items() if not torch.equal(v, saved["task"]["student." + k])]
    assert any("running_mean" in key for key in differs)  # buffers are averaged too
    assert all(torch.equal(saved["ema"]["net." + key], value) for key, value in kept.items())


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path) -> None:
    settings = {**SMALL, "epochs": 1, "optimizer": "momentum", "lr": 0.01, "augment": "none"}
    # test_vit has no batch statistics, so two batches of 20 are exactly one of 40
    runs = [
        xdfast.finetune(
            "test_vit", out=str(tmp_path / str(size)), **{**settings, "batch_size": size, "accumulate": 40 // size}
        )
        for size in (20, 40)
    ]
    a, b = (run.student.net.state_dict() for run in runs)
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_freeze_encoder_trains_the_classifier_alone(student, tmp_path) -> None:
    run = xdfast.finetune(student, out=str(tmp_path / "run"), freeze="encoder", **SMALL)
    before, after = student.student.net.state_dict(), run.student.net.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"fc.weight", "fc.bias"}


def test_evaluate(student, teacher) -> None:
    result = xdfast.evaluate(student, progress=False)
    assert {"top1", "top5", "loss", "knn", "linear_probe", "cka"} == set(result.metrics)
    assert result.metrics["top1"] == pytest.approx(student.metrics["top1"], abs=1e-6)
    confusion = np.array(result.confusion)
    assert confusion.trace() / confusion.sum() == pytest.approx(result.metrics["top1"], abs=1e-6)
    assert 0 < result.metrics["cka"] <= 1
    saved = json.loads((student.path / "evaluation.json").read_text())
    assert saved["metrics"] == result.metrics
    itself = xdfast.evaluate(teacher, teacher=str(teacher.path / "student"), progress=False)
    assert itself.metrics["cka"] == pytest.approx(1.0)


def test_a_teacher_of_other_classes_cannot_teach_logits(tmp_path) -> None:
    with pytest.raises(ValueError, match="teacher has 1000 classes and the data 10.*finetune"):
        xdfast.distill(
            teacher="test_vit",
            teacher_pretrained=False,
            student="test_resnet",
            loss="kd",
            out=str(tmp_path / "x"),
            **SMALL,
        )


def test_a_diverging_run_stops_with_the_last_state_intact(tmp_path) -> None:
    with pytest.raises(RuntimeError, match=r"not finite.*Lower lr"):
        xdfast.finetune(
            "test_resnet",
            out=str(tmp_path / "x"),
            **{**SMALL, "optimizer": "momentum", "lr": 1e30, "epochs": 3, "log_every": 1},
        )
    assert not (tmp_path / "x" / "summary.json").exists()
    with pytest.raises(FileNotFoundError, match="unfinished run"):
        load_run(tmp_path / "x")


def test_unknown_optimizer_offers_the_nearest(tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'adamv'.*Did you mean 'adam'"):
        xdfast.finetune("test_resnet", out=str(tmp_path / "x"), **{**SMALL, "optimizer": "adamv"})


def test_apex_is_required_not_replaced(tmp_path) -> None:
    with pytest.raises(ImportError, match="apex"):
        xdfast.finetune("test_resnet", out=str(tmp_path / "x"), **{**SMALL, "optimizer": "apex-fusedlamb"})


def test_tensorboard_on_request(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = xdfast.finetune("test_resnet", out=str(tmp_path / "run"), **{**SMALL, "tensorboard": True})
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    *_, point = events.Scalars("val/top1")  # one an epoch
    assert point.value == pytest.approx(run.metrics["top1"]) and point.step == run.metrics["steps"]
    assert "train/loss" in events.Tags()["scalars"]
    assert not (xdfast.finetune("test_resnet", out=str(tmp_path / "quiet"), **SMALL).path / "tensorboard").exists()
