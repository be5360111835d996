"""The teacher cache in training: same weights as with a live teacher, and no feature of another image, view or teacher."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import xdfast
from xdfast.data.store import MISS, StoreFull, TeacherStore
from xdfast.pipeline.cache import build_cache, find_stores, remove_store, verify_store
from xdfast.pipeline.teacher import CachedTeacher, LiveTeacher

SETTINGS = {
    "teacher": "test_vit",
    "teacher_pretrained": False,
    "teacher_size": 32,
    "student": "test_resnet",
    "student_size": 32,
    "loss": "mse",
    "ce_weight": 0.0,
    "epochs": 4,
    "batch_size": 8,
    "augment": "imagenet-cnn",
    "image_size": 32,
    "optimizer": "adamw",
    "lr": 1e-3,
    "cache_views": 2,
    "cache_dtype": "float32",
    "workers": 0,
    "progress": False,
    "device": "cpu",
    "val_fraction": 0.25,
}


def weights(run: Path | xdfast.pipeline.RunResult) -> dict[str, torch.Tensor]:
    return load_file(Path(getattr(run, "path", run)) / "student" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """40 images of two classes; 30 of them are for training."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((48, 40), Image.Resampling.BICUBIC).save(
                tmp_path / "images" / name / f"{i}.png"
            )
    return tmp_path / "images"


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """Images the live teacher has looked at, call by call."""
    from xdfast.pipeline import teacher

    seen: list[int] = []
    real = teacher._outputs

    def counting(net, images, kinds):
        seen.append(len(images))
        return real(net, images, kinds)

    monkeypatch.setattr(teacher, "_outputs", counting)
    return seen


def test_a_cached_run_ends_with_the_weights_of_a_live_one(pictures, tmp_path, monkeypatch, counted, caplog) -> None:
    settings = {**SETTINGS, "data": str(pictures), "cache": str(tmp_path / "store")}
    with caplog.at_level(logging.INFO, "xdfast"):
        first = xdfast.distill(**settings, out=str(tmp_path / "first"))
    filled = sum(counted)
    assert "the teacher cache is complete" in caplog.text and "the teacher is unloaded" in caplog.text
    assert filled == 2 * 30  # every view once
    counted.clear()
    again = xdfast.distill(**settings, out=str(tmp_path / "again"))
    assert not counted and same(weights(first), weights(again))

    def nothing(self, ids, views, digests):
        return {}, np.full(len(ids), MISS, dtype=np.uint8)

    monkeypatch.setattr(TeacherStore, "read", nothing)
    monkeypatch.setattr(CachedTeacher, "begin_epoch", LiveTeacher.begin_epoch)
    live = xdfast.distill(**settings, out=str(tmp_path / "live"))
    assert sum(counted) == 4 * 24 and same(weights(first), weights(live))


def test_half_precision_is_the_same_in_the_first_epoch_and_later(pictures, tmp_path) -> None:
    settings = {**SETTINGS, "data": str(pictures), "cache": str(tmp_path / "store"), "cache_dtype": "float16"}
    first, again = (xdfast.distill(**settings, out=str(tmp_path / name)) for name in ("first", "again"))
    assert same(weights(first), weights(again))


