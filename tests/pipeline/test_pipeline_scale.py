"""Scale of training: exact tails, one result for any number of processes, sharding, compiling, memory format."""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import xdfast
from xdfast.data import ImageLoader, open_source
from xdfast.data.batches import EpochPlan
from xdfast.distributed import device_for_rank
from xdfast.pipeline.config import FinetuneConfig
from xdfast.pipeline.parallel import _check_shapes, check_layout

CHECKS = Path(__file__).with_name("ranks_scale.py")
spec = importlib.util.spec_from_file_location(CHECKS.stem, CHECKS)
scale = importlib.util.module_from_spec(spec)
sys.modules[CHECKS.stem] = scale
spec.loader.exec_module(scale)


# ---- which rows


@settings(max_examples=300, deadline=None)
@given(
    count=st.integers(2, 80),
    batch=st.integers(1, 9),
    world=st.integers(1, 7),
    epoch=st.integers(0, 9),
)
def test_exact_tails_give_every_row_once_in_equal_steps(count, batch, world, epoch):
    plans = [EpochPlan(count, batch, True, 1, r, world, None, exact=True) for r in range(world)]
    parts = [[b.ids for b in plan.batches(epoch, 0)] for plan in plans]
    assert {len(p) for p in parts} == {plans[0].batches_per_epoch}
    ids = np.concatenate([i for p in parts for i in p])
    assert sorted(ids.tolist()) == list(range(count))
    whole = batch * world
    for number, pieces in enumerate(zip(*parts)):
        sizes = [len(p) for p in pieces]
        last = number == len(parts[0]) - 1
        assert sum(sizes) == plans[0].rows(number) and (last or sizes == [batch] * world)
        assert max(sizes) <= plans[0].max_rows == batch + 1
        assert sizes == sorted(sizes, reverse=True) and sizes[0] >= 1
        assert batch == 1 or not any(size == 1 for size in sizes)
        assert 2 <= sum(sizes) <= whole + 1 or whole == 1
    for start in range(len(parts[0]) + 1):
        assert all(map(np.array_equal, (b.ids for b in plans[-1].batches(epoch, start)), parts[-1][start:]))


@settings(max_examples=100, deadline=None)
@given(count=st.integers(2, 60), batch=st.integers(1, 4), world=st.integers(1, 5))
def test_the_rows_of_a_step_do_not_depend_on_the_number_of_processes(count, batch, world):
    def steps(batch: int, world: int) -> list[set[int]]:
        plans = [EpochPlan(count, batch, True, 3, r, world, None, exact=True) for r in range(world)]
        return [set(np.concatenate([b.ids for b in step]).tolist()) for step in zip(*(p.batches(2, 0) for p in plans))]

    assert steps(batch, world) == steps(batch * world, 1)


def test_a_rank_without_rows_gets_an_empty_batch_whatever_reads():
    source = open_source("sklearn:digits", labels_per_class=1, val_fraction=None)  # 10 = 8 + 2
    for workers in (0, 1):
        loaders = [ImageLoader(source, 4, 8, True, rank=r, world_size=2, workers=workers, exact=True) for r in (0, 1)]
        for epoch in (0, 1):
            (first, tail), (other, empty) = (list(loader.epoch(epoch)) for loader in loaders)
            assert len(empty) == 0 and empty.images.shape == (0, 3, 8, 8) and empty.labels.dtype == torch.int64
            assert sorted(torch.cat([b.ids for b in (first, tail, other)]).tolist()) == list(range(10))
            assert [len(b) for b in loaders[1].epoch(epoch, start=1)] == [0] and not list(loaders[1].epoch(epoch, 2))
        for loader in loaders:
            loader.close()


def test_one_image_has_no_exact_tail():
    with pytest.raises(ValueError, match="one training image .* at least 2"):
        EpochPlan(1, 4, True, 0, 0, 1, None, exact=True)


# ---- processes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    for name, run in scale.RUNS.items():
        scale.run(folder / f"one-{name}", **run)
    return folder


@pytest.fixture(scope="module")
def outcome(folder) -> dict[str, str]:
    return ranks.run(CHECKS, 2, folder)


@pytest.mark.ddp
@pytest.mark.parametrize("check", ranks.names(CHECKS))
def test_two_processes(outcome, check) -> None:
    if outcome[check]:
        pytest.fail(outcome[check], pytrace=False)


def test_every_image_counts_once(folder) -> None:
    steps = {name: torch.load(folder / f"one-{name}" / "resume.pt", weights_only=True)["state"] for name in scale.RUNS}
    assert {name: state["step"] for name, state in steps.items()} == {"idle": 2 * 2, "uneven": 2 * 9, "joined": 2 * 3}


