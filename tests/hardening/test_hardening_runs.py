"""A run's folder with one file damaged: what can be read is read, the rest is an error that names the file.

Rules: metrics.jsonl loses the damaged lines and says so; resume.pt, summary.json, evaluation.json, embedding.npz, config.yaml and
the student's files are whole or refused by name. A flipped bit inside a weight or a setting leaves a file that is whole.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hardening_damage import damaged
from hardening_tally import LONG, SEED, count

from xdfast.models import create_model, load_resume, save_resume, save_student
from xdfast.models.checkpoint import CheckpointError
from xdfast.pipeline.config import FinetuneConfig, save_yaml
from xdfast.pipeline.evaluate import EvaluateResult, load_evaluation
from xdfast.pipeline.folder import finish, load_run
from xdfast.pipeline.journal import Journal, read_history

CASES = 60 if LONG else 4
ROWS = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The files of a run, written by what writes them in a run."""
    out = tmp_path_factory.mktemp("run")
    config = FinetuneConfig(model="test_resnet", data="sklearn:digits", out=str(out), epochs=2)
    save_yaml(out / "config.yaml", {"kind": "finetune", **config.to_dict(), "weights": {}})
    student = create_model("test_resnet", num_classes=10)
    save_student(student, out / "student")
    journal = Journal(out)
    for step in range(ROWS):
        journal.write({"kind": "train", "epoch": 0, "step": step, "loss": 1 / (step + 1)})
    journal.close()
    state = {"state": {"epoch": 1, "step": 7}, "identity": {"data": "x"}, "model": student.net.state_dict()}
    save_resume(out / "resume.pt", {**state, "scaler": {}, "bad": {}})
    result = EvaluateResult("a", out, {"top1": 0.5}, ["0", "1"], [[1, 0], [0, 1]])
    (out / "evaluation.json").write_text(json.dumps(result.to_dict(), indent=2))
    np.savez_compressed(out / "embedding.npz", features=np.zeros((4, 3), np.float32), labels=np.arange(4))
    finish(out, "finetune", config, {"top1": 0.5, "loss": 1.0}, {})
    return out


def _student(out: Path) -> None:
    student = load_run(out).student
    assert student(torch.zeros(1, 3, 32, 32)).features.shape[0] == 1


def _history(out: Path) -> None:
    rows = read_history(out / "metrics.jsonl")
    assert all(isinstance(row, dict) for row in rows)


#: file → what reads it.
READERS: dict[str, Callable[[Path], Any]] = {
    "config.yaml": load_run,
    "summary.json": load_run,
    "metrics.jsonl": _history,
    "resume.pt": lambda out: load_resume(out / "resume.pt"),
    "evaluation.json": load_evaluation,
    "embedding.npz": load_evaluation,
    "student/model.safetensors": _student,
    "student/config.json": _student,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.timeout(3600)
def test_a_damaged_file_is_named_or_read(run, tmp_path, name) -> None:
    rng = random.Random(f"{SEED} {name}")
    for case in range(CASES):
        out = tmp_path / str(case)
        shutil.copytree(run, out)
        data, way = damaged((out / name).read_bytes(), rng)
        (out / name).write_bytes(data)
        try:
            READERS[name](out)
            outcome = "read"
        except (CheckpointError, ValueError, FileNotFoundError) as error:
            assert str(out / name) in str(error) or str((out / name).parent) in str(error), f"{way}: {error!r}"
            assert len(str(error)) > len(str(out / name)) + 10
            outcome = "refused, file named"
        count("run folders", f"{name}: {way}", outcome)
        shutil.rmtree(out)


def test_a_damaged_line_costs_no_other(run, tmp_path, caplog) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    bad = {3: b'{"kind": "tr\xff\xfe"}\n', 5: b"7\n", 6: b"[" * 100_000 + b"\n", ROWS - 1: lines[-1][:9]}
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(bad.get(i, line) for i, line in enumerate(lines)))
    with caplog.at_level(logging.WARNING, "xdfast"):
        rows = read_history(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [i for i in range(ROWS) if i not in bad]
    assert [f"line {i + 1} is unfinished or damaged" in caplog.text for i in bad] == [True] * 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "Expecting value"), ("[1]", "it holds a list"), ('{"kind": "finetune"}', "metrics, bad_images missing"),
        ('{"kind": "finetune", "metrics": 3, "bad_images": {}}', "metrics missing or of another type"),
    ],
)  # fmt: skip
def test_a_damaged_summary_is_named(run, tmp_path, content, reason) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=rf"summary\.json is damaged \({reason}.*give the command that wrote it again"
    ):
        load_run(tmp_path / "run")


def test_an_evaluation_with_a_field_that_nobody_knows(run, tmp_path) -> None:
    values = {**json.loads((run / "evaluation.json").read_text()), "clasxes": []}
    (tmp_path / "evaluation.json").write_text(json.dumps(values))
    assert {field.name for field in dataclasses.fields(EvaluateResult)} >= set(values) - {"clasxes"}
    with pytest.raises(CheckpointError, match=r"evaluation\.json is damaged \(nothing has clasxes\)"):
        load_evaluation(tmp_path)


@pytest.mark.parametrize("key", ["identity", "scaler", "bad", "state"])
def test_a_resume_file_that_lacks_a_part_is_named(tmp_path, key) -> None:
    import xdfast

    settings = {
        "model": "test_resnet", "data": "sklearn:digits", "labels_per_class": 4, "student_size": 32, "epochs": 1,
        "out": str(tmp_path / "run"), "progress": False, "workers": 0,
    }  # fmt: skip
    (tmp_path / "run").mkdir()
    save_resume(tmp_path / "run" / "resume.pt", {k: {} for k in ("identity", "scaler", "bad", "state") if k != key})
    with pytest.raises(CheckpointError, match=rf"resume\.pt is damaged or not a resume file \(it lacks {key}\)"):
        xdfast.finetune(**settings)
