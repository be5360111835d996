"""What ActDistill minimises: heads on the frozen teacher (stage 1), then a student that skips layers (stage 2)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast import distributed
from xdfast.losses import ActDistillLoss, stage1_loss
from xdfast.models import budget_loss, hold_budget
from xdfast.nn import GraphEncapsulation, RandomRouter, StaticRouter, fixed_gates, routed_stacks
from xdfast.nn.convert import drop_rate
from xdfast.pipeline.task import TrainingTask
from xdfast.robot.vla import Observation, ViewBatch, hidden_states

__all__ = ["ActDistillTask", "EncapsulationTask", "embedded", "normalised", "readable", "vision_of"]


@dataclass(frozen=True)
class Demonstrated(Observation):
    """B observations with what was done, raw ``[B, H, A]``."""

    actions: Tensor


class EncapsulationTask(TrainingTask):
    """Stage 1: every layer's head predicts the demonstrated chunk from the teacher's tokens after it.

    The teacher is no sub-module: in eval mode, not trained, not saved.
    """

    student: GraphEncapsulation
    unit = "samples"

    def __init__(self, heads: GraphEncapsulation, teacher: Any) -> None:
        super().__init__(heads)
        self._teacher = (teacher,)

    @property
    def teacher(self) -> Any:
        """The VLA whose heads these are."""
        return self._teacher[0]

    def inputs(self, batch: ViewBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pictures and normalised actions."""
        actions = normalised(self.teacher, batch.actions.to(device, non_blocking=True))
        return batch.images.to(device, non_blocking=True), actions

    def teach(self, images: Tensor, batch: ViewBatch) -> dict[str, Tensor]:
        """Tokens after every layer, ``[L, B, T, D]``."""
        with torch.no_grad():
            device = images.device
            state, told = (x.to(device, non_blocking=True) for x in (batch.state, batch.instruction))
            actions = batch.actions.to(device, non_blocking=True)
            tokens = embedded(self.teacher, Demonstrated(images, state, told, actions))
            hidden = torch.stack(hidden_states(self.teacher.layers, tokens)[1:])
            mask = readable(self.teacher, tokens)
            return {"hidden": hidden} if mask is None else {"hidden": hidden, "mask": mask}

    def forward(
        self, images: Tensor, targets: Tensor | None, hidden: Tensor | None = None, mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        assert targets is not None and hidden is not None  # every rank has rows in every step
        _, actions = self.student(hidden, mask=mask)
        per_layer = stage1_loss(actions, targets, reduction="none")
        return {"loss": per_layer.mean(), "first": per_layer[0].detach(), "last": per_layer[-1].detach()}


class ActDistillTask(TrainingTask):
    r"""Stage 2: L = w_p L_policy + L_dual-stream + w_b L_budget.

    The student's graph heads start as stage 1 left them and learn on; they are no part of the student. The FLOPs' target
    falls from 1 to r* along half a cosine over the first part of the updates, so that layers leave one by one. With
    ``config.hold_budget`` the router cuts every batch at that target; the budget's loss then has nothing left to pull.

    With ``paths``, samples take the path of their task for the first ``config.router_delay`` of the updates, and the router learns
    by binary cross-entropy to tell it from the tokens, which go on changing under it; then it decides. Without them it stays
    as it is for so long.

    Args:
        student: routed VLA (:func:`xdfast.robot.vla.derive_student`).
        heads: of stage 1; copied by the caller.
        targets: (ids, views) → what the teacher's heads said: semantics ``[L, B, S]``, actions ``[L, B, H, A]``.
        config: :class:`xdfast.pipeline.ActDistillConfig`.
        paths: [tasks, L] bool, where each task starts (:func:`xdfast.robot.vla.task_experts`), or None.
    """

    student: Any
    unit = "samples"

    def __init__(
        self,
        student: Any,
        heads: GraphEncapsulation,
        targets: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        config: Any,
        paths: Tensor | None = None,
    ) -> None:
        super().__init__(student)
        self.heads, self._paths = heads, paths
        self.stack: tuple[Any] = (routed_stacks(student)[0],)  # in a tuple: it is the student's sub-module already
        self.learned = not isinstance(self.stack[0].router, (StaticRouter, RandomRouter))
        if self.learned and config.hold_budget:
            hold_budget(student)
        self.dual = ActDistillLoss(
            heads.num_layers, config.gamma, config.semantic_weight, config.action_weight, config.relation_weight,
            return_components=True,
        )  # fmt: skip
        self.budget = budget_loss(
            student, weight=config.budget_weight, balance=config.balance_weight, decisive=config.decisive_weight,
            return_components=True,
        )  # fmt: skip
        self._targets, self._config = targets, config
        stack = self.stack[0]
        self._usual = (stack.sparse_train, stack.explore)
        # DistributedDataParallel waits for a gradient of every parameter; listed rows know no dropout
        self._can_skip = distributed.world_size() == 1 and not any(drop_rate(m) > 0 for m in student.layers.modules())
        self._frozen = vision_of(student) if config.train != "all" else None
        if self._frozen is not None:
            self._frozen.requires_grad_(False)

    def train(self, mode: bool = True) -> ActDistillTask:
        super().train(mode)
        # pictures are moved by the views, in the same way for teacher and student; crops at random would part them
        self.student.training = False
        if self._frozen is not None:
            self._frozen.eval()  # batch statistics of what does not learn must not drift
        return self

    def parameter_groups(self, config: Any) -> list[dict[str, Any]]:
        """The router, at its own rate and without decay, and the rest."""
        router = list(self.stack[0].router.parameters())
        mine = {id(p) for p in router}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in mine]
        groups = [{"params": rest, "lr": config.lr, "weight_decay": config.weight_decay}]
        return [*groups, {"params": router, "lr": config.router_lr, "weight_decay": 0.0}] if router else groups

    def inputs(self, batch: ViewBatch, device: torch.device) -> tuple[Tensor, Tensor]:
        """Pictures and raw actions."""
        return batch.images.to(device, non_blocking=True), batch.actions.to(device, non_blocking=True)

    def teach(self, images: Tensor, batch: ViewBatch) -> dict[str, Any]:
        semantics, actions = self._targets(batch.ids, batch.views)
        device = images.device
        return {
            "state": batch.state.to(device, non_blocking=True),
            "instruction": batch.instruction.to(device, non_blocking=True),
            "teacher_semantics": semantics.to(device, non_blocking=True),
            "teacher_actions": actions.to(device, non_blocking=True),
            "task": batch.task.to(device, non_blocking=True),
            "step": batch.step,
        }

    def forward(
        self,
        images: Tensor,
        targets: Tensor | None,
        state: Tensor | None = None,
        instruction: Tensor | None = None,
        teacher_semantics: Tensor | None = None,
        teacher_actions: Tensor | None = None,
        task: Tensor | None = None,
        step: int = -1,
    ) -> dict[str, Tensor]:
        # every rank has rows in every step: see MultiTaskLoader
        assert targets is not None and state is not None and instruction is not None
        student, stack = self.student, self.stack[0]
        self.budget.target_flops = self.target_at(step)
        waits = 0 <= step < self._config.router_delay * self._config.steps
        told = None if self._paths is None or not waits else self._paths.to(images.device)[task].float()
        stack.router.frozen = waits and told is None
        # what is off has nothing to say where nobody learns which layers to take: it is not computed, forward or backward
        skips = self._can_skip and (waits or not self.learned)
        stack.sparse_train, stack.explore = (True, 0.0) if skips else self._usual
        if stack.router.hold is not None:
            stack.router.hold.target_flops = self.budget.target_flops
        tokens = embedded(student, Demonstrated(images, state, instruction, targets))
        with nullcontext() if told is None else fixed_gates(student, told):
            states = hidden_states(student.layers, tokens)
        semantics, actions = self.heads(torch.stack(states[1:]), mask=readable(student, states[0]))
        dual = self.dual(semantics, actions, teacher_semantics, teacher_actions, normalised(student, targets))
        policy = student.chunk_loss(states[-1], targets)
        probabilities, telling = stack.decision.probabilities, policy.new_zeros(())
        if told is not None:
            logits = stack.router(tokens.detach()).float()  # what it reads is not bent towards it
            probabilities = logits.sigmoid()
            telling = F.binary_cross_entropy_with_logits(logits, told[..., None].expand_as(logits))
        budget = self.budget(stack.decision.gates, probabilities)
        loss = self._config.policy_weight * policy + dual.loss
        if self.learned:
            loss = loss + budget.loss + telling
        terms = {
            "policy": policy, "semantic": dual.cosine, "relation": dual.relation, "to_target": dual.target,
            "to_teacher": dual.teacher, "to_previous": dual.previous, "budget": budget.budget, "fraction": budget.fraction,
            **({} if told is None else {"router": telling}),
        }  # fmt: skip
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def target_at(self, step: int) -> float:
        """The FLOPs' target in an update, counted from 0; a router that starts at it stays there."""
        if self.learned and self._config.router_start in ("tasks", "experts"):
            return self._config.target_flops
        final, length = self._config.target_flops, self._config.anneal * self._config.steps
        done = 1.0 if length == 0 or step < 0 else min(step / length, 1.0)
        return final + (1 - final) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * done)).item())


def normalised(vla: Any, actions: Tensor) -> Tensor:
    """Actions as the policy predicts them, float32."""
    norm = getattr(vla, "action_norm", None)
    return actions.float() if norm is None else norm(actions.float())


def vision_of(vla: Any) -> nn.Module | None:
    """The part that turns pictures into features."""
    found = getattr(vla, "encoder", None)
    found = getattr(vla, "vision", None) if found is None else found
    return found if isinstance(found, nn.Module) else None


def embedded(vla: Any, batch: Any) -> Tensor:
    """The tokens that enter layer 0 where the actions are known: of a model that generates them, with the demonstrated ones."""
    return getattr(vla, "embed_demonstrated", vla.embed)(batch)


def readable(vla: Any, tokens: Tensor) -> Tensor | None:
    """Which tokens graph heads may read, ``[B, T]``; None: all. Padding says nothing, and action tokens are the answer."""
    found = getattr(vla, "readable", None)
    return None if found is None else found(tokens)
