"""How the trained module is laid out: memory format, compiled, one process or many, whole on each or sharded.

The loop sees one :class:`Parallel` and need not know. What is saved is the same for all layouts: whole tensors under the
names of the plain module.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import re
from typing import Any

import torch
from torch import Tensor, nn

from xdfast import distributed
from xdfast.models import ModelOutput
from xdfast.pipeline.config import TrainConfig
from xdfast.pipeline.task import TrainingTask

__all__ = ["Parallel", "check_layout", "prepare_teacher"]

log = logging.getLogger("xdfast")

#: Containers of timm models whose children are large enough to be sharded, and compiled, one by one.
_BLOCKS = re.compile(r"(^|\.)(blocks|layers|layer\d+)$")

#: Entries of an optimiser's groups that choose its kernel.
_KERNELS = ("fused", "foreach")


def check_layout(config: TrainConfig, device: torch.device, last_rows: int) -> None:
    """Whether a run can be laid out as asked for.

    Args:
        config: settings.
        device: of the training.
        last_rows: rows of an epoch's last batch, all ranks together.

    Raises:
        ValueError: synchronised BatchNorm on the CPU, or with a last batch that leaves a rank without rows.
    """
    if not config.sync_batchnorm:
        return
    if device.type != "cuda":
        raise ValueError(
            f"sync_batchnorm=True needs a GPU (torch.nn.SyncBatchNorm does not exist on {device.type!r}); leave it out, or "
            'take a student without batch statistics, such as student_options={"norm_layer": "groupnorm"}'
        )
    world = distributed.world_size()
    if config.tail == "exact" and last_rows < min(2, config.batch_size) * world:
        raise ValueError(
            f"tail='exact' leaves {last_rows} image(s) in the last batch, too few for {world} processes with "
            "sync_batchnorm=True, where each has to take part; use another batch_size, tail='drop', or sync_batchnorm=False"
        )


def prepare_teacher(net: Any, config: TrainConfig) -> Any:
    """``net`` as ``channels_last`` and ``compile`` ask for; weights and their names stay as they are."""
    if config.channels_last:
        net.to(memory_format=torch.channels_last)
    if config.compile:
        net.compile(dynamic=False)
    return net


class Parallel:
    """A task on its device, wrapped for the processes there are, with the moving average of its student.

    * one process: as it is;
    * ``parallel="ddp"``: DistributedDataParallel around the task;
    * ``parallel="fsdp"``: FSDP2 (``fully_shard``) of the student, its blocks, and every projector. Each rank holds a part
      of every weight, gradient and optimiser state. The moving average is sharded in the same way.

    Weights become sharded here, so the optimiser has to be built afterwards. :meth:`state` gathers, :meth:`load` deals out:
    the same file for every layout.

    Attributes:
        trained: what to call in training.
        ema: timm's ModelEmaV3, or None.
    """

    def __init__(self, task: TrainingTask, config: Any, device: torch.device) -> None:
        self.task, self._config, self._device = task, config, device
        world = distributed.world_size()
        sharded = config.parallel == "fsdp" and world > 1
        if config.parallel == "fsdp" and not sharded:
            log.info("parallel='fsdp' has no effect in a single process; start it with torchrun")
        self._whole = copy.deepcopy(task.student).cpu() if sharded else None  # to hold the result
        task.to(device)
        if config.channels_last:
            task.to(memory_format=torch.channels_last)
        if config.sync_batchnorm and world > 1:
            from timm.layers import convert_sync_batchnorm  # knows timm's norms with an activation; torch's drops it

            convert_sync_batchnorm(task)
        self.ema = _make_ema(task.student, config, foreach=not sharded)
        self._shards: list[Any] = []
        self.trained: nn.Module = task
        if sharded:
            self._shards = _shard_task(task, device, config.compile)
            if self.ema is not None:
                _shard(self.ema.module, device)
        elif config.compile:
            task.compile(dynamic=False)  # in place: no other module, no other names
        if world > 1 and not sharded:
            ids = [device.index] if device.type == "cuda" else None
            self.trained = nn.parallel.DistributedDataParallel(task, device_ids=ids)

    def accumulating(self, last: bool) -> Any:
        """Context of forward and backward of a micro-batch; gradients are exchanged in the ``last`` one of a step only."""
        for module in self._shards:
            module.set_requires_gradient_sync(last)
        if not last and isinstance(self.trained, nn.parallel.DistributedDataParallel):
            return self.trained.no_sync()
        return contextlib.nullcontext()

    def clip(self, max_norm: float) -> None:
        """Clips the gradient to ``max_norm``, the norm being that of all parameters on all ranks."""
        torch.nn.utils.clip_grad_norm_(self.task.parameters(), max_norm)

    @property
    def kept(self) -> nn.Module:
        """What is validated and becomes the result: the moving average where there is one, else the student."""
        return self.ema.module if self.ema is not None else self.task.student

    def average(self, step: int) -> None:
        """Takes the student after update ``step`` (from 1) into the moving average."""
        if self.ema is not None:  # without a warm-up the decay does not depend on the step
            self.ema.update(self.task.student, step + 1 if self.ema.use_warmup else None)

    def share_buffers(self) -> None:
        """Rank 0's BatchNorm statistics everywhere: all ranks validate the same model."""
        distributed.broadcast(list(self.kept.buffers()))

    def result(self) -> nn.Module:
        """The :attr:`kept` module, whole, on every rank."""
        if self._whole is None:
            return self.kept
        self._whole.load_state_dict(_gather(self.kept.state_dict()))
        return self._whole.eval()

    def projectors(self) -> dict[str, Tensor]:
        """Weights of the projectors, whole, on every rank; none where the task has none."""
        projectors = getattr(self.task, "projectors", None)
        return {} if projectors is None else _gather(projectors.state_dict())

    def first_not_finite(self) -> str | None:
        """Name of a weight that is not finite on some rank; every rank gets an answer of the same kind."""
        found = None
        for name, value in self.task.state_dict().items():
            local = _local(value)
            if local.is_floating_point() and not torch.isfinite(local).all():
                found = name
                break
        if self._shards and distributed.sum_over_ranks([float(found is not None)], self._device)[0]:
            return found or "a part on another rank"
        return found

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """``task``, ``optimizer`` and ``ema`` (None without one) as whole tensors; every rank has to call it, sharded ones
        get them on rank 0 alone.

        Raises:
            ValueError: sharded weights, and an optimiser whose state is not of the weights' shape.
        """
        if self._shards:  # before a file is written that could not be read
            for parameter, held in optimizer.state.items():
                _check_shapes(held, parameter)
        state = {
            "task": self.task.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
        }
        return _gather(state, keep=distributed.is_main()) if self._shards else state

    def load(self, saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Takes over what :meth:`state` gave, in this layout or another one.

        Raises:
            ValueError: sharded weights, and an optimiser whose state is not of the weights' shape.
        """
        self.task.load_state_dict(_deal(saved["task"], self.task.state_dict()))
        if self.ema is not None:
            self.ema.module.load_state_dict(_deal(saved["ema"], self.ema.module.state_dict()))
        state = saved["optimizer"]
        if self._shards:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {**state, "state": {i: _deal_state(v, parameters[i]) for i, v in state["state"].items()}}
        # Which kernel makes the step is the layout's affair, not the file's.
        kernels = [{k: group[k] for k in _KERNELS if k in group} for group in optimizer.param_groups]
        groups = [{**group, **own} for group, own in zip(state["param_groups"], kernels, strict=True)]
        state = {**state, "param_groups": groups}
        optimizer.load_state_dict(state)


def _make_ema(student: nn.Module, config: Any, foreach: bool) -> Any | None:
    if config.ema is None:
        return None
    from timm.utils import ModelEmaV3

    # It averages buffers too: BatchNorm statistics belong to the weights. Sharded weights and whole buffers do not go into
    # one foreach call.
    power = getattr(config, "ema_power", None)
    warmup: dict[str, Any] = {} if power is None else {"use_warmup": True, "warmup_power": power}
    return ModelEmaV3(student, decay=config.ema, foreach=foreach, **warmup)


def _shard_task(task: TrainingTask, device: torch.device, compiled: bool) -> list[Any]:
    """Shards every part of the task that has weights; each part is a root of its own, so the student can run alone."""
    parts = [task.student]
    for name, child in task.named_children():
        if name != "student":
            parts += list(child.children())
    return [_shard(part, device, compiled) for part in parts if any(True for _ in part.parameters())]


def _shard(part: nn.Module, device: torch.device, compiled: bool = False) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    _let_fsdp_look_into_outputs()
    mesh = _mesh(device.type)
    blocks = [
        child
        for name, module in part.named_modules()
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and _BLOCKS.search(name)
        for child in module.children()
        if not isinstance(child, nn.ModuleList) and any(True for _ in child.parameters())
    ]
    # Hooks that gather and free weights cannot be traced: what is compiled lies between them.
    for module in (blocks or [part]) if compiled else []:
        module.compile(dynamic=False)
    for block in reversed(blocks):  # the inner ones first
        fully_shard(block, mesh=mesh)
    fully_shard(part, mesh=mesh)
    return part


@functools.cache
def _let_fsdp_look_into_outputs() -> None:
    """FSDP hooks the tensors in a module's output, but up to some version does not look into dataclasses: gradients would
    silently not be exchanged."""
    with contextlib.suppress(ValueError):  # registered already
        torch.export.register_dataclass(ModelOutput)


@functools.cache
def _mesh(device_type: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (distributed.world_size(),))


def _is_sharded(value: Any) -> bool:
    if not isinstance(value, Tensor) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def _local(value: Any) -> Tensor:
    return value.to_local() if _is_sharded(value) else value


def _gather(tree: Any, keep: bool = True) -> Any:
    """``tree`` with whole tensors on the CPU in the place of sharded ones, one at a time; where not ``keep``, with None."""
    if isinstance(tree, dict):
        return {key: _gather(value, keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_gather(value, keep) for value in tree]
    if _is_sharded(tree):
        whole = tree.full_tensor()
        return whole.cpu() if keep else None
    return tree


def _deal(whole: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Every tensor laid out like its namesake."""
    return {name: _deal_one(value, like[name]) if name in like else value for name, value in whole.items()}


def _deal_one(whole: Any, like: Any) -> Any:
    if not _is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Every rank has read the file: nothing needs to be sent.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _deal_state(state: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    _check_shapes(state, parameter)
    sharded = {n: v for n, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape and v.ndim > 0}
    return {**state, **{name: _deal_one(value, parameter) for name, value in sharded.items()}}


def _check_shapes(state: dict[str, Any], parameter: Tensor) -> None:
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape != parameter.shape:
            raise ValueError(
                f"the optimiser keeps {name} of shape {tuple(value.shape)} for a weight of shape {tuple(parameter.shape)}, "
                "which cannot be sharded; use parallel='ddp', or an optimiser such as adamw, lamb or sgd"
            )
