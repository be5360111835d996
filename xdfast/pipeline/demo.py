"""``demo``: few labels, many pictures, one teacher: from scratch, KD and RSD side by side, three seeds each, with a report.

The setting of the comparison. A pool of training images, a few of them labelled. The teacher knows the pool; the student
is small. Every student gets the same number of optimiser steps, batch size and schedule:

from scratch    all its steps on the few labelled images
KD, RSD         first imitates the teacher on the whole pool without any label, then is fine-tuned on the labelled images
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdfast.data import open_source
from xdfast.errors import nearest
from xdfast.losses import list_losses
from xdfast.pipeline.config import _Config
from xdfast.pipeline.distill import distill
from xdfast.pipeline.evaluate import evaluate
from xdfast.pipeline.finetune import finetune
from xdfast.pipeline.folder import RunResult, load_run
from xdfast.pipeline.journal import clock
from xdfast.pipeline.report import records_of, report

if TYPE_CHECKING:
    from xdfast.reporting import Report

__all__ = ["DemoConfig", "DemoResult", "demo"]

log = logging.getLogger("xdfast")

_DIGITS = "sklearn:digits"

# The default teacher: a ViT of 1.8 M parameters, as wide as ViT-Ti; it sees the digits as 4 × 4 patches.
_TEACHER = {
    "model": "vit_tiny_patch16_224",
    "student_options": {"patch_size": 8, "embed_dim": 192, "depth": 4, "num_heads": 3},
}
# The default student for the digits: a ResNet of one block a stage and a quarter of ResNet-18's width, 0.3 M parameters.
_DIGITS_STUDENT_OPTIONS = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}


@dataclass(kw_only=True)
class DemoConfig(_Config):
    """Scratch, KD and RSD with few labels, side by side."""

    data: str = _DIGITS
    """Images: a folder of class folders, a zip archive of one, "torchvision:CIFAR10", or scikit-learn's 1,797 digits."""
    teacher: str | None = None
    """timm name (its published weights are used), NAME@/path/to/weights, or a folder that distill or finetune wrote.
    Default: a small ViT trained on the spot, on all training images and their labels."""
    student: str = "resnet18"
    """timm name; on the digits "resnet18" is one of half the depth and a quarter of the width."""
    out: str = "demo"
    """Output folder. Run the same command again to continue."""
    methods: tuple[str, ...] = ("scratch", "kd", "rsd")
    """What to compare: scratch, and losses of `xdfast distill` (kd, rsd, mse, rsd+kd…)."""
    seeds: int = 3
    """Repetitions of each method, with seeds 0, 1, …"""
    labels_per_class: int = 5
    """Labelled images of each class; the rest of the pool is seen without labels, through the teacher."""
    size: int | None = None
    """Input size of both models in pixels; default: 32 for the digits, 64 with a teacher trained on the spot, else each
    model's own."""
    batch_size: int = 64
    distill_steps: int = 330
    """Steps of imitation, rounded up to whole epochs of the pool."""
    finetune_steps: int = 150
    """Steps on the labelled images afterwards; "from scratch" takes both numbers together."""
    teacher_steps: int = 1100
    """Steps of the teacher trained on the spot (of the classifier alone, a tenth of that, if the teacher is given)."""
    measure_speed: bool = True
    """Measure latency and images/s for the report (about 20 s)."""
    device: str = "auto"
    workers: int | str = "auto"
    progress: bool = True

    def validate(self) -> None:
        """Checks every value before any work.

        Raises:
            ValueError: names the setting, its value and what is allowed.
        """
        self._positive(
            "seeds", "labels_per_class", "size", "batch_size", "distill_steps", "finetune_steps", "teacher_steps"
        )
        if not self.methods:
            raise ValueError("methods is empty; choose from scratch, kd, rsd, …")
        if len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods names one twice: {', '.join(self.methods)}")
        for method in self.methods:
            known = ["scratch", *list_losses()]
            for name in method.split("+") if method != "scratch" else ():
                if name not in known[1:]:
                    raise ValueError(f"methods: unknown {name!r}; known: {', '.join(known)}.{nearest(name, known)}")


@dataclass
class DemoResult:
    """The runs by method, the report, and the sentence that sums up.

    Attributes:
        teacher: the teacher's folder or name.
        runs: method → one finished run per seed.
        report: page and JSON.
        verdict: one sentence for each method against "scratch", computed from the figures.
    """

    teacher: str
    runs: dict[str, list[RunResult]]
    report: Report
    verdict: list[str]