def test_runs_with_other_seeds_and_losses_share_a_cache(pictures, tmp_path, counted) -> None:
    settings = {**SETTINGS, "data": str(pictures), "cache": "auto"}
    teacher = xdfast.finetune(
        "test_vit", data=str(pictures), student_size=32, image_size=32, epochs=1, batch_size=8, workers=0,
        progress=False, out=str(tmp_path / "teacher"),
    )  # fmt: skip
    settings |= {"teacher": str(teacher.path), "teacher_pretrained": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDFAST_CACHE", str(tmp_path / "cache"))
        xdfast.distill(**settings, out=str(tmp_path / "a"))
        counted.clear()
        xdfast.distill(**{**settings, "seed": 3, "loss": "rsd", "batch_size": 6}, out=str(tmp_path / "b"))
        assert not counted and len(find_stores()) == 1
        # logits as well, or another augmentation, are other stores
        xdfast.distill(**{**settings, "loss": "mse+kd", "epochs": 1}, out=str(tmp_path / "c"))
        xdfast.distill(**{**settings, "augment": "small", "epochs": 1}, out=str(tmp_path / "d"))
        assert len(find_stores()) == 3


def test_a_changed_image_is_computed_anew_and_named(pictures, tmp_path, counted, caplog) -> None:
    settings = {**SETTINGS, "data": str(pictures), "cache": str(tmp_path / "store")}
    xdfast.distill(**settings, out=str(tmp_path / "first"))
    counted.clear()
    source = xdfast.data.open_source(str(pictures), "train", val_fraction=0.25)
    Image.new("RGB", (48, 40), (200, 10, 10)).save(source.path(5))
    with caplog.at_level(logging.WARNING, "xdfast"):
        xdfast.distill(**settings, out=str(tmp_path / "changed"))
    assert f"{source.path(5)} has changed since the teacher cache was written" in caplog.text
    assert caplog.text.count("has changed since") == 1
    assert 0 < len(counted) <= 2  # the batches that hold its two views
    counted.clear()
    xdfast.distill(**settings, out=str(tmp_path / "settled"))
    assert not counted and same(weights(tmp_path / "changed"), weights(tmp_path / "settled"))


def test_an_unreadable_image_does_not_keep_the_cache_from_being_complete(pictures, tmp_path) -> None:
    source = xdfast.data.open_source(str(pictures), "train", val_fraction=0.25)
    Path(source.path(7)).write_bytes(b"not an image")
    settings = {**SETTINGS, "data": str(pictures), "cache": str(tmp_path / "store")}
    first = xdfast.distill(**settings, out=str(tmp_path / "first"))
    assert list(first.bad_images) == [source.path(7)] and TeacherStore.load(tmp_path / "store").complete
    assert same(weights(first), weights(xdfast.distill(**settings, out=str(tmp_path / "again"))))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "weights"),  # a random teacher of another seed
        ({"teacher_size": 16, "teacher_options": {"dynamic_img_size": True}}, "input.size"),
        ({"augment": "small"}, "views.hflip"),
        ({"labels_per_class": 9}, "data"),
        ({"cache_views": 3}, "views"),
        ({"cache_dtype": "float16"}, "dtype"),
        ({"amp": "bf16"}, "amp"),
    ],
)
def test_a_cache_of_something_else_is_refused(pictures, tmp_path, change, named) -> None:
    settings = {**SETTINGS, "data": str(pictures), "cache": str(tmp_path / "store"), "epochs": 1}
    xdfast.distill(**settings, out=str(tmp_path / "first"))
    with pytest.raises(ValueError, match=named):
        xdfast.distill(**{**settings, **change}, out=str(tmp_path / "other"))


@pytest.mark.parametrize("change", [{"mixup": 0.2}, {"cutmix": 1.0}, {"random_erase": 0.25}, {"augment": "cifar-vit"}])
def test_what_changes_whole_batches_cannot_be_cached(pictures, tmp_path, change) -> None:
    with pytest.raises(ValueError, match="set mixup=0, cutmix=0, random_erase=0, or cache='none'"):
        xdfast.distill(**{**SETTINGS, "data": str(pictures), "cache": "auto", **change}, out=str(tmp_path / "run"))


