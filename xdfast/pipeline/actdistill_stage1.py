"""Stage 1 of ActDistill: graph heads on the frozen teacher, and what they say of each sample, kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from xdfast import distributed
from xdfast.data.store import HIT, TeacherStore
from xdfast.models import weights_hash
from xdfast.models.checkpoint import atomic_write
from xdfast.nn import GraphEncapsulation
from xdfast.pipeline.actdistill_config import ActDistillConfig
from xdfast.pipeline.actdistill_task import EncapsulationTask
from xdfast.pipeline.alone import turn_in
from xdfast.pipeline.folder import RunResult, finish, open_folder
from xdfast.pipeline.journal import read_history
from xdfast.pipeline.loop import train
from xdfast.pipeline.policy_config import StepsConfig
from xdfast.pipeline.precision import autocast
from xdfast.pipeline.task import millions, seed_everything
from xdfast.progress import ProgressLine
from xdfast.robot.model_files import load_weights
from xdfast.robot.vla import ViewLoader

__all__ = ["Encapsulated", "run_stage1"]

log = logging.getLogger("xdfast")

_HEADS, _TARGETS = "heads", "targets"


@dataclass(kw_only=True)
class HeadsConfig(StepsConfig):
    """Settings of stage 1 alone: what its result depends on."""

    teacher: str
    """Hash of its weights."""
    data: str
    """Hash of the demonstrations."""
    graph: dict[str, Any] = field(default_factory=dict)
    """Sizes of the heads."""
    views: dict[str, Any] = field(default_factory=dict)
    """What is seen of every sample."""


@dataclass
class Encapsulated:
    """What stage 1 leaves for stage 2.

    Attributes:
        heads: the trained graph heads.
        store: what they say of the teacher's layers, for every (sample, view).
        metrics: loss, seconds, steps.
    """

    heads: GraphEncapsulation
    store: TeacherStore
    metrics: dict[str, float]

    def targets(self, ids: Tensor, views: Tensor) -> tuple[Tensor, Tensor]:
        """Semantic vectors ``[L, B, S]`` and action chunks ``[L, B, H, A]`` of B samples, float32.

        Raises:
            RuntimeError: a row is missing or damaged; says what mends it.
        """
        found, status = self.store.read(ids.numpy(), views.numpy(), 0)
        if not (status == HIT).all():
            row = int((status != HIT).nonzero()[0][0])
            raise RuntimeError(
                f"{self.store.folder}: the teacher's answer to sample {int(ids[row])}, view {int(views[row])}, is missing or "
                f"damaged; run `xdfast cache verify {self.store.folder} --repair`, then the same command again"
            )
        heads = self.heads
        semantics = found["semantics"].unflatten(1, (heads.num_layers, -1)).transpose(0, 1)
        return semantics, found["actions"].unflatten(1, (heads.num_layers, heads.chunk, -1)).transpose(0, 1)


def run_stage1(
    config: ActDistillConfig, teacher: Any, loader: ViewLoader, fingerprints: list[Any], device: torch.device
) -> Encapsulated:
    """Trains the heads, or finds them trained, and fills the store with the answers stage 2 will ask for and that are missing
    in it. Both continue after a kill. Of several processes that start on one folder, one works and the others wait.

    Args:
        config: of the whole method.
        teacher: a :class:`xdfast.robot.vla.TeacherVLA` on ``device``, in eval mode.
        loader: of its samples under their views.
        fingerprints: of the demonstrations.
        device: where it runs.

    Raises:
        ValueError: the folder holds the stage 1 of another teacher, other data or other settings; names them.
        StoreFull: no room; what was written is kept.
    """
    out = Path(config.stage1 or Path(config.out) / "stage1").expanduser()
    graph = {
        "dim": teacher.dim, "num_layers": teacher.num_layers, "chunk": teacher.chunk, "action_dim": teacher.action_dim,
        "semantic_dim": config.semantic_dim, "hidden": config.graph_hidden, "rank": config.graph_rank,
        "k": config.graph_neighbours,
    }  # fmt: skip
    mine = HeadsConfig(
        out=str(out), teacher=weights_hash(teacher), data=_digest(fingerprints), graph=graph, views=loader.facts(),
        steps=config.heads_steps, lr=config.heads_lr, warmup_steps=min(config.warmup_steps, config.heads_steps - 1),
        batch_size=config.batch_size, seed=config.seed, amp=config.amp, device=config.device, ema=None,
        weight_decay=config.weight_decay, log_every=config.log_every, checkpoint_seconds=config.checkpoint_seconds,
        progress=config.progress, overwrite=config.overwrite, channels_last=False, tensorboard=config.tensorboard,
    )  # fmt: skip
    finished = open_folder(mine, "heads")[1]  # refuses other settings before it waits
    with turn_in(out, "stage 1"):
        if finished is None:
            finished = open_folder(mine, "heads")[1]  # the process waited for may have finished it
        heads, finished = _heads(mine, graph, teacher, loader, device, finished)
        store = TeacherStore.open(
            out / _TARGETS,
            {
                "teacher": mine.teacher,
                "heads": weights_hash(heads),
                "data": mine.data,
                "views": mine.views,
                "amp": config.amp,
            },
            samples=len(loader.data),
            views=loader.views,
            outputs={
                "semantics": teacher.num_layers * config.semantic_dim,
                "actions": teacher.num_layers * teacher.chunk * teacher.action_dim,
            },
            dtype=config.cache_dtype,
        )
        _fill(config, store, teacher, heads, loader, device)
    return Encapsulated(heads, store, finished.metrics)


def _heads(
    mine: HeadsConfig,
    graph: dict[str, Any],
    teacher: Any,
    loader: ViewLoader,
    device: torch.device,
    finished: RunResult | None,
) -> tuple[GraphEncapsulation, RunResult]:
    """The trained heads, frozen, and their run; trains them if it is not finished."""
    out = Path(mine.out)
    seed_everything(mine.seed, 2)
    heads = GraphEncapsulation(**graph).to(device)
    if finished is None:
        if distributed.is_main():
            log.info("stage 1: graph heads of %.2f M parameters on the frozen teacher", millions(heads))
        task = EncapsulationTask(heads, teacher)
        steps = ViewLoader.like(loader, mine.steps)
        result = train(task, steps, mine, out, device=device, validate=lambda net: {}, title="stage 1")
        if distributed.is_main():
            _save(result.module, out / _HEADS, graph)
        last = _last_loss(out)
        finished = finish(out, "heads", mine, {**last, "seconds": result.seconds, "steps": result.step}, {})
        heads = result.module
    else:
        if distributed.is_main():
            log.info("stage 1 is finished in %s", out)
        load_weights(heads, out / _HEADS / "heads.safetensors", "stage 1")
    return heads.to(device).eval().requires_grad_(False), finished


def _fill(
    config: ActDistillConfig, store: TeacherStore, teacher: Any, heads: Any, loader: ViewLoader, device: torch.device
) -> None:
    """Computes every row that stage 2 will read and that is missing, shared by the ranks."""
    ids, views = loader.visited(config.steps)
    there = np.ones((len(loader.data), loader.views), dtype=bool)
    there[store.missing()] = False
    mine = ~there[ids, views] & (ids % distributed.world_size() == distributed.rank())
    ids, views = ids[mine], views[mine]
    task, size = EncapsulationTask(heads, teacher), config.batch_size
    line = ProgressLine("teacher's answers", len(ids), enabled=config.progress and distributed.is_main())
    try:
        for first in range(0, len(ids), size):
            rows = slice(first, first + size)
            batch = loader.read(ids[rows], views[rows])
            with torch.no_grad(), autocast(config, device):
                images, _ = task.inputs(batch, device)
                semantics, actions = heads(**task.teach(images, batch))
            outputs = {"semantics": semantics, "actions": actions.flatten(2)}
            packed = {name: value.float().transpose(0, 1).flatten(1).cpu() for name, value in outputs.items()}
            store.write(ids[rows], views[rows], 0, packed)
            line.update(min(first + size, len(ids)), f"{store.count:,} of {store.total:,} rows")
    finally:
        line.close()
        store.flush()
    distributed.barrier()


def _save(heads: GraphEncapsulation, folder: Path, graph: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in heads.state_dict().items()}
    atomic_write(folder / "heads.safetensors", lambda aside: save_file(tensors, aside, metadata={"format": "pt"}))
    text = json.dumps({"graph": graph}, indent=2)
    atomic_write(folder / "heads.json", lambda aside: aside.write_text(text, encoding="utf-8"))


def _last_loss(out: Path) -> dict[str, float]:
    rows = [row for row in read_history(out / "metrics.jsonl") if row["kind"] == "train"]
    return {name: rows[-1][name] for name in ("loss", "loss_first", "loss_last")} if rows else {}


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
