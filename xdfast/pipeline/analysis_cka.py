"""CKA of every layer of a student with every layer of its teacher, at the student's start and at its end."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from xdfast.data._rng import preserved_rng
from xdfast.models import FeatureModel, weights_hash
from xdfast.models.stages import stage_names, stage_outputs
from xdfast.pipeline.analysis import Memory, Pictures, Subject, read_pictures
from xdfast.pipeline.config import DistillConfig, FinetuneConfig, load_yaml
from xdfast.pipeline.folder import RunResult, _weights_of
from xdfast.pipeline.journal import ProgressLine
from xdfast.pipeline.probes import MinibatchCKA, gram
from xdfast.pipeline.report import first_stage
from xdfast.pipeline.train_run import make_student

__all__ = ["add_cka", "initial_student"]

log = logging.getLogger("xdfast")


def initial_student(run: RunResult) -> FeatureModel:
    """The student before the first step of the first stage of its training, made again from that run's settings.

    Its weights are those the run began with, to the bit, as long as torch and timm draw as they did then.

    Raises:
        ValueError: it was given as a Python object, or the weights it started from have changed since.
    """
    first = first_stage(run)
    key = "student" if first.kind == "distill" else "model"
    spec = str(first.config.get(key))
    if spec.startswith("object:"):
        raise ValueError(f"it was given as a Python object ({spec.removeprefix('object:')})")
    config = (DistillConfig if first.kind == "distill" else FinetuneConfig).from_dict(first.config)
    saved = (load_yaml(first.path / "config.yaml").get("weights") or {}).get(key)
    if saved is not None and _weights_of(config).get(key) != saved:
        raise ValueError(f"{spec}, from which it started, has changed since or is gone")
    with preserved_rng():
        return make_student(spec, config, first.student.num_classes).eval()


@torch.no_grad()
def add_cka(
    pictures: Pictures, memory: Memory, remarks: list[str], *, count: int, device: torch.device, progress: bool
) -> None:
    """Sets ``analysis["cka"]`` of the best run of each method that has a teacher.

    ``rows`` and ``columns`` (names of the student's and the teacher's layers), ``before`` (None where the start cannot be made
    again) and ``after`` as [row][column], ``images``, ``batch``, ``teacher``.
    """
    batch = 128 if pictures.small else 32
    for teacher in {id(s.teacher): s.teacher for s in pictures.best if s.teacher is not None}.values():
        columns = stage_names(teacher.model)
        waiting: list[_Pair] = []
        hashed = weights_hash(teacher.model)
        for student in (s for s in pictures.best if s.teacher is teacher):
            before = _before(student, remarks)
            rows = stage_names(student.model)
            key = {
                "part": "cka", "version": 1, "teacher": hashed, "student": weights_hash(student.model),
                "before": None if before is None else weights_hash(before), "images": pictures.fingerprint,
                "count": count, "size": pictures.size, "batch": batch, "rows": rows, "columns": columns,
            }  # fmt: skip
            found = memory.recall(key)
            if found is None:
                waiting.append(_Pair(student, before, rows, key))
            else:
                student.record.analysis["cka"] = found
        if waiting:
            _measure(teacher, columns, waiting, pictures, memory, count, batch, device, progress)


class _Pair:
    """A student at its start and at its end, and what was seen of them so far."""

    def __init__(self, student: Subject, before: FeatureModel | None, rows: list[str], key: dict[str, Any]) -> None:
        self.student, self.before, self.rows, self.key = student, before, rows, key


def _measure(
    teacher: Subject, columns: list[str], pairs: list[_Pair], pictures: Pictures, memory: Memory,
    count: int, batch: int, device: torch.device, progress: bool,
) -> None:  # fmt: skip
    views, _ = read_pictures(pictures, count)
    if len(views) < 4:
        raise ValueError(f"CKA needs at least 4 validation images, got {len(views)}")
    models = [[m for m in (pair.before, pair.student.model) if m is not None] for pair in pairs]
    probes = [[MinibatchCKA(len(pair.rows), len(columns)) for _ in both] for pair, both in zip(pairs, models)]
    # Equal parts: the unbiased estimator needs four samples in each, and a small last batch would be all noise.
    pieces = max(1, round(len(views) / batch))
    line = ProgressLine("CKA", pieces, enabled=progress)
    for number, piece in enumerate(torch.from_numpy(views).tensor_split(pieces), 1):
        pixels = piece.permute(0, 3, 1, 2).to(device)
        theirs = _grams(teacher.model, columns, pixels)
        for pair, both, own in zip(pairs, models, probes, strict=True):
            for model, probe in zip(both, own, strict=True):
                probe.update(_grams(model.to(device), pair.rows, pixels), theirs)
        line.update(number, f"{len(pairs)} student{'s' if len(pairs) > 1 else ''}")
    line.close()
    for pair, own in zip(pairs, probes, strict=True):
        maps = [[[None if v != v else v for v in row] for row in probe.compute().tolist()] for probe in own]
        values = {
            "rows": pair.rows, "columns": columns, "before": maps[0] if len(maps) == 2 else None, "after": maps[-1],
            "images": len(views), "batch": -(-len(views) // pieces), "teacher": teacher.record.name,
        }  # fmt: skip
        memory.keep(pair.key, values)
        pair.student.record.analysis["cka"] = values


def _grams(model: FeatureModel, names: list[str], pixels: Tensor) -> list[Tensor]:
    with stage_outputs(model, names, gram) as run:
        return run(pixels)


def _before(student: Subject, remarks: list[str]) -> FeatureModel | None:
    assert student.run is not None  # a teacher has no start of ours
    try:
        return initial_student(student.run)
    except (ValueError, OSError) as error:
        remarks.append(
            f"The start of {student.record.name} cannot be made again, so its CKA map is of the end alone: {error}."
        )
        return None
