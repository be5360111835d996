"""What a report can tell of image models beyond accuracy: CKA maps, saliency, robustness, the teacher's features. On request."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xdfast import distributed
from xdfast._optional import require
from xdfast.data import ImageSource
from xdfast.data.corruptions import LEAST_SIZE
from xdfast.errors import nearest
from xdfast.pipeline.data import Images, eval_loader, open_images
from xdfast.pipeline.evaluate import trains_classifier
from xdfast.pipeline.folder import RunResult
from xdfast.pipeline.monitor import sample

if TYPE_CHECKING:
    from xdfast.models import FeatureModel
    from xdfast.reporting import Analysis, ModelRecord, RunRecord

__all__ = ["PARTS", "Memory", "Pictures", "Subject", "add_analysis", "parts_of", "read_pictures"]

log = logging.getLogger("xdfast")

PARTS = ("cka", "tsne", "saliency", "robustness")
#: Views up to this size are small: many of them cost little.
_SMALL = 64


@dataclass
class Subject:
    """A model that is looked at, and where what is found goes.

    Attributes:
        record: of the run, or of the teacher.
        model: itself.
        classifies: whether its logits are trained for the classes of the data.
        teacher: of a run: that of its first stage, or the only one of the report; None without.
        run: None for a teacher.
    """

    record: RunRecord | ModelRecord
    model: FeatureModel
    classifies: bool
    teacher: Subject | None = None
    run: RunResult | None = None


@dataclass
class Pictures:
    """Validation images that several models look at, all the same pixels.

    Attributes:
        source: all of them, with the classes.
        size: S; each model enlarges or reduces them to its own.
        subjects: the models, teachers among them.
        best: of each method, the best run.
        fingerprint: of the source.
    """

    source: ImageSource
    size: int
    subjects: list[Subject]
    best: list[Subject]
    fingerprint: str

    @property
    def small(self) -> bool:
        """Whether a view costs little."""
        return self.size <= _SMALL


@dataclass
class Memory:
    """Measurements of the page's JSON, so that a report that is made again measures only what is new."""

    before: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)

    def recall(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The values of an equal key, which are then kept for the new JSON."""
        key = json.loads(json.dumps(key))
        found = next((entry["values"] for entry in self.before if entry["key"] == key), None)
        if found is not None:
            self.keep(key, found)
        return found

    def keep(self, key: dict[str, Any], values: dict[str, Any]) -> None:
        """For the next time."""
        if not any(entry["key"] == key for entry in self.kept):
            self.kept.append({"key": key, "values": values})


def parts_of(value: Any) -> tuple[str, ...]:
    """``"all"`` or True, one name or several → names in the order of the page.

    Raises:
        ValueError: an unknown part.
        ImportError: the package of a part is missing.
    """
    if value is None or value is False:
        return ()
    given = PARTS if value is True or value == "all" else (value,) if isinstance(value, str) else tuple(value)
    if "all" in given:
        given = PARTS
    for part in given:
        if part not in PARTS:
            raise ValueError(
                f"unknown analysis {part!r}.{nearest(str(part), PARTS)} There are: {', '.join(PARTS)}, all"
            )
    if "saliency" in given:
        require("captum.attr", extra="analysis", purpose="saliency maps")
    if "robustness" in given:
        try:
            require("imagecorruptions", extra="analysis", purpose="corruptions of images")
        except ImportError as error:
            if "libGL" not in str(error):
                raise
            raise ImportError(
                "corruptions of images need OpenCV, whose package opencv-python needs the system's libGL: apt-get install libgl1, "
                "or pip uninstall opencv-python and pip install opencv-python-headless"
            ) from error
    return tuple(part for part in PARTS if part in given)


def add_analysis(
    runs: Sequence[RunResult],
    records: Sequence[RunRecord],
    teachers: dict[str, ModelRecord],
    parts: Sequence[str],
    *,
    images: int | None = None,
    device: str = "cpu",
    json_path: Path | None = None,
    progress: bool = True,
) -> Analysis:
    """Sets ``analysis`` of the records of runs and teachers, and returns what belongs to none of them.

    Args:
        runs, records: of image models, in the same order.
        teachers: by the spec that the runs know them by.
        parts: of :data:`PARTS`.
        images: how many validation images CKA and robustness take; default: 1,024 and 256, above 64 px 256 and 64.
        device: where the models run.
        json_path: of the report; what an earlier one measured of the same weights and images is taken from it.
        progress: whether it is shown.
    """
    from xdfast.pipeline.analysis_cka import add_cka
    from xdfast.pipeline.analysis_pictures import add_saliency, add_teacher_features
    from xdfast.pipeline.analysis_robustness import add_robustness
    from xdfast.reporting import Analysis

    found = Analysis(parts=list(parts))
    memory = Memory(_measured_before(json_path))
    place = distributed.device_for_rank(device)
    shared: dict[str, Any] = {"device": place, "progress": progress}
    for pictures in _by_images(runs, records, teachers, found.remarks):
        everyone = [subject.model for subject in pictures.subjects]
        try:
            for model in everyone:
                model.to(place).eval()
            if "cka" in parts:
                add_cka(pictures, memory, found.remarks, count=images or (1024 if pictures.small else 256), **shared)
            if "tsne" in parts:
                add_teacher_features(pictures, **shared)
            if "saliency" in parts:
                add_saliency(pictures, found, device=place)
            if "robustness" in parts:
                add_robustness(pictures, memory, count=images or (256 if pictures.small else 64), **shared)
        finally:
            for model in everyone:
                model.cpu()
    found.measurements = memory.kept
    return found


def read_pictures(pictures: Pictures, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to ``count`` readable validation images: uint8 ``[n, S, S, 3]`` and labels ``[n]``, the same ones in every report."""
    loader = eval_loader(sample(pictures.source, count), pictures.size, batch_size=64, workers="auto", sharded=False)
    parts = [(batch.images[batch.valid], batch.labels[batch.valid]) for batch in loader.epoch(0)]
    views, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    if len(labels) == 0:
        raise RuntimeError("no validation image could be read; see the warnings above for the files and reasons")
    return np.ascontiguousarray(views.permute(0, 2, 3, 1).cpu().numpy()), labels.cpu().numpy()


def _by_images(
    runs: Sequence[RunResult], records: Sequence[RunRecord], teachers: dict[str, ModelRecord], remarks: list[str]
) -> list[Pictures]:
    """Runs and their teachers by the validation images they were trained beside."""
    from xdfast.pipeline.report import teacher_spec
    from xdfast.reporting.groups import group_runs

    groups, _ = group_runs(records)
    best = {id(group.best) for group in groups}
    members = {id(record) for group in groups for record in group.runs}
    known: dict[str, tuple[Images, list[tuple[RunResult, RunRecord]]]] = {}
    for run, record in zip(runs, records, strict=True):
        if id(record) not in members:  # a second run of the same settings and seed
            continue
        try:
            images = open_images(SimpleNamespace(**{key: run.config.get(key) for key in _DATA}))
        except (ValueError, OSError) as error:  # the data is gone, or was a Python object
            remarks.append(f"{record.name} was not analysed: {error}")
            continue
        known.setdefault(images.val.fingerprint(), (images, []))[1].append((run, record))
    found = []
    for fingerprint, (images, listed) in known.items():
        classes = len(images.val.classes)
        theirs: dict[str, Subject] = {}
        students = []
        for run, record in listed:
            spec = teacher_spec(run) or (next(iter(teachers)) if len(teachers) == 1 else None)
            teacher = None
            if spec in teachers:
                known_as = teachers[str(spec)]
                model: Any = known_as.model
                teacher = theirs.setdefault(str(spec), Subject(known_as, model, model.num_classes == classes))
            student = run.student
            knows = student.num_classes == classes and trains_classifier(run.config)
            students.append(Subject(record, student, knows, teacher, run))
        subjects = [*theirs.values(), *students]
        sizes = [subject.model.image_size for subject in subjects]
        # One size for all: what a corruption does to a picture, and which cell of it matters, is then the same for each.
        size = max(min(max(sizes), images.val.short_side()), LEAST_SIZE)
        chosen = [student for student in students if id(student.record) in best]
        found.append(Pictures(images.val, size, subjects, chosen, fingerprint))
    return found


_DATA = ("data", "val_data", "val_fraction", "labels_per_class")


def _measured_before(json_path: Path | None) -> list[dict[str, Any]]:
    if json_path is None:
        return []
    try:
        entries = json.loads(json_path.read_text(encoding="utf-8"))["analysis"]["measurements"]
        return [entry for entry in entries if {"key", "values"} <= set(entry)]
    except (OSError, ValueError, KeyError, TypeError):
        return []  # no report there, one without analysis, or not ours