def demo(config: DemoConfig | None = None, **settings: Any) -> DemoResult:
    """Trains a teacher (or takes yours), then students from scratch, by KD and by RSD, and writes the report.

    Args:
        config: all settings; or give them as keyword arguments, see :class:`DemoConfig`.

    Returns:
        :class:`DemoResult`; the table and the verdict are printed as well. A second call continues or returns at once.

    Raises:
        ValueError: a bad setting, or an output folder of other settings.
        ConnectionError: the teacher's published weights could not be fetched.
    """
    config = DemoConfig.from_dict(settings, source="demo()") if config is None else config
    config.validate()
    out = Path(config.out)
    plan = _Plan(config)
    shown = _Stages(1 + len(config.methods) * config.seeds, enabled=config.progress)

    with shown.stage("the teacher"):
        teacher = _teacher(config, plan, out)
    runs: dict[str, list[RunResult]] = {method: [] for method in config.methods}
    for seed in range(config.seeds):  # seed by seed: whatever else this machine does falls on all methods alike
        for method in config.methods:
            with shown.stage(f"{_title(method)}, seed {seed}"):
                runs[method].append(_student(config, plan, out, method, seed, teacher))
    shown.say("evaluating, measuring speed, writing the report")
    return _conclude(config, plan, out, teacher, runs)


