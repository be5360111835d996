"""What a report is made from, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

__all__ = ["Analysis", "ModelRecord", "PolicyRecord", "Report", "RunRecord", "VLARecord"]


@dataclass
class RunRecord:
    """One finished and evaluated run.

    Attributes:
        name: of the run, unique enough for a human (its folder's name).
        method: what it is called in tables, such as "RSD" or "from scratch".
        seed: of the run; runs that differ only in it are repetitions of one method. None if it had none.
        kind: "distill" or "finetune".
        metrics: final figures: top1, top5, knn, linear_probe, cka in [0, 1]; loss; seconds; those that apply.
        history: rows of metrics.jsonl: ``kind`` ("train" or "val"), ``epoch`` (from 0), ``step``, ``loss``, ``top1``, …
        confusion: [C][C] counts, rows are true classes; None if there is none.
        classes: C class names.
        embedding: ``features`` [M, F], ``labels`` [M], ``predictions`` [M] of validation images, or None.
        config: the run's settings, plain values.
        model: the trained student, or None.
        model_name: its architecture.
        skipped: path → reason of images that could not be read.
        steps: optimiser steps over all stages of its training, None if unknown; methods are compared at equal steps.
        analysis: part → what :class:`Analysis` says of it; empty if it was not looked at.
    """

    name: str
    method: str
    seed: int | None
    kind: str
    metrics: dict[str, float]
    history: list[dict[str, Any]] = field(default_factory=list)
    confusion: list[list[int]] | None = None
    classes: list[str] = field(default_factory=list)
    embedding: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None
    model_name: str = ""
    skipped: dict[str, str] = field(default_factory=dict)
    steps: int | None = None
    analysis: dict[str, Any] = field(default_factory=dict)


@dataclass
class PolicyRecord(RunRecord):
    """One finished run of a robot's policy. ``method`` is what its encoder is called, ``kind`` is "policy".

    Attributes:
        task: in which it acted, such as "metaworld/drawer-open-v3".
        episodes: ``seed``, ``success``, ``steps`` of each; empty if it was not evaluated.
        evaluated: of the evaluation: ``which`` policy of the run, ``max_steps``.
        latency: measured milliseconds of a decision: p50, p95, encode, denoise; steps, runs, batch, how.
        cost: counted, of a decision: see :class:`xdfast.robot.cost.DecisionCost`.
        videos: "success-SEED" or "failure-SEED" → file.
        saliency: picture, or None.
        stages: what :func:`xdfast.robot.stages.stage_separation` gives, or None.
        norm: what became of the encoder's BatchNorm.
        source: where the encoder came from.
        demos: how many demonstrations it learned from.
        remarks: what could not be found or done, for people.
    """

    task: str = ""
    episodes: list[dict[str, Any]] = field(default_factory=list)
    evaluated: dict[str, Any] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] | None = None
    videos: dict[str, Path] = field(default_factory=dict)
    saliency: Path | None = None
    stages: dict[str, Any] | None = None
    norm: str = ""
    source: str = ""
    demos: int | None = None
    remarks: list[str] = field(default_factory=list)


@dataclass
class VLARecord(RunRecord):
    """One finished run of a policy of several tasks. ``method`` is what it is called in tables, ``kind`` is "vla".

    Attributes:
        routing: "dense", or how its layers are chosen: "learned", "static" or "random".
        target_flops: fraction of the stack's FLOPs that was asked for; None if dense.
        is_teacher: whether a routed run of the report started from it.
        tasks: one record per task in which it was evaluated (its episodes, videos, how it was evaluated).
        paths: task → which layers ran: ``layers``, ``decisions``, ``dense``, ``nominal``, ``executed`` (FLOPs of the stack for a
            sample, mean over decisions), ``use`` [L], ``use_over_time`` [bins][L] or None, ``paths`` [["1101", count], …],
            ``distinct``. Empty if dense.
        always_on: layers that are never skipped, from 0.
        cost: what was counted and measured against the teacher; see :mod:`xdfast.pipeline.report_vla`. None if it was not.
        remarks: what could not be found or done, for people.
    """

    routing: str = "dense"
    target_flops: float | None = None
    is_teacher: bool = False
    tasks: list[PolicyRecord] = field(default_factory=list)
    paths: dict[str, dict[str, Any]] = field(default_factory=dict)
    always_on: tuple[int, ...] = ()
    cost: dict[str, Any] | None = None
    remarks: list[str] = field(default_factory=list)


@dataclass
class ModelRecord:
    """One network whose cost is counted and measured.

    Attributes:
        name: its architecture.
        model: the module; a wrapper with ``.net`` and ``.prepare`` is measured without its preparation of images.
        image_size: side of its square input in pixels.
        role: "teacher" or "student".
        top1: its top-1 accuracy in [0, 1] (of the best method, a mean over seeds), None if unknown.
        analysis: of a teacher, as of a run.
    """

    name: str
    model: nn.Module
    image_size: int
    role: Literal["teacher", "student"]
    top1: float | None = None
    analysis: dict[str, Any] = field(default_factory=dict)


@dataclass
class Analysis:
    """What was looked at beyond accuracy. The findings are in ``analysis`` of the records of runs and teachers:

    ``cka``: ``rows``, ``columns`` (names of layers), ``before`` (or None) and ``after`` as [row][column], ``images``, ``batch``,
    ``teacher``. ``saliency``: ``maps`` float [n, S, S] in [0, 1], ``method``, ``said`` and ``right`` of each picture (or None).
    ``robustness``: ``clean``, ``accuracy`` (corruption → one for each severity), ``mean``, ``images``, ``size``. ``embedding`` of a
    teacher: as of a run, with ``classes``.

    Attributes:
        parts: that were asked for.
        frames: uint8 ``[n, S, S, 3]``, the pictures of the saliency maps; empty without.
        truths: their classes.
        measurements: ``key`` and ``values``, for the report's JSON: a later report takes them from there.
        remarks: what could not be found or done, for people.
    """

    parts: list[str] = field(default_factory=list)
    frames: Any = ()
    truths: list[str] = field(default_factory=list)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass
class Report:
    """A written report.

    Attributes:
        path: the HTML page.
        json_path: all its figures as JSON.
        data: the content of the JSON.
    """

    path: Path
    json_path: Path
    data: dict[str, Any] = field(repr=False)
