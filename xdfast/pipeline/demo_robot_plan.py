"""How much of ``demo-robot`` fits into its minutes: an update of each kind is timed, and the rest is arithmetic.

CPUs differ tenfold here: one with bfloat16 instructions makes 500 updates of a policy in four minutes, an AVX2 core does not. So a
slow machine makes fewer updates, the same number for both encoders, and says so.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from xdfast.models import create_model
from xdfast.models.checkpoint import atomic_write
from xdfast.pipeline.policy_task import PolicyTask
from xdfast.pipeline.precision import autocast
from xdfast.robot.diffusion import DiffusionSettings
from xdfast.robot.encoder import build_encoder
from xdfast.robot.policy import DiffusionPolicy, PolicySpec

__all__ = ["Costs", "DemoPlan", "fit", "measure_costs", "planned"]

log = logging.getLogger("xdfast")

PLAN_FILE = "plan.json"
_STAGE1_BATCH, _POLICY_BATCH = 64, 32

# What an update costs beside its arithmetic: pictures read and augmented on the same cores, checkpoints.
_AROUND_STAGE1, _AROUND_POLICY = 1.25, 1.1
_EVALUATION = (
    25.0  # seconds of a policy's evaluation beside its episodes: simulators started twice, latency, videos, saliency
)
_EPISODE = 1.0
_REPORT = 30.0
_LEAST_STEPS = 50


class _Asked(Protocol):
    """What of :class:`xdfast.pipeline.demo_robot.DemoRobotConfig` counts here."""

    minutes: float
    seeds: int
    episodes: int
    steps: int
    teacher_epochs: int
    distill_epochs: int
    size: int


@dataclass(frozen=True)
class Costs:
    """Seconds of an update: of the teacher and of the student that imitates it (64 pictures), of a policy (32 samples)."""

    teacher: float
    imitation: float
    policy: float


@dataclass(frozen=True)
class DemoPlan:
    """What is done. ``seconds`` is how long it will take, from the start of the demo."""

    teacher_epochs: int
    distill_epochs: int
    steps: int
    seconds: float


def fit(asked: _Asked, costs: Costs, batches: int, gone: float) -> DemoPlan:
    """The epochs and updates that end within ``asked.minutes``; at most those asked for, at least one epoch and 50 updates.

    Stage 1 gets no more than a third of the time for training, for it is the policies that are compared.

    Args:
        asked: settings of the demo.
        costs: of this machine.
        batches: updates in an epoch of stage 1.
        gone: seconds since the demo began.
    """
    policies = 2 * asked.seeds
    fixed = gone + policies * (_EVALUATION + _EPISODE * asked.episodes) + _REPORT
    training = max(0.0, 60 * asked.minutes - fixed)

    def stage1(teacher_epochs: int, distill_epochs: int) -> float:
        return _AROUND_STAGE1 * batches * (teacher_epochs * costs.teacher + distill_epochs * costs.imitation)

    teacher_epochs, distill_epochs = asked.teacher_epochs, asked.distill_epochs
    update = _AROUND_POLICY * policies * costs.policy
    whole = stage1(teacher_epochs, distill_epochs)
    if whole + asked.steps * update > training and whole > training / 3:
        share = training / 3 / whole
        teacher_epochs, distill_epochs = max(1, int(teacher_epochs * share)), max(1, int(distill_epochs * share))
    before = stage1(teacher_epochs, distill_epochs)
    steps = min(asked.steps, max(_LEAST_STEPS, int((training - before) / update) // 10 * 10))
    return DemoPlan(teacher_epochs, distill_epochs, steps, fixed + before + steps * update)


def planned(
    asked: _Asked, out: Path, batches: int, gone: float, device: torch.device, measure: Callable[[], Costs]
) -> DemoPlan:
    """The plan of the demo in ``out``: made once and kept there, so that the same command continues the same runs.

    On a GPU, and with ``minutes`` 0, all that is asked for is done.
    """
    everything = DemoPlan(asked.teacher_epochs, asked.distill_epochs, asked.steps, 0.0)
    if not asked.minutes or device.type != "cpu":
        return everything
    file, key = out / PLAN_FILE, {name: getattr(asked, name) for name in _Asked.__annotations__}
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["asked"] == key:
            return DemoPlan(**kept["plan"])
    log.info("timing an update of each kind")
    costs = measure()
    plan = fit(asked, costs, batches, gone)
    text = json.dumps({"asked": key, "costs": asdict(costs), "plan": asdict(plan)}, indent=2)
    atomic_write(file, lambda aside: aside.write_text(text, encoding="utf-8"))
    log.info(
        "an update of a policy takes %.2f s here, one of stage 1 %.2f s: about %.0f minutes in all",
        costs.policy, costs.imitation, plan.seconds / 60,
    )  # fmt: skip
    return plan


def measure_costs(
    size: int, crop: int, teacher: dict[str, Any], student_options: dict[str, Any], device: torch.device
) -> Costs:
    """Times three updates of each kind, after one, on pictures of noise.

    Args:
        size: of a picture, ``crop`` of it enters the encoder.
        teacher: ``model`` and ``student_options``, as ``finetune`` takes them.
        student_options: of the ResNet-18.
        device: where.
    """
    amp = SimpleNamespace(amp="bf16")

    def seconds(module: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> float:
        module.to(device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
        times = []
        for _ in range(4):
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            with autocast(amp, device):  # type: ignore[arg-type]
                value = loss()
            value.backward()
            optimizer.step()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])  # the first one prepares memory and kernels

    pictures = torch.rand(_STAGE1_BATCH, 3, crop, crop, device=device)
    labels = torch.arange(_STAGE1_BATCH, device=device) % 8
    vit = create_model(
        teacher["model"], pretrained=False, num_classes=8, image_size=crop, options=teacher["student_options"]
    )
    of_teacher = seconds(vit, lambda: F.cross_entropy(vit(pictures).logits.float(), labels))
    student = create_model("resnet18", pretrained=False, num_classes=0, image_size=crop, options=student_options)
    projector = torch.nn.Linear(student.num_features, vit.num_features).to(device)

    def imitate() -> torch.Tensor:
        with torch.no_grad():
            target = vit(pictures).features.float()
        return F.mse_loss(projector(student(pictures).features).float(), target)

    of_imitation = seconds(student, imitate)
    encoder, facts = build_encoder("resnet18", image_size=crop, options=student_options)
    spec = PolicySpec(4, 9, ("camera",), (size, size), crop=crop, encoder=facts, diffusion=DiffusionSettings())
    task = PolicyTask(DiffusionPolicy(spec, encoder), draws=8)
    images = torch.zeros(_POLICY_BATCH, 1, 1, size, size, 3, dtype=torch.uint8, device=device)
    state, actions = torch.zeros(_POLICY_BATCH, 1, 9, device=device), torch.zeros(_POLICY_BATCH, 16, 4, device=device)
    return Costs(of_teacher, of_imitation, seconds(task, lambda: task(images, actions, state)["loss"]))