class _Plan:
    """Steps turned into epochs of the images at hand, and the settings all runs share."""

    def __init__(self, config: DemoConfig) -> None:
        self.on_digits = config.data == _DIGITS
        pool = open_source(config.data, split="train", seed=0)
        labelled = open_source(config.data, split="train", seed=0, labels_per_class=config.labels_per_class)
        self.pool, self.labelled, self.classes = len(pool), len(labelled), list(pool.classes)
        per_pool = max(self.pool // config.batch_size, 1)
        self._per_labelled = max(self.labelled // config.batch_size, 1)
        self.teacher_epochs = math.ceil(config.teacher_steps / per_pool)
        self.head_epochs = math.ceil(config.teacher_steps / 10 / per_pool)
        self.distill_epochs = math.ceil(config.distill_steps / per_pool)
        self.distill_steps = self.distill_epochs * per_pool
        self.finetune_epochs = self.epochs_of_labelled(config.finetune_steps)
        self.scratch_epochs = self.epochs_of_labelled(self.distill_steps + config.finetune_steps)
        self.size = config.size or (32 if self.on_digits else 64 if config.teacher is None else None)
        self.shared: dict[str, Any] = {
            "data": config.data,
            "batch_size": config.batch_size,
            "augment": "small" if self.on_digits or (self.size or 224) < 64 else "imagenet-cnn",
            "label_smoothing": 0.0,
            "optimizer": "adamw",
            "weight_decay": 0.05,
            "device": config.device,
            "workers": config.workers,
            "progress": config.progress,
        }

    def epochs_of_labelled(self, steps: int) -> int:
        return math.ceil(steps / self._per_labelled)


def _schedule(epochs: int, lr: float) -> dict[str, Any]:
    return {"epochs": epochs, "lr": lr, "warmup_epochs": min(epochs // 15, 40), "eval_every": max(epochs // 10, 1)}


def _teacher(config: DemoConfig, plan: _Plan, out: Path) -> str:
    """The folder of a teacher with a classifier for these classes."""
    folder = str(out / "teacher")
    if config.teacher is None:
        # Label smoothing draws the features of a class together; students of such features need fewer labels (RSD: 97.0
        # instead of 94.2 % on the digits).
        settings = _TEACHER | plan.shared | _schedule(plan.teacher_epochs, 1e-3) | {"label_smoothing": 0.1}
        finetune(**settings, student_size=plan.size, out=folder)
        return folder
    given = Path(config.teacher)
    if (given / "summary.json").is_file():
        run = load_run(given)
        if run.student.num_classes == len(plan.classes):
            return str(given)
    log.info("%s gets a classifier for the %d classes of %s", config.teacher, len(plan.classes), config.data)
    settings = plan.shared | _schedule(plan.head_epochs, 1e-3)
    finetune(
        config.teacher, **settings, student_size=config.size, student_pretrained=True, freeze="encoder", out=folder
    )
    return folder


def _student(config: DemoConfig, plan: _Plan, out: Path, method: str, seed: int, teacher: str) -> RunResult:
    options = _DIGITS_STUDENT_OPTIONS if plan.on_digits and config.student == "resnet18" else {}
    few = plan.shared | {"labels_per_class": config.labels_per_class, "seed": seed}
    few["batch_size"] = min(config.batch_size, plan.labelled)
    if method == "scratch":
        size = {"student_size": plan.size, "student_options": options}
        settings = few | size | _schedule(plan.scratch_epochs, 2e-3)
        return finetune(config.student, **settings, out=str(out / f"scratch-seed{seed}"))
    imitation = plan.shared | {"seed": seed, "ce_weight": 0.0, "student_size": plan.size, "student_options": options}
    imitation |= {"teacher": teacher, "student": config.student, "loss": method, "monitor": 0}  # the page shows stage 2
    first = distill(
        **imitation, **_schedule(plan.distill_epochs, 2e-3), out=str(out / f"{method}-seed{seed}-distilled")
    )
    settings = few | _schedule(plan.finetune_epochs, 1e-3)
    return finetune(first, **settings, out=str(out / f"{method}-seed{seed}"))


def _conclude(config: DemoConfig, plan: _Plan, out: Path, teacher: str, runs: dict[str, list[RunResult]]) -> DemoResult:
    from rich.console import Console

    from xdfast.reporting import method_table

    every = [run for method in runs.values() for run in method]
    for run in [*every, *([load_run(teacher)] if (Path(teacher) / "summary.json").is_file() else [])]:
        evaluate(run, teacher=teacher if run in every else False, progress=False)
    notes = [
        f"Data: {config.data}; {plan.pool:,} training images, of which {plan.labelled:,} labelled "
        f"({config.labels_per_class} of each of {len(plan.classes)} classes).",
        f"Every student takes {plan.distill_steps + config.finetune_steps:,} optimiser steps. “From scratch” takes all of "
        "them on the labelled images. The distilled students first imitate the teacher on all training images, without "
        "labels, and are then fine-tuned on the labelled ones.",
        "The teacher was trained with the labels of all training images."
        if config.teacher is None
        else f"Teacher: {config.teacher}.",
    ]
    records = records_of(every)
    verdict = _verdict(records)
    page = report(
        every,
        out=out / "report.html",
        title="xdfast demo: few labels, one teacher",
        notes=[*notes, *verdict],
        measure_speed=config.measure_speed,
    )
    if config.progress:
        console = Console()
        console.print(method_table(records, metrics=("top1", "knn")))
        for line in [*notes, *verdict]:
            console.print(line, highlight=False)
        console.print(f"report: {page.path}")
        console.print("`make demo-robot` takes a distilled encoder into a robot's policy and closes the loop")
    return DemoResult(teacher, runs, page, verdict)


def _verdict(records: list[Any]) -> list[str]:
    """What the figures say of each method against training from scratch; no claim where the interval holds zero."""
    from xdfast.reporting import compare_to_scratch

    lines = []
    for label, told in compare_to_scratch(records).items():
        points = f"{label}: {100 * told.mean:+.1f} points top-1 against training from scratch"
        if told.half_width is None:
            lines.append(f"{points} (one seed: no interval).")
            continue
        low, high = 100 * (told.mean - told.half_width), 100 * (told.mean + told.half_width)
        sure = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        lines.append(f"{points}, 95 % interval {low:+.1f} to {high:+.1f} over {told.n} seeds: {sure}.")
    return lines


def _title(method: str) -> str:
    return {"scratch": "from scratch", "kd": "KD", "rsd": "RSD"}.get(method, method)


class _Stages:
    """Says which stage begins, how long it has been going, and when it will be over."""

    def __init__(self, total: int, enabled: bool) -> None:
        self._total, self._enabled = total, enabled
        self._done = 0
        self._began = time.monotonic()
        self._students: list[float] = []

    def stage(self, name: str) -> _Stage:
        elapsed = time.monotonic() - self._began
        left = ""
        if self._students:
            mean = sum(self._students) / len(self._students)
            left = f", about {clock(mean * (self._total - self._done))} to go"
        self.say(f"[{self._done + 1}/{self._total}] {name} ({clock(elapsed)} so far{left})")
        return _Stage(self._finished)

    def say(self, text: str) -> None:
        if self._enabled:
            log.info("%s", text)

    def _finished(self, seconds: float) -> None:
        self._done += 1
        if self._done > 1:  # the first is the teacher: no guide to the rest
            self._students.append(seconds)


class _Stage:
    def __init__(self, finished: Callable[[float], None]) -> None:
        self._finished = finished

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._finished(time.monotonic() - self._began)
