"""The one training loop: AMP, EMA, accumulation, clipping, DDP, progress, and exact continuation after a kill.

Nothing random is stored. Which images come next, how each is augmented, what dropout draws: all are pure functions of
(seed, epoch, step, sample, rank). So the resume file needs only the counters and the tensors, and a run that is killed
anywhere and started again ends with the weights of an unbroken one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xdfast import distributed
from xdfast.data import Batch
from xdfast.models.checkpoint import CheckpointError, load_resume, save_resume
from xdfast.pipeline.ahead import Ready, ahead, lane_for
from xdfast.pipeline.journal import Journal, ProgressLine
from xdfast.pipeline.optim import build_optimizer, build_schedule
from xdfast.pipeline.parallel import Parallel
from xdfast.pipeline.precision import autocast
from xdfast.pipeline.session import Session, StoppedAtOnce
from xdfast.pipeline.task import TrainingTask, seed_everything

__all__ = ["LoopResult", "train"]

log = logging.getLogger("xdfast")

RESUME_FILE = "resume.pt"


@dataclass
class LoopResult:
    """What the loop hands back: the module to keep, weights of the task's projectors (all of them whole, on every rank),
    final validation metrics, seconds trained over all sessions."""

    module: Any
    projectors: dict[str, Tensor]
    metrics: dict[str, float]
    seconds: float
    step: int


@dataclass
class _State:
    epoch: int = 0
    batch: int = 0  # next batch of the epoch
    step: int = 0  # optimiser updates done
    seconds: float = 0.0
    journal_offset: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)  # loss terms summed since the last row


def train(
    task: TrainingTask,
    loader: Any,
    config: Any,
    out: Path,
    *,
    device: torch.device,
    validate: Callable[[nn.Module], dict[str, float]],
    validate_first: bool = False,
    batch_augment: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None = None,
    identity: dict[str, Any] | None = None,
    title: str = "train",
) -> LoopResult:
    """Trains ``task`` for ``config.epochs`` and returns the student (its EMA where asked for).

    Args:
        task: maps (images, targets, **task.teach(images, batch)) to ``{"loss": …, named terms}``.
        loader: :class:`xdfast.data.ImageLoader` of training views.
        config: a :class:`TrainConfig`, or another :class:`RunConfig` that has its ``epochs``, ``eval_every``, …
        out: folder for ``resume.pt`` and ``metrics.jsonl``.
        device: where to train.
        validate: student → metrics; called every ``eval_every`` epochs.
        validate_first: and before the first step, as epoch -1.
        batch_augment: mixup and the like, a function of (images, labels, seed).
        identity: facts that must be equal when a run is continued (data fingerprint, teacher hash, world size).
        title: of the progress bar.

    Raises:
        RuntimeError: the loss is not finite (names step, terms and rate; the last checkpoint stays), or ``resume.pt``
            belongs to other data, another teacher or another number of processes.
    """
    identity = {**(identity or {}), "world_size": distributed.world_size()}
    model = Parallel(task, config, device)
    optimizer = build_optimizer(task, config)
    groups = math.ceil(loader.batches_per_epoch / config.accumulate)  # updates per epoch
    schedule = build_schedule(optimizer, config, groups)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    state = _State()

    resume_path = out / RESUME_FILE
    if resume_path.is_file():
        saved = load_resume(resume_path)
        lacking = [key for key in ("identity", "scaler", "bad", "state") if key not in saved]
        if lacking:
            raise CheckpointError(
                f"{resume_path} is damaged or not a resume file (it lacks {', '.join(lacking)}); delete it to start the run again"
            )
        _check_identity(saved["identity"], identity, resume_path)
        model.load(saved, optimizer)
        scaler.load_state_dict(saved["scaler"])
        loader.bad.update(saved["bad"])
        state = _State(**saved["state"])
        log.info("continuing %s at epoch %d, batch %d, step %d", out, state.epoch, state.batch, state.step)

    journal = Journal(out, offset=state.journal_offset, tensorboard=config.tensorboard, enabled=distributed.is_main())
    line = ProgressLine(title, groups * config.epochs, state.step, enabled=config.progress and distributed.is_main())
    session = Session(state.seconds, config.checkpoint_seconds)

    def save() -> None:
        _check_weights(model, state, out)
        state.seconds, state.running = session.seconds, running.state()
        state.journal_offset = journal.offset
        tensors = model.state(optimizer)
        if distributed.is_main():
            save_resume(
                resume_path,
                {
                    "identity": identity,
                    "config": config.to_dict(),
                    "state": vars(state).copy(),
                    "scaler": scaler.state_dict(),
                    **tensors,
                    "bad": dict(loader.bad),
                },
            )
        distributed.barrier()
        session.saved()

    def make_ready(epoch: int) -> Callable[[int, Batch], Ready]:
        return partial(_make_ready, task, config, device, batch_augment, epoch)

    lane = lane_for(config.overlap, device)
    running = _RunningTerms(state.running)
    with session.catch_termination():
        try:
            if validate_first and state.step == 0:
                with session.at_once():
                    found = validate(task.student)
                journal.write({"kind": "val", "epoch": -1, "step": 0, **found, "time": session.seconds})
            while state.epoch < config.epochs:
                model.trained.train()
                if state.batch == 0:
                    with session.at_once(), autocast(config, device):
                        task.begin_epoch(state.epoch)
                batches = ahead(loader.epoch(state.epoch, state.batch), make_ready(state.epoch), lane, state.batch)
                for micro in _groups(batches, config.accumulate):
                    rate = optimizer.param_groups[0]["lr"]
                    rows = [loader.rows(state.batch + index) for index in range(len(micro))]
                    _update(model, micro, rows, optimizer, scaler, config, device, state, running)
                    state.step += 1
                    model.average(state.step)
                    state.batch += len(micro)
                    session.count(sum(rows))
                    if schedule is not None:
                        schedule.step_update(state.step)
                    last = state.batch >= loader.batches_per_epoch
                    due = not last and session.due(state.step)
                    if state.step % config.log_every == 0 or last or due:
                        row = running.mean()
                        _check_finite(row, state, rate, out)
                        speed = session.images_per_second()
                        line.update(
                            state.step,
                            f"{_place(state, config)}loss {row['loss']:.4f}  {speed:,.0f} {task.unit}/s",
                        )
                        if state.step % config.log_every == 0 or last:
                            journal.write(
                                {"kind": "train", "epoch": state.epoch, "step": state.step}
                                | {("loss" if k == "loss" else f"loss_{k}"): v for k, v in row.items()}
                                | {"lr": rate, "images_per_s": speed, "time": session.seconds}
                            )
                            running.reset()
                    if due:
                        save()
                        session.stop_if_asked(out)
                # Until it is validated, an epoch is not over: continued from here, no batch is left and validation begins anew.
                if (state.epoch + 1) % config.eval_every == 0 or state.epoch + 1 == config.epochs:
                    model.share_buffers()
                    with session.at_once():
                        state.metrics = validate(model.kept)
                    journal.write(
                        {
                            "kind": "val",
                            "epoch": state.epoch,
                            "step": state.step,
                            **state.metrics,
                            "time": session.seconds,
                        }
                    )
                state.epoch, state.batch = state.epoch + 1, 0
                if session.due(state.step, epoch_ends=True) or state.epoch == config.epochs:
                    save()
                session.stop_if_asked(out)
        except StoppedAtOnce:
            save()
            session.stop_if_asked(out)
        finally:
            journal.close()
            line.close()
    return LoopResult(model.result(), model.projectors(), state.metrics, session.seconds, state.step)


def _place(state: _State, config: Any) -> str:
    return f"epoch {state.epoch + 1}/{config.epochs}  " if config.epochs > 1 else ""


def _update(
    model: Parallel,
    micro: list[Ready],
    rows: list[int],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: Any,
    device: torch.device,
    state: _State,
    running: _RunningTerms,
) -> None:
    """One optimiser step over the micro-batches.

    Ranks average their gradients. Each loss is weighted by n · W / N, with n rows here, W ranks and N = Σ ``rows`` on all
    ranks in all micro-batches, so the average is the gradient of the mean over the N rows, however they are spread.
    """
    optimizer.zero_grad(set_to_none=True)
    total = sum(rows)
    for index, ready in enumerate(micro):
        seed_everything(config.seed, state.epoch, state.batch + index, distributed.rank())
        last = index == len(micro) - 1
        share = len(ready.batch.ids) * distributed.world_size() / total
        with model.accumulating(last):
            with autocast(config, device):
                terms = _terms(model, ready)
                loss = terms["loss"] * share
            scaler.scale(loss).backward()
        running.add(terms, share)
    if config.clip_grad is not None:
        scaler.unscale_(optimizer)
        model.clip(config.clip_grad)
    scaler.step(optimizer)
    scaler.update()


def _terms(model: Parallel, ready: Ready) -> dict[str, Tensor]:
    if ready.targets is None:
        # No rows on this rank: eval mode leaves the BatchNorm statistics alone, and no loss ever sees these pixels.
        model.trained.eval()
        terms = model.trained(ready.images.new_zeros((2, *ready.images.shape[1:])), None)
        model.trained.train()
        return terms
    return model.trained(ready.images, ready.targets, **ready.taught)


def _make_ready(
    task: TrainingTask,
    config: Any,
    device: torch.device,
    batch_augment: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None,
    epoch: int,
    number: int,
    batch: Batch,
) -> Ready:
    """Moves, augments and shows a batch to the teacher; a function of (epoch, number, batch) alone."""
    images, targets = task.inputs(batch, device)
    if not len(batch.ids):
        return Ready(batch, images, None)
    if batch_augment is not None:
        seed_everything(config.seed, epoch, number, distributed.rank())
        images, targets = batch_augment(images, targets, torch.initial_seed())
    with autocast(config, device):
        return Ready(batch, images, targets, task.teach(images, batch))


def _groups(batches: Any, size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class _RunningTerms:
    """Mean of the loss terms since the last row, summed on the device: no synchronisation per step."""

    def __init__(self, saved: dict[str, float]) -> None:
        saved = dict(saved)
        self._weight = saved.pop("weight", 0.0)
        self._sums: dict[str, Any] = dict(saved)

    def reset(self) -> None:
        self._sums, self._weight = {}, 0.0

    def add(self, terms: dict[str, Tensor], share: float) -> None:
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().double() * share
        self._weight += share

    def mean(self) -> dict[str, float]:
        return {name: float(value) / max(self._weight, 1e-12) for name, value in self._sums.items()}

    def state(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._sums.items()} | {"weight": self._weight}


def _check_finite(row: dict[str, float], state: _State, rate: float, out: Path) -> None:
    if not all(math.isfinite(value) for value in row.values()):
        terms = ", ".join(f"{name} {value:g}" for name, value in row.items())
        raise RuntimeError(
            f"the loss is not finite at epoch {state.epoch}, step {state.step} ({terms}; learning rate {rate:g}). "
            f"Lower lr, set clip_grad, or amp='none'; the last good state is in {out / RESUME_FILE}"
        )


def _check_weights(model: Parallel, state: _State, out: Path) -> None:
    """A state that cannot be continued must not replace one that can."""
    name = model.first_not_finite()
    if name is not None:
        raise RuntimeError(
            f"the weights are not finite after step {state.step} (first: {name}). Lower lr, set clip_grad, or "
            f"amp='none'; the last good state is in {out / RESUME_FILE}"
        )


def _check_identity(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    differing = [key for key in now if saved.get(key) != now[key]]
    if differing:
        facts = "; ".join(f"{key}: {saved.get(key)!r} then, {now[key]!r} now" for key in differing)
        raise RuntimeError(
            f"{path} belongs to another run ({facts}); use the same data, models and number of processes, or another out folder"
        )
