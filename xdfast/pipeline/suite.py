"""``suite``: many tasks, several encoders, several seeds; run side by side, continued where it stopped, one report."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from xdfast.errors import nearest
from xdfast.pipeline.config import _Config
from xdfast.pipeline.evaluate_policy import PolicyEvaluation, load_policy_evaluation
from xdfast.pipeline.finetune_policy import open_demonstrations
from xdfast.pipeline.folder import load_run, open_folder
from xdfast.pipeline.policy_config import EVAL_SEED, PolicyConfig
from xdfast.pipeline.side_by_side import default_jobs, run_all
from xdfast.recipes import load_recipe
from xdfast.robot.sim.names import SUITES, suite, task_spec

if TYPE_CHECKING:
    from xdfast.reporting import Report

__all__ = ["SuiteConfig", "SuiteResult", "run_suite", "suite_tasks"]

log = logging.getLogger("xdfast")


@dataclass(kw_only=True)
class SuiteConfig(_Config):
    """Every encoder on every task with every seed: training, closed-loop evaluation, one table."""

    tasks: str
    """A suite (metaworld-easy, metaworld-medium, metaworld-hard, metaworld-very-hard, metaworld-50, adroit), or tasks
    separated by commas."""
    encoders: dict[str, str]
    """Name and model of each, such as scratch resnet18 distilled runs/x; "frozen:" before a model leaves it untrained."""
    out: str
    """Output folder. Run the same command again to continue."""
    policy: str = "policy-metaworld"
    """Settings of the policies: a recipe's name or a YAML file."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from it, such as steps: 1000 (in Python and in a YAML file of the suite)."""
    encoder_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Encoder → settings that differ for it alone, such as encoder_lr (likewise)."""
    demos: str | None = None
    """Folder with demonstrations, one sub-folder per task named like the task (drawer-open-v3); default: the
    policy's number from the scripted experts."""
    seeds: int = 3
    episodes: int = 50
    """Closed-loop episodes of each policy."""
    eval_seed: int = EVAL_SEED
    videos: int = 1
    """Videos of successes, and of failures, of each policy."""
    jobs: int | None = None
    """Runs side by side; default: one per GPU, or one per two cores."""
    device: str = "auto"
    progress: bool = True

    def validate(self) -> None:
        """Checks every value, and every run's settings, before any work."""
        self._positive("seeds", "episodes", "jobs")
        self._not_negative("videos", "eval_seed")
        if not self.encoders:
            raise ValueError("encoders is empty; name at least one, such as {'scratch': 'resnet18'}")
        for name in self.encoders:
            if not name or any(c in name for c in "/\\ "):
                raise ValueError(f"encoders: {name!r} becomes a folder's name; use letters, digits, - and _")
        known = {f.name for f in dataclasses.fields(PolicyConfig)}
        for key in [*self.settings, *(key for own in self.encoder_settings.values() for key in own)]:
            if key not in known:
                raise ValueError(f"settings: a policy has no setting {key!r}.{nearest(key, known)}")
        for name in self.encoder_settings:
            if name not in self.encoders:
                raise ValueError(f"encoder_settings: there is no encoder {name!r}.{nearest(name, self.encoders)}")
        for job in _jobs(self):
            job.config.validate()
            if self.demos is None and not task_spec(job.task).has_expert:
                raise ValueError(f"{job.task} has no scripted expert; give a folder of demonstrations with demos=…")


@dataclass
class SuiteResult:
    """What a suite came to.

    Attributes:
        path: its folder.
        results: (task, encoder) → evaluations, one per seed, of the runs that ended.
        failed: run → why it failed.
        report: page and JSON; None if no run ended.
    """

    path: Path
    results: dict[tuple[str, str], list[PolicyEvaluation]]
    failed: dict[str, str]
    report: Report | None

    @property
    def metrics(self) -> dict[str, float]:
        """Mean success of each encoder over tasks and seeds."""
        means: dict[str, list[float]] = {}
        for (_, encoder), found in self.results.items():
            means.setdefault(encoder, []).append(sum(r.metrics["success"] for r in found) / len(found))
        return {f"success_{name}": sum(values) / len(values) for name, values in means.items()}


def suite_tasks(tasks: str) -> list[str]:
    """Canonical names of a suite, or of tasks separated by commas.

    Raises:
        ValueError: unknown name; offers the nearest.
    """
    if tasks in SUITES:
        return suite(tasks)
    return [task_spec(name.strip()).name for name in tasks.split(",") if name.strip()]


