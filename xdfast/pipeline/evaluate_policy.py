"""``evaluate`` for robots: closed-loop success over seeded episodes, with interval, videos and latency."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xdfast import distributed
from xdfast._optional import require
from xdfast.models import weights_hash
from xdfast.models.checkpoint import atomic_write
from xdfast.pipeline.folder import RunResult, load_run, read_record
from xdfast.pipeline.policy_config import EvaluatePolicyConfig
from xdfast.progress import ProgressLine
from xdfast.reporting.intervals import wilson_interval
from xdfast.robot.policy import DiffusionPolicy
from xdfast.robot.policy_files import load_policy
from xdfast.robot.rollout import EpisodeResult, check_task, film, rollout
from xdfast.robot.runner import measure_latency
from xdfast.robot.sim.names import task_spec
from xdfast.robot.vla.paths import EpisodePaths, PathRecorder

if TYPE_CHECKING:
    from xdfast.robot.vla import CompactVLA, InstructedVLA

__all__ = ["PolicyEvaluation", "evaluate_policy", "load_policy_evaluation"]

log = logging.getLogger("xdfast")

EVALUATION_FILE = "evaluation.json"
SALIENCY_FILE = "saliency.png"
_EPISODES_FILE = "episodes.jsonl"


@dataclass
class PolicyEvaluation:
    """How a policy did in simulation.

    Attributes:
        model: name of the run.
        path: its folder, with evaluation.json, episodes.jsonl, videos/, saliency.png.
        task: in which it acted.
        metrics: success (rate in [0, 1]), success_low and success_high (Wilson's 95 % interval), episodes, solved,
            mean_steps (of the solved ones), latency_ms (median of one decision); of a routed VLA flops_fraction, FLOPs its
            transformer executed over those of the dense one.
        episodes: seed, success and steps of each.
        videos: outcome ("success-SEED", "failure-SEED") → file in ``path``.
        latency: of one decision on synthetic pictures, milliseconds; see :class:`xdfast.robot.runner.Latency`. A routed VLA may
            take another path there than in its task; :func:`xdfast.robot.vla.cost.measure_vla` times it on real ones.
        saliency: file in ``path`` with what the encoder looked at over an episode; empty if there is none.
        settings: ``which`` policy of the run, and ``max_steps`` of an episode (None: the task's).
        routing: of a routed VLA, which layers ran: :meth:`xdfast.robot.vla.paths.PathRecorder.summary` over all decisions of
            the episodes; {} for others.
    """

    model: str
    path: Path | None
    task: str
    metrics: dict[str, float]
    episodes: list[dict[str, Any]] = field(default_factory=list)
    videos: dict[str, str] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)
    saliency: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**dataclasses.asdict(self), "path": str(self.path) if self.path else None}

    def __repr__(self) -> str:
        low, high = self.metrics["success_low"], self.metrics["success_high"]
        return (
            f"PolicyEvaluation({self.model} on {self.task}: {self.metrics['success']:.1%} of "
            f"{self.metrics['episodes']:.0f} episodes, 95 % interval {low:.1%}–{high:.1%})"
        )


def evaluate_policy(
    config: EvaluatePolicyConfig,
    policy: DiffusionPolicy | CompactVLA | InstructedVLA | None = None,
    run: RunResult | None = None,
) -> PolicyEvaluation:
    """Runs the episodes that are not in the folder yet and sums up; see :func:`xdfast.evaluate`.

    Raises:
        ValueError: bad settings, or a policy that does not fit the task, or learned another (``other_task`` allows that).
        FileNotFoundError: no policy.
        NoRendererError, WorkerError: of the simulator; finished episodes are kept.
        RuntimeError: under torchrun with several processes.
    """
    config.validate()
    distributed.init()
    if distributed.world_size() > 1:
        raise RuntimeError(
            "a policy is evaluated in one process: leave out torchrun, or let `xdfast suite` run many side by side"
        )
    if run is None and policy is None:
        run = load_run(config.model)
    told = run is not None and run.kind == "vla"
    if policy is None:
        assert run is not None
        policy = run.policy if told else load_policy(_which(run.path, config.which))
    policy = _told_policy(policy, config, "the policy" if run is None else str(run.path))
    task = config.task or policy.spec.task
    if not task:
        raise ValueError(
            "the policy does not know its task; name one: evaluate(policy, task='metaworld/drawer-open-v3')"
        )
    task = task_spec(task).name
    check_task(policy, task)
    if policy.spec.task and task not in policy.spec.task.split(", "):
        if not config.other_task:
            raise ValueError(
                f"the policy learned {policy.spec.task}, not {task}; to see how it does there all the same: other_task=True "
                "(--other-task)"
            )
        log.warning("the policy learned %s, it is evaluated on %s", policy.spec.task, task)
    out = Path(config.out).expanduser() if config.out else run.path if run is not None else None
    name = run.path.name if run is not None else "policy"
    if told and not config.out:
        assert out is not None
        out = out / "tasks" / task_spec(task).env
    device = distributed.device_for_rank(config.device)
    key = {
        "policy": weights_hash(policy),
        "task": task,
        "max_steps": config.max_steps,
        "simulators": _simulators(task),
        "xdfast_episodes": 1,
    }
    log_file = _EpisodeLog(out, key)
    seeds = range(config.eval_seed, config.eval_seed + config.episodes)
    missing = [seed for seed in seeds if seed not in log_file.done]
    if len(missing) < len(seeds):
        log.info("%d of %d episodes are there from before", len(seeds) - len(missing), len(seeds))
    line = ProgressLine(f"{name} on {task}", len(seeds), len(seeds) - len(missing), enabled=config.progress)
    solved = [log_file.done[seed].success for seed in seeds if seed in log_file.done]

    recorder = PathRecorder.of(policy)
    if recorder is not None:
        for seed, known in log_file.paths.items():
            recorder.add(seed, known)

    def tell(result: EpisodeResult) -> None:
        log_file.add(result, None if recorder is None else recorder.episode(result.seed))
        solved.append(result.success)
        line.update(len(solved), f"{sum(solved)} solved")

    rollout(
        policy, task, missing, envs=config.envs, max_steps=config.max_steps, device=device, on_episode=tell, on_decision=recorder
    )  # fmt: skip
    line.close(f"{sum(solved)} of {len(solved)} episodes solved")
    results = [log_file.done[seed] for seed in seeds]
    routing = {} if recorder is None else recorder.summary(seeds)
    latency = measure_latency(policy, device=device)
    result = PolicyEvaluation(
        model=name,
        path=out,
        task=task,
        metrics={
            **_metrics(results),
            "latency_ms": latency.p50,
            **({"flops_fraction": routing["fraction"]} if routing else {}),
        },
        episodes=[{"seed": r.seed, "success": r.success, "steps": r.steps} for r in results],
        latency=dataclasses.asdict(latency),
        settings={"which": config.which, "max_steps": config.max_steps},
        routing=routing,
    )
    if out is not None:
        result.videos, result.saliency = _film(config, policy, task, results, out)
        text = json.dumps(result.to_dict(), indent=2)
        atomic_write(out / EVALUATION_FILE, lambda aside: aside.write_text(text, encoding="utf-8"))
    return result


def load_policy_evaluation(path: Path) -> PolicyEvaluation | None:
    """What an earlier ``evaluate`` left in a policy's folder, or None.

    Raises:
        CheckpointError: its file is damaged.
    """
    file = path / EVALUATION_FILE
    if not file.is_file():
        return None
    known = [field.name for field in dataclasses.fields(PolicyEvaluation)]
    values = read_record(file, {"model": str, "task": str, "metrics": dict}, known)
    return PolicyEvaluation(**{**values, "path": path})


def _told_policy(policy: Any, config: EvaluatePolicyConfig, name: str) -> DiffusionPolicy | InstructedVLA:
    """A policy of several tasks, told what the task asks for; others as they are."""
    if not hasattr(policy, "for_task"):
        return policy
    if config.task is None:
        first = f"; name one: task={policy.spec.tasks[0]!r}" if policy.spec.tasks else ""
        raise ValueError(f"{name} knows {len(policy.spec.tasks)} tasks{first}")
    if config.which == "best":
        raise ValueError("of a policy of several tasks the last one is kept; leave out which='best'")
    return policy.for_task(config.task)


def _which(folder: Path, which: str) -> Path:
    if which == "last":
        return folder / "policy"
    best = folder / "policy-best"
    if not best.is_dir():
        raise FileNotFoundError(f"{best} is not there: the run was not evaluated while it trained (evaluate_every)")
    return best


def _metrics(results: list[EpisodeResult]) -> dict[str, float]:
    solved = [r for r in results if r.success]
    low, high = wilson_interval(len(solved), len(results))
    metrics = {
        "success": len(solved) / len(results),
        "success_low": low,
        "success_high": high,
        "episodes": float(len(results)),
        "solved": float(len(solved)),
    }
    return metrics | ({"mean_steps": float(np.mean([r.steps for r in solved]))} if solved else {})


def _film(
    config: EvaluatePolicyConfig,
    policy: DiffusionPolicy | InstructedVLA,
    task: str,
    results: list[EpisodeResult],
    out: Path,
) -> tuple[dict[str, str], str]:
    """Videos of the first successes and failures, played again from their actions, and the saliency of the first of them."""
    chosen = [r for r in results if r.success][: config.videos] + [r for r in results if not r.success][: config.videos]
    names = [f"{'success' if r.success else 'failure'}-{r.seed}" for r in chosen]
    if not policy.spec.cameras:
        return {}, ""
    saliency = config.saliency and isinstance(policy, DiffusionPolicy) and _can_explain()
    with tempfile.TemporaryDirectory() as aside:
        paths = [out / "videos" / f"{name}.mp4" for name in names]
        if not chosen and saliency:  # no video is wanted, but its observations are
            chosen = [next((r for r in results if r.success), results[0])]
            paths = [Path(aside) / "episode.mp4"]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        seen = film(policy, task, chosen, paths, max_steps=config.max_steps)
    drawn = saliency and _explain(policy, task, chosen[0], seen[0], out / SALIENCY_FILE)
    return {name: f"videos/{name}.mp4" for name in names}, SALIENCY_FILE if drawn else ""


def _can_explain() -> bool:
    try:
        require("captum", extra="analysis", purpose="saliency maps")
    except ImportError as error:
        log.warning("no saliency film strip: %s; saliency=False says nothing", error)
        return False
    return True


def _explain(policy: Any, task: str, episode: EpisodeResult, seen: list[Any], file: Path) -> bool:
    """Whether there is a picture: an encoder may have no layer that keeps positions."""
    from xdfast.robot.saliency import film_strip

    outcome = "solved" if episode.success else "not solved"
    try:
        picture = film_strip(policy, seen, title=f"{task}, seed {episode.seed}, {outcome}")
    except ValueError as error:
        log.warning("no saliency film strip: %s", error)
        return False
    atomic_write(file, lambda aside: aside.write_bytes(picture))
    return True


class _EpisodeLog:
    """Episodes as they end, one line each, of a routed VLA with its paths; those of another policy, task or simulator are
    thrown away."""

    def __init__(self, folder: Path | None, key: dict[str, Any]) -> None:
        self.done: dict[int, EpisodeResult] = {}
        self.paths: dict[int, EpisodePaths] = {}
        self._path = None if folder is None else folder / _EPISODES_FILE
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        if self._path.is_file():
            for text in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(text))
                except json.JSONDecodeError:
                    log.warning("%s: an unfinished line is left out", self._path)
        if rows and rows[0] == key:
            for row in rows[1:]:
                data = np.frombuffer(base64.b64decode(row["actions"]), dtype="<f4")
                result = EpisodeResult(row["seed"], row["success"], row["steps"], data.reshape(row["steps"], -1))
                self.done[result.seed] = result
                if "paths" in row:
                    self.paths[result.seed] = EpisodePaths(row["paths"], row["executor"])
        elif rows:
            log.info("%s holds episodes of another policy or task; evaluating anew", self._path)
        # written anew: a line cut by a kill would otherwise run into the next one
        lines = [json.dumps(row) for row in ([key] + (rows[1:] if self.done else []))]
        atomic_write(self._path, lambda aside: aside.write_text("\n".join(lines) + "\n", encoding="utf-8"))

    def add(self, result: EpisodeResult, paths: EpisodePaths | None = None) -> None:
        self.done[result.seed] = result
        if self._path is None:
            return
        actions = base64.b64encode(np.ascontiguousarray(result.actions, dtype="<f4").tobytes()).decode()
        row = {"seed": result.seed, "success": result.success, "steps": result.steps, "actions": actions}
        if paths is not None:
            row |= dataclasses.asdict(paths)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _simulators(task: str) -> dict[str, str]:
    """Versions of what determines an episode besides its seed."""
    import importlib.metadata

    package = "metaworld" if task.startswith("metaworld/") else "gymnasium-robotics"
    return {name: importlib.metadata.version(name) for name in ("mujoco", package)}
