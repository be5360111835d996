"""``distill`` of a VLA: ActDistill's two stages, from a teacher's run to a routed student's."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xdfast import distributed
from xdfast.models import weights_hash
from xdfast.nn import block_influence, calibrate_model, routed_stacks
from xdfast.nn.lora import merge_lora
from xdfast.ops._costs import check_always_on, check_reachable
from xdfast.pipeline.actdistill_config import ActDistillConfig
from xdfast.pipeline.actdistill_stage1 import run_stage1
from xdfast.pipeline.actdistill_task import ActDistillTask, embedded
from xdfast.pipeline.alone import alone_in
from xdfast.pipeline.folder import RunResult, finish, load_run, open_folder
from xdfast.pipeline.loop import train
from xdfast.pipeline.vla_tasks import evaluate_tasks, task_demonstrations
from xdfast.robot.sim.names import task_spec
from xdfast.robot.vla import (
    MultiTaskWindows,
    ViewLoader,
    check_teacher,
    derive_student,
    hidden_states,
    load_vla,
    save_vla,
    task_experts,
    task_paths,
)

__all__ = ["check_samples", "distill_vla"]

log = logging.getLogger("xdfast")

#: Samples by which layers are chosen and thresholds set.
_CALIBRATION = 512

#: Samples of a task by which its first path is chosen.
_PER_TASK = 64

#: A larger share of samples that take an untrained path after calibration is told.
_UNTRAINED = 0.05


def distill_vla(config: ActDistillConfig, teacher: Any = None) -> RunResult:
    """Stage 1 and stage 2; see :func:`xdfast.distill`.

    Args:
        config: settings.
        teacher: a model, such as a :class:`xdfast.robot.vla.CompactVLA`, where the config cannot name it.

    Raises:
        ValueError: bad settings; a teacher that is routed or has no demonstrations; demonstrations that do not fit it, or
            hold actions that are not finite; stage 1 of another teacher.
        FileNotFoundError: no teacher.
        TypeError: a teacher without the parts of :class:`xdfast.robot.vla.TeacherVLA`.
    """
    config.validate()
    distributed.init()
    vla, trained = _teacher(config, teacher)
    layers = vla.num_layers  # alike: now, not after stage 1
    check_reachable(config.target_flops, check_always_on(config.always_on, layers), torch.ones(layers, 1))
    out, finished = open_folder(config, "vla")
    if finished is not None:
        log.info("%s is finished; returning its result", out)
        return finished
    device = distributed.device_for_rank(config.device)
    vla = vla.to(device).eval().requires_grad_(False)
    loader, fingerprints = _samples(config, vla, trained, out)
    distributed.all_equal(fingerprints, "the run's demonstrations")
    with alone_in(out):
        first = run_stage1(config, vla, loader, fingerprints, device)
        student = derive_student(
            vla,
            config.target_flops,
            routing=config.routing,
            always_on=config.always_on,
            states=_states(vla, loader, device) if _by_influence(config) else None,
            lora=config.lora_rank if config.train == "lora" else None,
            router={"hidden": config.router_hidden, "standardise": config.router_standardise},
            seed=config.seed,
        )
        starts = None
        if config.routing == "learned" and config.router_start in ("tasks", "experts"):
            influence = block_influence(_states(vla, loader, device)) if config.router_start == "experts" else None
            starts = _start_by_tasks(student, loader, config, device, influence)
        _trainable(student, config)
        identity = {"teacher": weights_hash(vla), "stage1": first.store.facts, "samples": len(loader.data)}
        del vla  # its answers are in the store
        task = ActDistillTask(student, copy.deepcopy(first.heads).requires_grad_(True), first.targets, config, starts)

        def validate(net: nn.Module) -> dict[str, float]:
            if not config.episodes:
                return {}
            return evaluate_tasks(_exported(net, loader, config, device), loader.data.tasks, config, device)

        result = train(task, loader, config, out, device=device, validate=validate, identity=identity, title=out.name)
    student = _exported(result.module, loader, config, device)
    fraction, taken, tasks = _usage(student, loader, device)
    paths = Counter(taken)
    own = None if starts is None else _own(taken, tasks, starts)
    if distributed.is_main():
        log.info("%s: %.1f %% of the layers' FLOPs on the training samples", out, 100 * fraction)
        if own is not None and own < 1 - _UNTRAINED and config.router_delay == 1:
            log.warning(
                "the router sends %.0f %% of the training samples down another task's path, which was not trained on them: it "
                "cannot tell the tasks apart by pictures and words, or needs a higher router_lr",
                100 * (1 - own),
            )
        if config.routing == "learned" and len(paths) == 1 and config.target_flops < 1:
            log.info(
                "the router sends every sample the same way (%s): layers pruned for good would cost the same without a "
                "router; router_standardise=True with balance_weight > 0 makes it tell them apart",
                paths.most_common()[0][0],
            )
        facts = {"kind": "vla", "config": config.to_dict(), "metrics": result.metrics}
        save_vla(student, out / "vla", extra=facts)
    metrics = {
        **result.metrics,
        "flops_fraction": fraction,
        "distinct_paths": float(len(paths)),
        **({} if own is None else {"own_path": own}),
        "target_flops": config.target_flops,
        "seconds": result.seconds,
        "seconds_stage1": first.metrics["seconds"],
        "steps": result.step,
        "samples_per_s": result.step * loader.rows(0) / max(result.seconds, 1e-9),
        "tasks": float(len(loader.data.tasks)),
    }
    return finish(out, "vla", config, metrics, {})


def _teacher(config: ActDistillConfig, given: Any) -> tuple[Any, dict[str, Any]]:
    """(the VLA, the settings it was trained with, empty if they are not known)."""
    if isinstance(given, RunResult):
        given = str(given.path)
    if given is not None and not isinstance(given, (str, Path)):
        check_teacher(given)
        return copy.deepcopy(given), {}
    folder = Path(config.teacher).expanduser()
    if config.teacher.startswith("object:"):
        raise ValueError(f"the run was started with a Python object ({config.teacher}); pass that object again")
    vla = load_vla(folder)
    check_teacher(vla)
    if routed_stacks(vla):
        raise ValueError(f"{folder} is a student whose layers are routed already; name its teacher")
    trained = load_run(folder).config if (folder / "summary.json").is_file() else {}
    return vla, trained


def _samples(config: ActDistillConfig, vla: Any, trained: dict[str, Any], out: Path) -> tuple[ViewLoader, list[Any]]:
    """The demonstrations as samples with views, and their fingerprints."""
    spec = vla.spec
    tasks = [task_spec(name).name for name in (config.tasks or trained.get("tasks") or spec.tasks)]
    demos = config.demos or str(trained.get("demos", ""))
    if not tasks or not demos:
        missing = "tasks" if not tasks else "demos"
        raise ValueError(f"{config.teacher} does not say which {missing} it was trained on; give {missing}=")
    seed = trained.get("demo_seed", 0) if config.demo_seed is None else config.demo_seed
    noise = trained.get("demo_noise", 0.0) if config.demo_noise is None else config.demo_noise
    beside = Path(config.teacher).expanduser()  # an expert's demonstrations lie beside the run they were collected for
    home = beside if trained and (beside.parent / "demos").is_dir() else out
    opened = [
        task_demonstrations(
            demos,
            name,
            spec.cameras,
            home,
            demo_seed=seed,
            demo_noise=noise,
            image_size=spec.image_size[0],
            workers=config.workers,
            progress=config.progress,
        )
        for name in tasks
    ]
    data = MultiTaskWindows(
        opened, spec.cameras, horizon=spec.horizon, image_size=spec.image_size, tasks=tasks, scratch=out
    )
    check_samples(data, vla)
    loader = ViewLoader(
        data, vla.tokenizer, spec.text_length, config.batch_size, config.epoch_steps,
        views=config.views, shift=_shift(spec) if config.shift is None else config.shift,
        seed=config.seed, rank=distributed.rank(), world_size=distributed.world_size(),
    )  # fmt: skip
    return loader, [d.fingerprint() for d in opened]


def _shift(spec: Any) -> int:
    """What the teacher's crop leaves on each side; a sixteenth of the picture where it has none."""
    side = min(spec.image_size)
    return (side - spec.crop) // 2 if hasattr(spec, "crop") else side // 16


