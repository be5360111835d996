"""From finished runs of robots' policies to what ``xdfast.reporting`` needs to know of them."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xdfast.pipeline.evaluate_policy import PolicyEvaluation, evaluate_policy, load_policy_evaluation
from xdfast.pipeline.folder import RunResult, load_run
from xdfast.pipeline.policy_config import EvaluatePolicyConfig

if TYPE_CHECKING:
    from xdfast.reporting import PolicyRecord
    from xdfast.robot.demos.open import Demonstrations
    from xdfast.robot.policy import DiffusionPolicy

__all__ = ["encoder_name", "policy_records"]

log = logging.getLogger("xdfast")


def policy_records(runs: Sequence[RunResult]) -> list[PolicyRecord]:
    """One record per run; a policy that was not evaluated yet is evaluated first, if its task is simulated here.

    Stages of the task are looked at once per encoder and task (in its first run): each takes some seconds.
    """
    records, staged = [], set()
    for run in runs:
        name = encoder_name(run)
        key = (run.config.get("task"), name, run.config.get("encoder"))
        records.append(_record(run, name, with_stages=key not in staged))
        staged.add(key)
    return records


def encoder_name(run: RunResult) -> str:
    """What a policy's encoder is called in tables.

    "distilled (RUN)", "fine-tuned (RUN)" for the students of our runs, with the seed left out of the run's name; "ImageNet" and the
    like for published weights; "weights FILE"; "from scratch". ", frozen" follows if it was not trained with the policy.
    """
    config = run.config
    spec = str(config.get("model"))
    name, _, weights = spec.partition("@")
    stage = _stage_before(spec)
    if stage is not None:
        label = f"{'distilled' if stage.kind == 'distill' else 'fine-tuned'} ({_without_seed(stage.path.name)})"
    elif weights:
        label = f"weights {_without_seed(Path(weights).stem)}"
    elif Path(spec).is_dir() or ("/" in spec.removeprefix("hf-hub:") and not config.get("model_pretrained")):
        label = f"student {_without_seed(Path(spec).name)}"
    elif config.get("model_pretrained") or spec.startswith("hf-hub:"):
        label = _published(name)
    elif spec.startswith("object:"):
        label = f"module {spec.removeprefix('object:')}"
    else:
        label = "from scratch"
    return f"{label}, frozen" if config.get("encoder") == "frozen" else label


def _record(run: RunResult, name: str, *, with_stages: bool) -> PolicyRecord:
    from xdfast.reporting import PolicyRecord
    from xdfast.robot.cost import count_decision

    policy = run.policy
    spec = policy.spec
    remarks: list[str] = []
    evaluation = load_policy_evaluation(run.path) or _evaluated(run, policy, remarks)
    metrics = dict(run.metrics)
    if evaluation is not None:
        metrics |= evaluation.metrics
    elif "success" in metrics:
        remarks.append(
            "its success rate is of the evaluation at the end of its training; single episodes are not known"
        )
    cost = None
    try:
        cost = count_decision(policy).to_dict()
    except Exception as error:  # a tracer can fail in any way; the rest of the report is still good
        first = (str(error) or type(error).__name__).splitlines()[0]
        remarks.append(f"the cost of a decision could not be counted: {first}")
    videos = {} if evaluation is None else {key: run.path / file for key, file in evaluation.videos.items()}
    saliency = "" if evaluation is None else evaluation.saliency
    return PolicyRecord(
        name=run.path.name,
        method=name,
        seed=run.config.get("seed"),
        kind=run.kind,
        metrics=metrics,
        history=run.history,
        config=dict(run.config),
        model_name=spec.encoder.architecture or spec.encoder.source,
        steps=int(run.config["steps"]),
        task=spec.task or str(run.config.get("task")),
        episodes=[] if evaluation is None else evaluation.episodes,
        evaluated={} if evaluation is None else evaluation.settings,
        latency={} if evaluation is None else evaluation.latency,
        cost=cost,
        videos=videos,
        saliency=run.path / saliency if saliency else None,
        stages=_stages(run, policy, remarks) if with_stages and spec.cameras else None,
        norm=spec.encoder.norm,
        source=_source(run),
        demos=int(run.metrics["demos"]) if "demos" in run.metrics else None,
        remarks=remarks,
    )


def _evaluated(run: RunResult, policy: DiffusionPolicy, remarks: list[str]) -> PolicyEvaluation | None:
    """The evaluation that is missing, or None and a remark why it cannot be made here."""
    from xdfast.robot.sim.gl import NoRendererError
    from xdfast.robot.sim.names import task_spec

    try:
        task_spec(policy.spec.task)
    except ValueError:
        remarks.append(f"was not evaluated: its task {policy.spec.task!r} is not simulated, so it has no success rate")
        return None
    log.info("%s was not evaluated yet; doing so now", run.path)
    try:
        return evaluate_policy(EvaluatePolicyConfig(model=str(run.path)), policy, run)
    except (NoRendererError, ImportError) as error:
        remarks.append(f"was not evaluated, and cannot be here: {error}")
        return None


def _stages(run: RunResult, policy: DiffusionPolicy, remarks: list[str]) -> dict[str, Any] | None:
    """Features of the demonstrations it learned from, by stage; None and a remark where they are gone."""
    from xdfast.robot.demos.errors import DemoError
    from xdfast.robot.stages import stage_separation

    try:
        demos = _demonstrations(run, policy)
        return stage_separation(policy, demos)
    except (DemoError, ValueError, ImportError) as error:
        remarks.append(f"no picture of the task's stages: {error}")
        return None


def _demonstrations(run: RunResult, policy: DiffusionPolicy) -> Demonstrations:
    """Those the run learned from; nothing is collected."""
    from xdfast.pipeline.finetune_policy import expert_folder
    from xdfast.robot.demos.open import open_demos

    config, spec = run.config, policy.spec
    given = str(config["demos"])
    if not given.isdigit():
        return open_demos(given, limit=config.get("demo_limit"), cameras=spec.cameras or None)
    env = spec.task.rpartition("/")[2]
    folder = expert_folder(
        run.path, env, spec.image_size[0], spec.cameras, config["demo_seed"], config.get("demo_noise", 0.0)
    )
    return open_demos(folder, limit=int(given))


def _stage_before(spec: str) -> RunResult | None:
    """The run of ours that made the encoder."""
    for folder in (Path(spec), Path(spec).parent):  # the run's folder, or the student in it
        if (folder / "summary.json").is_file() and (Path(spec) == folder or Path(spec).name == "student"):
            return load_run(folder)
    return None


def _source(run: RunResult) -> str:
    """For people: where the encoder came from, and how long it was trained before."""
    spec = str(run.config.get("model"))
    stage = _stage_before(spec)
    if stage is None:
        published = run.config.get("model_pretrained")
        return f"{spec}, published weights" if published else f"{spec}, random weights" if "@" not in spec else spec
    return f"{spec} ({stage.kind}, {stage.metrics.get('steps', 0):.0f} steps before)"


def _published(name: str) -> str:
    """ "ImageNet" or "DINOv2" rather than timm's tags, where that is what they mean."""
    import timm

    bare = name.removeprefix("hf-hub:").rpartition("/")[2]
    tag = bare.partition(".")[2]
    if not tag and timm.is_model(bare):
        found = timm.get_pretrained_cfg(bare)
        tag = (found.tag or "") if found is not None else ""
    for mark, label in (("dinov3", "DINOv3"), ("dinov2", "DINOv2"), ("dino", "DINO"), ("clip", "CLIP")):
        if mark in bare or mark in tag:
            return label
    if re.search(r"in(1|12|21|22)k|imagenet", tag) or not tag:
        return "ImageNet"
    return f"pretrained ({tag})"


def _without_seed(name: str) -> str:
    """``kd-s3`` → ``kd``: runs whose encoders differ in their seed are repetitions."""
    return re.sub(r"[-_.](s|seed)[-_=]?\d+$", "", name)