def run_suite(config: SuiteConfig | None = None, **settings: Any) -> SuiteResult:
    """Trains and evaluates every policy of a suite.

    Each run is a process of its own in ``OUT/TASK/ENCODER-seedN``, an ordinary run's folder: killed at any moment, the same
    call skips what is finished and continues the rest. A run that fails leaves its log there and does not stop the others.

    Args:
        config: all settings; or give them as keyword arguments, see :class:`SuiteConfig`.

    Raises:
        ValueError: a bad setting of the suite or of any run, or a folder that holds a run with other settings; told
            before the first one starts.
        NoRendererError: nothing can render.
    """
    from xdfast.robot.sim.gl import renderer

    config = SuiteConfig.from_dict(settings, source="run_suite()") if config is None else config
    config.validate()
    log.info("rendering with %s (%s)", *renderer())
    out = Path(config.out).expanduser()
    jobs = list(_jobs(config))
    for job in {job.task: job for job in jobs if not job.finished()}.values():
        open_demonstrations(job.config, job.folder)  # once, with all cores, before several runs want them
    at_once = config.jobs or default_jobs(config.device)
    failed = run_all(jobs, title=f"suite {config.tasks}", at_once=at_once, progress=config.progress)
    results: dict[tuple[str, str], list[PolicyEvaluation]] = {}
    ended = []
    for job in jobs:
        found = load_policy_evaluation(job.folder) if (job.folder / "summary.json").is_file() else None
        if found is not None:
            results.setdefault((job.task, job.encoder), []).append(found)
            ended.append(load_run(job.folder))
    page = None
    if ended:
        from xdfast.pipeline.report import report

        notes = [f"{run} failed: {why}" for run, why in failed.items()]
        title = f"{config.tasks}: {', '.join(config.encoders)}"
        page = report(ended, out=out / "report.html", title=title, notes=notes, measure_speed=False)
    _write_table(out, results)
    return SuiteResult(out, results, failed, page)


@dataclass
class _Job:
    """Training and evaluation of one policy (:class:`xdfast.pipeline.side_by_side.Job`)."""

    suite: SuiteConfig
    task: str
    encoder: str
    seed: int
    config: PolicyConfig

    entry: ClassVar[str] = "xdfast.pipeline.suite:_run_job"

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def name(self) -> str:
        return f"{task_spec(self.task).env}/{self.folder.name}"

    def plan(self) -> dict[str, Any]:
        suite = self.suite
        told = {
            "episodes": suite.episodes,
            "eval_seed": suite.eval_seed,
            "videos": suite.videos,
            "device": suite.device,
        }
        return {"policy": self.config.to_dict(), "evaluation": told}

    def told(self) -> str:
        found = load_policy_evaluation(self.folder)
        return f"{found.metrics['success']:.0%}" if found is not None else "failed"

    def finished(self) -> bool:
        """Whether exactly this run is there, trained and evaluated as the suite asks.

        Raises:
            ValueError: the folder holds a run with other settings or starting weights; both values are named.
        """
        if not (self.folder / "summary.json").is_file():
            return False
        open_folder(self.config, "policy")
        found = load_policy_evaluation(self.folder)
        wanted = set(range(self.suite.eval_seed, self.suite.eval_seed + self.suite.episodes))
        return found is not None and wanted <= {episode["seed"] for episode in found.episodes}


def _jobs(config: SuiteConfig) -> Iterator[_Job]:
    """Seed by seed, so that all encoders and tasks have come as far whenever it is stopped."""
    values = load_recipe(config.policy).settings
    out = Path(config.out).expanduser()
    for seed in range(config.seeds):
        for task in suite_tasks(config.tasks):
            for name, model in config.encoders.items():
                own = {"task": task, "seed": seed, "out": str(out / task_spec(task).env / f"{name}-seed{seed}")}
                own["model"] = model.removeprefix("frozen:")
                if model.startswith("frozen:"):
                    own["encoder"] = "frozen"
                if config.demos is not None:
                    own["demos"] = str(Path(config.demos).expanduser() / task_spec(task).env)
                merged = {**values, "episodes": 0, "device": config.device, **config.settings}
                merged |= {**config.encoder_settings.get(name, {}), **own}
                yield _Job(config, task, name, seed, PolicyConfig.from_dict(merged, source=config.policy))


def _run_job(plan: dict[str, Any]) -> None:
    """A run's process."""
    from xdfast.pipeline.evaluate import evaluate
    from xdfast.pipeline.finetune import finetune

    run = finetune(PolicyConfig.from_dict({**plan["policy"], "progress": True}))
    evaluate(run, **plan["evaluation"], progress=True)


def _write_table(out: Path, results: dict[tuple[str, str], list[PolicyEvaluation]]) -> None:
    """results.json: every run's success, for other people's scripts."""
    rows = [
        {"task": task, "encoder": encoder, "run": found.model, **found.metrics}
        for (task, encoder), listed in results.items()
        for found in listed
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