def check_samples(data: MultiTaskWindows, vla: Any) -> None:
    """Whether a teacher can learn from samples.

    Raises:
        ValueError: actions or states of another size than its own, or not finite; names the task and the frames.
    """
    for name, windows in zip(data.tasks, data.windows):
        for what, mine, theirs in (
            ("actions", windows.actions, vla.action_dim),
            ("states", windows.state, vla.spec.state_dim),
        ):
            if mine.shape[1] != theirs:
                raise ValueError(
                    f"the demonstrations of {name} have {what} of {mine.shape[1]} numbers, the teacher's have {theirs}"
                )
            bad = (~mine.isfinite()).any(1).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"the demonstrations of {name} have {what} that are not finite (NaN or infinity) in {len(bad)} frames, "
                    f"first {bad[:4]}; `xdfast demos check` names the files"
                )


def _trainable(student: Any, config: ActDistillConfig) -> None:
    """Everything learns, but with adapters: then they and the router alone."""
    if config.train != "lora":
        student.requires_grad_(True)
        return
    adapters = {id(p) for name, p in student.named_parameters() if name.endswith(("lora_a", "lora_b"))}
    stack: Any = routed_stacks(student)[0]
    router = {id(p) for p in stack.router.parameters()}
    for parameter in student.parameters():
        parameter.requires_grad_(id(parameter) in adapters | router)


