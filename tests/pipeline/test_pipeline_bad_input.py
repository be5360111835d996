"""Bad input through the verbs: found before any work, or named and survived."""

from __future__ import annotations

import json

import numpy as np
import pytest

import xdfast
from xdfast.data import SubsetSource, open_source, write_image_folder

SMALL = {
    "student_size": 32, "epochs": 1, "batch_size": 16, "augment": "none", "optimizer": "adamw", "lr": 1e-3, "workers": 0,
    "progress": False, "device": "cpu",
}  # fmt: skip


@pytest.fixture
def photos(tmp_path):
    digits = open_source("sklearn:digits", val_fraction=None)
    few = np.flatnonzero(digits.labels < 2)[:60]
    folder = write_image_folder(SubsetSource(digits, few), tmp_path / "photos")
    for name in digits.classes[2:]:
        (folder / name).rmdir()
    return folder


def test_a_truncated_image_is_named_skipped_and_listed_and_the_run_goes_on(photos, tmp_path, caplog) -> None:
    broken = [sorted((photos / "0").iterdir())[3], sorted((photos / "1").iterdir())[5]]
    for path in broken:
        path.write_bytes(path.read_bytes()[:40])
    run = xdfast.finetune("test_resnet", data=str(photos), out=str(tmp_path / "run"), **SMALL)
    assert set(run.bad_images) == {str(path) for path in broken}
    assert all(str(path) in caplog.text for path in broken)
    assert run.metrics["top1"] >= 0
    page = xdfast.report(run, out=tmp_path / "r.html", measure_speed=False)
    assert set(json.loads(page.json_path.read_text())["skipped_images"]) == {str(path) for path in broken}
    assert broken[0].name in page.path.read_text()


def test_an_empty_or_missing_folder_fails_before_any_model_is_made(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        xdfast.finetune("test_resnet", data=str(tmp_path / "empty"), out=str(tmp_path / "a"), **SMALL)
    with pytest.raises(FileNotFoundError, match="emptx"):
        xdfast.finetune("test_resnet", data=str(tmp_path / "emptx"), out=str(tmp_path / "b"), **SMALL)


def test_validation_images_of_ones_own_are_used_whole(photos, tmp_path) -> None:
    run = xdfast.finetune("test_resnet", data=str(photos), val_data=str(photos), out=str(tmp_path / "run"), **SMALL)
    result = xdfast.evaluate(run, knn=3, linear_probe=False, progress=False)
    assert np.sum(result.confusion) == 60


@pytest.mark.parametrize(("student", "teacher"), [("resnet19", "test_vit"), ("test_resnet", "vit_smal_patch16_224")])
def test_an_unknown_model_offers_the_nearest(student, teacher, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"unknown model .*Did you mean '(resnet18|resnet10t|vit_small_patch16_224)'"):
        xdfast.distill(
            teacher=teacher,
            student=student,
            data="sklearn:digits",
            teacher_pretrained=False,
            out=str(tmp_path / "x"),
            **SMALL,
        )


def test_an_output_path_that_is_a_file(photos, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="must be a folder"):
        xdfast.finetune("test_resnet", data=str(photos), out=str(tmp_path / "file"), **SMALL)


def test_disk_full_while_saving_keeps_the_old_state(photos, tmp_path, monkeypatch) -> None:
    """The second resume file does not fit: the first is whole, and the run goes on from it once there is room."""
    import errno

    from xdfast.models import checkpoint

    settings = {**SMALL, "data": str(photos), "epochs": 3, "checkpoint_seconds": 0.0, "out": str(tmp_path / "run")}
    whole = xdfast.finetune("test_resnet", **{**settings, "out": str(tmp_path / "whole")})
    saves, real = [], checkpoint.torch.save

    def full(state, file, *args, **kwargs):
        saves.append(1)
        if len(saves) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(state, file, *args, **kwargs)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(xdfast.models.CheckpointError, match="No space left.*is unharmed"):
        xdfast.finetune("test_resnet", **settings)
    assert [p.name for p in (tmp_path / "run").glob("resume*")] == ["resume.pt"]
    monkeypatch.undo()
    continued = xdfast.finetune("test_resnet", **settings)
    assert continued.metrics["loss"] == whole.metrics["loss"]