# ---- one process


def test_channels_last_gives_the_same_student(folder) -> None:
    expected = load_file(folder / "one-uneven" / "student" / "model.safetensors")
    settings = scale.RUNS["uneven"]
    last = scale.run(folder / "channels-last", **settings, channels_last=True)
    scale.assert_same(last, expected, 1e-5)
    plain, saved = (
        torch.load(folder / name / "resume.pt", weights_only=True) for name in ("one-uneven", "channels-last")
    )
    assert saved["identity"] == plain["identity"]  # the teacher's hash too: either can continue the other
    assert saved["task"]["student.net.conv1.0.weight"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow  # a C++ compiler runs
@pytest.mark.timeout(400)
def test_compiled_gives_the_same_student(tmp_path) -> None:
    settings = {"count": 32, "batch_size": 16, "epochs": 1}  # one shape: what costs is the compiler
    expected = scale.run(tmp_path / "eager", **settings)
    compiled = scale.run(tmp_path / "compiled", **settings, compile=True)
    scale.assert_same(compiled, expected, 1e-5)  # the names too
    names = torch.load(tmp_path / "compiled" / "resume.pt", weights_only=True)["task"]
    assert not [name for name in names if "_orig_mod" in name]


def test_fsdp_in_one_process_is_plain_training(folder, tmp_path, caplog) -> None:
    with caplog.at_level(logging.INFO, "xdfast"):
        weights = scale.run(tmp_path / "run", **scale.RUNS["joined"], parallel="fsdp")
    assert "parallel='fsdp' has no effect in a single process" in caplog.text
    scale.assert_same(weights, load_file(folder / "one-joined" / "student" / "model.safetensors"), 0.0)


def test_sync_batchnorm_names_the_fix_on_the_cpu(tmp_path) -> None:
    fix = r"sync_batchnorm=True needs a GPU .*student_options={\"norm_layer\": \"groupnorm\"}"
    with pytest.raises(ValueError, match=fix):
        xdfast.finetune(
            "test_resnet", data="sklearn:digits", labels_per_class=2, student_size=32, batch_size=8, device="cpu",
            sync_batchnorm=True, workers=0, out=str(tmp_path / "run"),
        )  # fmt: skip


def test_cuda_is_the_gpu_of_the_rank(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [str(device_for_rank(d)) for d in ("auto", "cuda", "cuda:1")] == ["cuda:0", "cuda", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [str(device_for_rank(d)) for d in ("auto", "cuda", "cuda:1")] == ["cuda:3", "cuda:3", "cuda:1"]


def test_the_student_named_as_the_fix_exists() -> None:
    net = xdfast.create_model("resnet18", num_classes=10, pretrained=False, options={"norm_layer": "groupnorm"})
    assert not [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def test_sync_batchnorm_needs_rows_on_every_rank(monkeypatch) -> None:
    monkeypatch.setattr("xdfast.distributed.world_size", lambda: 4)
    config = FinetuneConfig(model="m", data="d", out="o", sync_batchnorm=True, tail="exact", batch_size=8)
    check_layout(config, torch.device("cuda"), 8)
    with pytest.raises(ValueError, match=r"leaves 7 image\(s\) in the last batch, too few for 4 processes"):
        check_layout(config, torch.device("cuda"), 7)


def test_an_optimiser_whose_state_cannot_be_sharded_is_named() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, 3))
    _check_shapes({"step": torch.tensor(1.0), "exp_avg": torch.zeros(4, 3)}, parameter)
    with pytest.raises(ValueError, match=r"keeps row of shape \(4,\) for a weight of shape \(4, 3\).*parallel='ddp'"):
        _check_shapes({"row": torch.zeros(4)}, parameter)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tail": "exakt"}, "tail must be one of drop, exact, got 'exakt'.*exact"),
        ({"parallel": "fsdp2"}, "parallel must be one of ddp, fsdp, got 'fsdp2'"),
        ({"parallel": "fsdp", "amp": "fp16"}, "amp='fp16' cannot scale sharded gradients.*bf16"),
        ({"parallel": "fsdp", "optimizer": "apex-fusedlamb"}, "'apex-fusedlamb' cannot step on sharded weights.*lamb"),
        ({"parallel": "fsdp", "channels_last": True}, "channels_last=True needs whole weights"),
    ],
)
def test_settings_that_do_not_go(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(model="m", data="d", out="o", **wrong).validate()