def _batches(loader: ViewLoader, device: torch.device) -> list[Any]:
    """Samples spread over all tasks, as a policy sees them when it acts (view 0)."""
    count = len(loader.data)
    ids = torch.linspace(0, count - 1, min(_CALIBRATION, count)).long().unique()
    # every batch of all tasks, as in training: ids lie task by task, and statistics over one task are those of no other
    parts = [ids[first :: math.ceil(len(ids) / 64)] for first in range(math.ceil(len(ids) / 64))]
    return [_read(loader, part, torch.zeros_like(part), device) for part in parts]


def _by_influence(config: ActDistillConfig) -> bool:
    return config.routing == "static" or (config.routing == "learned" and config.router_start == "influence")


@torch.no_grad()
def _states(vla: Any, loader: ViewLoader, device: torch.device) -> list[torch.Tensor]:
    """h₀ … h_L of the teacher on samples of all tasks."""
    parts = [hidden_states(vla.layers, embedded(vla, batch)) for batch in _batches(loader, device)]
    return [torch.cat(layer) for layer in zip(*parts)]


@torch.no_grad()
def _start_by_tasks(
    student: Any, loader: ViewLoader, config: ActDistillConfig, device: torch.device, influence: torch.Tensor | None
) -> torch.Tensor:
    """The router begins with a path for each task, told from its words and pictures: of copies of the most influential layers
    (:func:`xdfast.robot.vla.task_experts`), or without an influence of those it needs (:func:`xdfast.robot.vla.task_paths`)."""
    ends = loader.data.starts.tolist()
    chosen = [
        torch.linspace(first, last - 1, min(_PER_TASK, last - first)).long().unique() for first, last in pairwise(ends)
    ]
    if influence is not None:
        paths = task_experts(student, len(chosen), config.target_flops, influence)
    else:
        groups = []
        for ids in chosen:
            batches = [_read(loader, part, torch.zeros_like(part), device) for part in ids.split(64)]
            groups.append([(embedded(student, batch), batch.actions) for batch in batches])
        paths = task_paths(student, groups, config.target_flops)
    router: Any = routed_stacks(student)[0].router
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    handle = router.register_forward_pre_hook(lambda module, given: seen.append((given[0], (*given, None)[1])))
    wanted = []
    try:
        for view in range(loader.views):  # all ways to say an instruction
            for ids, path in zip(chosen, paths):
                for part in ids.split(64):
                    _pass(student, _read(loader, part, torch.full_like(part, view), device))
                    wanted.append(path.expand(len(part), -1))
    finally:
        handle.remove()
    right = router.fit(seen, torch.cat(wanted))
    if distributed.is_main():
        for task, path in zip(loader.data.tasks, paths):
            log.info("%s starts with layers %s", task, _text(path))
        log.info("the router tells %.1f %% of the samples' tasks apart", 100 * right)
    return paths


