"""``compare``: methods × pairs of teacher and student × seeds, run in turns and continued, with tables, intervals and costs."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from xdfast.errors import nearest
from xdfast.models.checkpoint import atomic_write
from xdfast.models.own import allow, is_own
from xdfast.pipeline.config import DistillConfig, FinetuneConfig, _Config
from xdfast.pipeline.folder import RunResult, load_run, open_folder
from xdfast.pipeline.side_by_side import default_jobs, run_all

if TYPE_CHECKING:
    from xdfast.reporting import Report

__all__ = ["CompareConfig", "CompareResult", "Pair", "compare"]

log = logging.getLogger("xdfast")

#: Of a run's own process: what training took at its worst moment.
COST_FILE = "cost.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]*")


@dataclass(kw_only=True)
class Pair:
    """A teacher and a student.

    Attributes:
        teacher: what ``distill`` takes as teacher; or settings of ``finetune``, such as ``{"model": "resnet18", "epochs": 20}``:
            then the teacher is trained once, in ``OUT/PAIR/teacher``; or ``{"of": "cnn-vit"}``: the teacher of that pair.
        student: what ``distill`` takes as student.
        settings: that differ for this pair's students, such as ``optimizer``.
    """

    teacher: str | dict[str, Any]
    student: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class CompareConfig(_Config):
    """Every method on every pair of teacher and student with every seed: one table per pair, with intervals and costs."""

    data: str
    """Training images, as `xdfast distill --data`."""
    val_data: str | None = None
    """Validation images; default: the val/ part of `data`, or a stratified split of it."""
    pairs: dict[str, dict[str, Any]]
    """Name → teacher, student, settings of its students; in a YAML file or in Python."""
    methods: dict[str, dict[str, Any]]
    """Name → settings of `xdfast distill`, such as {loss: dkd}; without a loss: from scratch."""
    out: str
    """Output folder. Run the same command again to continue."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of all runs, teachers included."""
    student_settings: dict[str, Any] = field(default_factory=dict)
    """Of all students."""
    seeds: int = 3
    """Repetitions of each method, with seeds 0, 1, …"""
    only_pairs: tuple[str, ...] = ()
    """Of these pairs alone; default: all."""
    only_methods: tuple[str, ...] = ()
    """Of these methods alone; default: all."""
    jobs: int | None = None
    """Runs side by side; default: one per GPU, or one per two cores. Costs are comparable if nothing else runs."""
    device: str = "auto"
    pages: bool = True
    """Also a page for each pair, for which every run is evaluated further (k-NN, linear probe, CKA)."""
    measure_speed: bool = True
    """Measure the models' latency for the pages."""
    progress: bool = True

    def validate(self) -> None:
        """Checks every value, and every run's settings, before any work.

        Raises:
            ValueError: names the pair or method, the setting and its value.
        """
        self._positive("seeds", "jobs")
        for what, given, only in (
            ("pairs", self.pairs, self.only_pairs),
            ("methods", self.methods, self.only_methods),
        ):
            if not given:
                raise ValueError(f"{what} is empty; name at least one")
            for name in given:
                if not _NAME.fullmatch(name):
                    raise ValueError(
                        f"{what}: {name!r} becomes a folder's name; use letters, digits, '.', '+', '-' and '_'"
                    )
            for name in only:
                if name not in given:
                    raise ValueError(
                        f"only_{what}: there is no {name!r}; known: {', '.join(given)}.{nearest(name, given)}"
                    )
        for name, given in self.pairs.items():
            known = {f.name for f in dataclasses.fields(Pair)}
            for key in given:
                if key not in known:
                    raise ValueError(
                        f"pairs: {name} has no {key!r}; a pair has {', '.join(sorted(known))}.{nearest(key, known)}"
                    )
            for key in ("teacher", "student"):
                if not given.get(key):
                    raise ValueError(f"pairs: {name} names no {key}")
            of = _of(given["teacher"])
            if of is not None and (given["teacher"] != {"of": of} or of not in self.pairs):
                raise ValueError(
                    f"pairs: {name} takes the teacher of {of!r}, which must be another pair, and nothing else beside it."
                    f"{nearest(str(of), self.pairs)}"
                )
            if of is not None and _of(self.pairs[of].get("teacher")) is not None:
                raise ValueError(f"pairs: {name} takes the teacher of {of!r}, which has none of its own")
        for job in [*_teachers(self), *_students(self)]:
            job.config.validate()