def test_a_full_disk_keeps_what_was_written(pictures, tmp_path, monkeypatch, counted) -> None:
    settings = {**SETTINGS, "data": str(pictures), "cache": str(tmp_path / "store"), "checkpoint_seconds": 0.0}
    real, calls = TeacherStore.write, []

    def filling_up(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            with pytest.MonkeyPatch.context() as patch:

                def full(*_):
                    raise OSError(errno.ENOSPC, "No space left on device")

                patch.setattr(os, "pwrite", full)
                real(self, *arguments)
        real(self, *arguments)

    monkeypatch.setattr(TeacherStore, "write", filling_up)
    with pytest.raises(StoreFull, match="kept"):
        xdfast.distill(**settings, out=str(tmp_path / "run"))
    monkeypatch.setattr(TeacherStore, "write", real)
    assert TeacherStore.load(tmp_path / "store").count == 3 * 8
    done = sum(counted)
    run = xdfast.distill(**settings, out=str(tmp_path / "run"))
    assert sum(counted) - done < 2 * 30
    fresh = xdfast.distill(**{**settings, "cache": str(tmp_path / "other")}, out=str(tmp_path / "unbroken"))
    assert same(weights(run), weights(fresh))


def test_the_cache_can_be_built_beforehand_and_looked_after(pictures, tmp_path, counted) -> None:
    settings = {**SETTINGS, "data": str(pictures), "cache": str(tmp_path / "store")}
    with build_cache(**settings) as store:
        assert store.complete and sum(counted) == 60
    counted.clear()
    run = xdfast.distill(**settings, out=str(tmp_path / "run"))
    assert not counted
    live = xdfast.distill(**{**settings, "cache": str(tmp_path / "other")}, out=str(tmp_path / "live"))
    for key, value in weights(live).items():  # filled in other batches: the last bit of a product may differ
        torch.testing.assert_close(weights(run)[key], value, rtol=1e-5, atol=1e-6)

    assert verify_store(tmp_path / "store", progress=False).complete
    shard = next((tmp_path / "store").glob("rows-*.bin"))
    with open(shard, "r+b") as file:
        file.seek(5 * 64 * 4)
        file.write(b"\xff" * 8)
    assert verify_store(tmp_path / "store", progress=False).damaged == 1
    assert verify_store(tmp_path / "store", repair=True, progress=False).damaged == 1
    with build_cache(**settings) as store:
        assert store.complete
    assert verify_store(tmp_path / "store", progress=False).complete
    assert remove_store(tmp_path / "store") > 0 and not (tmp_path / "store").exists()
    with pytest.raises(FileNotFoundError):
        remove_store(pictures)
    assert pictures.is_dir()
    with pytest.raises(FileNotFoundError, match="holds no teacher cache"):
        find_stores(pictures)


RUN = "import json, sys, xdfast; xdfast.distill(**json.loads(sys.argv[1]))"


def start(settings: dict) -> subprocess.Popen:
    env = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", RUN, json.dumps(settings)], env=env, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.timeout(900)  # twelve processes that import torch, on a busy machine
def test_kill_9_at_any_moment_ends_with_the_same_weights(pictures, tmp_path) -> None:
    settings = {**SETTINGS, "data": str(pictures), "checkpoint_seconds": 0.0, "epochs": 20, "ema": 0.9}

    def run(name: str) -> dict:
        return {**settings, "cache": str(tmp_path / f"store-{name}"), "out": str(tmp_path / name)}

    assert start(run("unbroken")).wait(timeout=200) == 0
    resume = tmp_path / "broken" / "resume.pt"
    draw, killed = random.Random(0), 0
    for _ in range(10):
        before = resume.stat().st_mtime_ns if resume.is_file() else 0
        process = start(run("broken"))
        # After it has saved once, as soon or late as it may be on a busy machine, then at any moment.
        while process.poll() is None and (resume.stat().st_mtime_ns if resume.is_file() else 0) == before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed > 0 and start(run("broken")).wait(timeout=200) == 0
    assert same(weights(tmp_path / "unbroken"), weights(tmp_path / "broken"))


@pytest.mark.timeout(300)
def test_sigterm_while_a_cache_is_built_keeps_its_rows_and_exits_0(pictures, tmp_path) -> None:
    build = """
import sys, time
from xdfast.cli import main
from xdfast.pipeline import teacher
real = teacher._outputs
teacher._outputs = lambda *given: time.sleep(0.5) or real(*given)  # a teacher that takes its time
sys.exit(main(["cache", "build", *sys.argv[1:]]))
"""
    store = tmp_path / "store"
    flags = ["--no-teacher-pretrained", "--no-progress"]
    for key, value in {**SETTINGS, "data": pictures, "batch_size": 2, "cache": store}.items():
        if not isinstance(value, bool):
            flags.append(f"--{key.replace('_', '-')}={value}")
    process = subprocess.Popen(
        [sys.executable, "-c", build, *flags], env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not any(store.glob("rows-*.bin")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 0 and "stopped; what was computed is kept" in told, told
    assert TeacherStore.load(store).count < 60 and not verify_store(store, progress=False).damaged
    with build_cache(**{**SETTINGS, "data": str(pictures), "batch_size": 2, "cache": str(store)}) as filled:
        assert filled.complete and verify_store(store, progress=False).complete


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_fill_one_cache(pictures, tmp_path) -> None:
    flags = ["--no-teacher-pretrained", "--no-progress"]
    for key, value in {**SETTINGS, "data": pictures, "batch_size": 4, "cache": tmp_path / "store"}.items():
        if not isinstance(value, bool):
            flags.append(f"--{key.replace('_', '-')}={value}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "xdfast"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    for name in ("first", "again"):
        done = subprocess.run(
            [*launch, "distill", *flags, "--out", str(tmp_path / name)], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert TeacherStore.load(tmp_path / "store").complete
    assert verify_store(tmp_path / "store", progress=False).complete
    assert same(weights(tmp_path / "first"), weights(tmp_path / "again"))