def _read(loader: ViewLoader, ids: torch.Tensor, views: torch.Tensor, device: torch.device) -> Any:
    batch = loader.read(ids, views)
    batch.images, batch.state = batch.images.to(device), batch.state.to(device)
    batch.instruction, batch.actions = batch.instruction.to(device), batch.actions.to(device)
    return batch


def _exported(net: Any, loader: ViewLoader, config: ActDistillConfig, device: torch.device) -> Any:
    """The student as it acts: adapters merged, the router's threshold set so that the budget holds."""
    student = merge_lora(copy.deepcopy(net)).eval()
    if config.routing == "learned":
        router: Any = routed_stacks(student)[0].router
        _settle(router, lambda: [_pass(student, batch) for batch in _batches(loader, device)])
        router.fold_budget()
        reached, before, _ = _usage(student, loader, device)
        calibrate_model(student, _batches(loader, device), target_flops=config.target_flops, call=_pass)
        _, after, _ = _usage(student, loader, device)
        changed = sum(a != b for a, b in zip(before, after)) / len(after)
        if changed > _UNTRAINED and distributed.is_main():
            log.warning(
                "the router learned to use %.1f %% of the layers' FLOPs; to meet target_flops=%g its threshold was moved, and "
                "%.0f %% of the samples now take a path they were not trained on, which may cost success: train longer, or "
                "raise budget_weight or router_lr",
                100 * reached, config.target_flops, 100 * changed,
            )  # fmt: skip
    return student


@torch.no_grad()
def _settle(router: Any, passes: Callable[[], Any]) -> None:
    """Exact means of a router that standardises or cuts: its running ones lag behind weights that are averages themselves."""
    norm, hold = router.standardise, router.hold
    if norm is not None:
        momentum, norm.momentum = norm.momentum, None  # None: the plain mean over the batches
        norm.reset_running_stats()
        router.train()
        passes()
        router.eval()
        norm.momentum = momentum
    if hold is not None:
        hold.seen.fill_(False)
        hold.train()
        passes()
        hold.eval()


def _usage(student: Any, loader: ViewLoader, device: torch.device) -> tuple[float, list[str], list[int]]:
    """(mean FLOPs of the layers that run, of all layers'; each sample's path; its task) on training samples of all tasks."""
    stack: Any = routed_stacks(student)[0]
    costs = torch.tensor(student.xdfast_route.costs, dtype=torch.float64)
    total, paths, tasks = 0.0, [], []
    with torch.no_grad():
        for batch in _batches(loader, device):
            _pass(student, batch)
            gates = stack.decision.gates.double().cpu()
            total += float((gates * costs).sum() / costs.sum())
            paths += [_text(row) for row in gates.amax(2) > 0.5]
            tasks += batch.task.tolist()
    return total / len(paths), paths, tasks


def _text(path: torch.Tensor) -> str:
    return "".join(str(int(on)) for on in path.tolist())


def _own(taken: list[str], tasks: list[int], starts: torch.Tensor) -> float:
    """The share of samples that take the path of their own task."""
    wanted = [_text(path) for path in starts]
    return sum(path == wanted[task] for path, task in zip(taken, tasks)) / len(taken)


def _pass(student: Any, batch: Any) -> Any:
    return student.layers(embedded(student, batch))