@dataclass
class CompareResult:
    """What a comparison came to.

    Attributes:
        path: its folder, with ``compare.json``, ``compare.md``, ``compare.png``.
        rows: one per pair and method, in order; see :func:`table_rows`.
        failed: run → why it failed.
        reports: pair → its page.
    """

    path: Path
    rows: list[dict[str, Any]]
    failed: dict[str, str]
    reports: dict[str, Report]

    @property
    def metrics(self) -> dict[str, float]:
        """Mean top-1 of each method on each pair."""
        return {f"{row['pair']}/{row['method']}": row["top1"]["mean"] for row in self.rows if row["top1"]}


def compare(config: CompareConfig | None = None, **settings: Any) -> CompareResult:
    """Trains every student of a comparison and writes tables and pages.

    Each run is a process of its own in ``OUT/PAIR/METHOD-seedN``, an ordinary run's folder; methods take turns seed by seed, so
    that whatever else a machine does falls on all of them. Killed at any moment, the same call skips what is finished and
    continues the rest. All students of a pair have the same images, steps, augmentation and schedule unless a method's own
    settings say otherwise; the table tells top-1 (of the last epoch, no choice among epochs), its difference from training from
    scratch paired by seed, time of a step, peak memory, and the parameters that the method trains beside the student.

    Args:
        config: all settings; or give them as keyword arguments, see :class:`CompareConfig`.

    Raises:
        ValueError: a bad setting of the comparison or of any run, or a folder that holds a run with other settings; told before
            the first one starts.

    Example:
        >>> xdfast.compare(
        ...     data="sklearn:digits", out="runs/compare", settings={"epochs": 20},
        ...     pairs={"vit-cnn": {"teacher": "runs/teacher", "student": "resnet18"}},
        ...     methods={"scratch": {}, "kd": {"loss": "kd"}, "rsd": {"loss": "rsd"}},
        ... )  # doctest: +SKIP
    """
    config = CompareConfig.from_dict(settings, source="compare()") if config is None else config
    config.validate()
    for pair in (
        config.pairs.values()
    ):  # code that the file names may be loaded from its students' folders, here and in all runs
        for spec in (pair["student"], pair["teacher"].get("model") if isinstance(pair["teacher"], dict) else None):
            if isinstance(spec, str) and is_own(spec):
                allow(spec)
    at_once = config.jobs or default_jobs(config.device)
    students = list(_students(config))
    for job in students:
        job.finished()  # a folder with other settings is told before hours of training
    failed: dict[str, str] = {}
    for title, jobs in (("teachers", list(_teachers(config))), ("students", students)):
        ready = [job for job in jobs if f"{_owner(config, job.pair)}/teacher" not in failed]
        failed |= run_all(ready, title=title, at_once=at_once, progress=config.progress)
    return _conclude(config, [job for job in students if job.name not in failed], failed)


@dataclass
class _Cell:
    """One run (:class:`xdfast.pipeline.side_by_side.Job`)."""

    pair: str
    method: str
    config: DistillConfig | FinetuneConfig

    entry: ClassVar[str] = "xdfast.pipeline.compare:_run_cell"

    @property
    def folder(self) -> Path:
        return Path(self.config.out).expanduser()

    @property
    def name(self) -> str:
        return f"{self.pair}/{self.folder.name}"

    @property
    def kind(self) -> str:
        return "distill" if isinstance(self.config, DistillConfig) else "finetune"

    def plan(self) -> dict[str, Any]:
        return {"kind": self.kind, "config": self.config.to_dict()}

    def finished(self) -> bool:
        """Whether exactly this run is there.

        Raises:
            ValueError: the folder holds a run with other settings or starting weights; both values are named.
        """
        if not (self.folder / "summary.json").is_file():
            return False
        return open_folder(self.config, self.kind)[1] is not None

    def told(self) -> str:
        top1 = load_run(self.folder).metrics.get("top1")
        return "done" if top1 is None else f"top-1 {top1:.1%}"


def _pairs(config: CompareConfig) -> dict[str, Pair]:
    return {name: Pair(**given) for name, given in config.pairs.items() if name in (config.only_pairs or config.pairs)}


def _methods(config: CompareConfig) -> dict[str, dict[str, Any]]:
    chosen = config.only_methods or config.methods
    return {name: given or {} for name, given in config.methods.items() if name in chosen}


def _shared(config: CompareConfig) -> dict[str, Any]:
    return {"data": config.data, "val_data": config.val_data, "device": config.device, **config.settings}


def _of(teacher: Any) -> Any:
    """Whose teacher a pair takes, or None."""
    return teacher.get("of") if isinstance(teacher, dict) else None


def _owner(config: CompareConfig, pair: str) -> str:
    """The pair whose teacher this one has: itself, unless it says ``of``."""
    return _of(config.pairs[pair]["teacher"]) or pair


def _teacher(config: CompareConfig, pair: str) -> str:
    """What ``distill`` takes: the folder of a teacher that is trained here, or what is given."""
    owner = _owner(config, pair)
    given = config.pairs[owner]["teacher"]
    return str(Path(config.out) / owner / "teacher") if isinstance(given, dict) else given


def _teachers(config: CompareConfig) -> Iterator[_Cell]:
    for name in dict.fromkeys(_owner(config, name) for name in _pairs(config)):
        given = config.pairs[name]["teacher"]
        if isinstance(given, dict):
            values = _shared(config) | given | {"out": _teacher(config, name)}
            yield _Cell(name, "teacher", FinetuneConfig.from_dict(values, source=f"teacher of {name}"))


def _students(config: CompareConfig) -> Iterator[_Cell]:
    """Seed by seed, so that all methods have come as far whenever it is stopped."""
    for seed in range(config.seeds):
        for name, pair in _pairs(config).items():
            for method, own in _methods(config).items():
                values = _shared(config) | config.student_settings | pair.settings | own
                values |= {"seed": seed, "out": str(Path(config.out) / name / f"{method}-seed{seed}")}
                where = f"{name}, {method}"
                if "loss" not in own:
                    made: Any = FinetuneConfig.from_dict({**values, "model": pair.student}, source=where)
                else:
                    values = {**values, "teacher": _teacher(config, name), "student": pair.student, "monitor": 0}
                    made = DistillConfig.from_dict(values, source=where)
                yield _Cell(name, method, made)


def _run_cell(plan: dict[str, Any]) -> None:
    """A run's process."""
    from xdfast.pipeline.distill import distill
    from xdfast.pipeline.finetune import finetune

    if plan["kind"] == "distill":
        run = distill(DistillConfig.from_dict(plan["config"]))
    else:
        run = finetune(FinetuneConfig.from_dict(plan["config"]))
    _write(run.path / COST_FILE, json.dumps(_cost(run), indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    atomic_write(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def _cost(run: RunResult) -> dict[str, Any]:
    """Peak memory of this process (on a GPU: of its tensors), and what was trained beside the student."""
    import resource

    import torch

    from xdfast.pipeline.folder import PROJECTORS_FILE

    projectors = run.path / PROJECTORS_FILE
    extra = 0
    if projectors.is_file():
        from safetensors import safe_open

        with safe_open(projectors, "pt") as file:
            extra = sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118 (no dict)
    on_gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": int(peak), "of": "GPU tensors" if on_gpu else "process", "extra_parameters": extra}


def _conclude(config: CompareConfig, cells: list[_Cell], failed: dict[str, str]) -> CompareResult:
    from xdfast.pipeline.compare_table import markdown, picture, table_rows
    from xdfast.reporting.content import environment

    out = Path(config.out).expanduser()
    runs: dict[str, dict[str, list[RunResult]]] = {}
    for cell in cells:
        if (cell.folder / "summary.json").is_file():
            runs.setdefault(cell.pair, {}).setdefault(cell.method, []).append(load_run(cell.folder))
    rows = [row for pair, methods in runs.items() for row in table_rows(pair, methods, _teacher_top1(config, pair))]
    told = {
        "data": config.data,
        "val_data": config.val_data,
        "settings": {**config.settings, **config.student_settings},
        "pairs": {
            n: given for n, given in config.pairs.items() if n in {*runs, *(_owner(config, run) for run in runs)}
        },
        "methods": config.methods,
        "seeds": config.seeds,
        "environment": environment(),
        "rows": rows,
        "failed": failed,
    }
    if rows:
        _write(out / "compare.json", json.dumps(told, indent=2, default=str) + "\n")
        _write(out / "compare.md", markdown(rows))
        picture(rows, out / "compare.png")
    reports = {}
    for pair, methods in runs.items() if config.pages else ():
        reports[pair] = _page(config, pair, [run for listed in methods.values() for run in listed], out)
    return CompareResult(out, rows, failed, reports)


def _page(config: CompareConfig, pair: str, runs: list[RunResult], out: Path) -> Report:
    from xdfast.pipeline.report import report

    return report(runs, out=out / pair / "report.html", title=f"Comparison: {pair}", measure_speed=config.measure_speed)


def _teacher_top1(config: CompareConfig, pair: str) -> float | None:
    folder = Path(_teacher(config, pair)).expanduser()
    return load_run(folder).metrics.get("top1") if (folder / "summary.json").is_file() else None
