"""Settings of ActDistill: a VLA's student, which skips layers of its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xdfast.pipeline.policy_config import ActingConfig

__all__ = ["ActDistillConfig"]


@dataclass(kw_only=True)
class ActDistillConfig(ActingConfig):
    """A student of a VLA that computes a part of its teacher's layers, chosen anew for every decision (ActDistill).

    Stage 1 trains graph heads on the frozen teacher and keeps what they say of every sample; stage 2 trains the student.
    """

    teacher: str
    """Folder of a run of several tasks (`xdfast finetune --recipe vla-metaworld`)."""
    target_flops: float = 0.5
    """Fraction of the transformer layers' FLOPs that the student may use."""
    routing: Literal["learned", "static", "random"] = "learned"
    """Who chooses the layers: the router; or, to compare with, always the most influential ones, or chance."""
    always_on: tuple[int, ...] = (0, -1)
    """Layers that are never skipped; negative ones count from the end."""
    train: Literal["transformer", "all", "lora"] = "transformer"
    """What learns besides router and heads: all but the encoder of pictures; everything; or low-rank adapters in the layers."""
    lora_rank: int = 16

    tasks: tuple[str, ...] = ()
    """Default: the teacher's."""
    demos: str = ""
    """Demonstrations of each task, a number or a folder; default: the teacher's."""
    demo_seed: int | None = None
    """First seed of the expert's episodes; default: the teacher's."""
    demo_noise: float | None = None
    """Standard deviation of noise on what the expert executes; default: the teacher's."""
    views: int = 4
    """Fixed views of every sample: moved pictures and other words, on which the teacher's answers are kept."""
    shift: int | None = None
    """Pixels by which a view moves a picture at most; default: what the teacher's crop leaves."""

    stage1: str = ""
    """Folder of stage 1, shared by students of one teacher; default: OUT/stage1. Made if it is not there."""
    heads_steps: int = 400
    """Updates of stage 1."""
    heads_lr: float = 1e-3
    graph_hidden: int = 128
    """Width of a node in the heads' graphs."""
    graph_rank: int = 32
    """Width of the affinity between nodes."""
    graph_neighbours: int = 8
    semantic_dim: int = 512

    policy_weight: float = 1.0
    """Of the policy's own loss."""
    semantic_weight: float = 1.0
    """α: of the semantic vectors' part of the dual-stream loss."""
    action_weight: float = 1.0
    """β: of the predicted actions' part."""
    relation_weight: float = 0.5
    """η: of the cosines between samples, within the semantic part."""
    gamma: float = 2.0
    """Layer l of L counts (l / (L - 1)) ** gamma."""
    budget_weight: float = 5.0
    """Of the squared distance of the gates' FLOPs from their target."""
    balance_weight: float = 0.0
    """Of the variance of the layers' use (the paper's balance loss)."""
    decisive_weight: float = 0.01
    """Pushes the router's probabilities away from 1/2."""
    anneal: float = 0.4
    """The FLOPs' target falls from 1 to target_flops over this part of the updates, unless the router starts there."""
    router_hidden: int = 64
    """Width of the router's projection of each kind of token."""
    router_lr: float = 1e-3
    router_standardise: bool = False
    """Samples differ in the router's eyes whatever the budget asks (a BatchNorm of its logits): no single path for all."""
    router_start: Literal["even", "influence", "tasks", "experts"] = "even"
    """The router prefers no layer at first; or the more influential ones: under hold_budget it then starts as static pruning. Or it
    starts at target_flops with a path for each task: of the layers that it needs most (task_paths), or of copies of the most
    influential ones, which then belong to the task alone (task_experts)."""
    router_delay: float = 0.0
    """The router stays as it starts for this part of the updates (1: for good), while the layers learn to do without each other.
    With a path for each task, samples take their task's for so long, and the router learns to tell it."""
    hold_budget: bool = False
    """Every update keeps the target exactly: layers and samples compete for it (BudgetShift), instead of the budget's loss."""

    steps: int = 900
    """Updates of stage 2."""
    weight_decay: float = 1e-4
    cache_dtype: Literal["float16", "float32"] = "float16"
    """How the teacher's answers are kept."""

    def validate(self) -> None:
        """Checks every value before any work.

        Raises:
            ValueError: names the setting, its value and what is allowed.
        """
        self._validate_acting()
        self._positive(
            "lora_rank", "views", "heads_steps", "heads_lr", "graph_hidden", "graph_rank", "graph_neighbours",
            "semantic_dim", "router_hidden", "router_lr",
        )  # fmt: skip
        self._not_negative(
            "policy_weight", "semantic_weight", "action_weight", "relation_weight", "gamma", "budget_weight", "balance_weight",
            "decisive_weight", "demo_seed", "shift",
        )  # fmt: skip
        self._one_of("routing", ("learned", "static", "random"))
        self._one_of("router_start", ("even", "influence", "tasks", "experts"))
        self._one_of("train", ("transformer", "all", "lora"))
        self._one_of("cache_dtype", ("float16", "float32"))
        if not 0 < self.target_flops <= 1:
            raise ValueError(f"target_flops must be a fraction in (0, 1], got {self.target_flops!r}")
        self._check_noise(self.demo_noise)
        if not 0 <= self.router_delay <= 1:
            raise ValueError(f"router_delay must be a part of the updates in [0, 1], got {self.router_delay!r}")
        if self.router_start in ("tasks", "experts") and self.router_standardise:
            raise ValueError(
                f'router_start="{self.router_start}" sets the decisions, which router_standardise=True would undo; drop one of them'
            )
        if not 0 <= self.anneal < 1:
            raise ValueError(f"anneal must be a part of the updates in [0, 1), got {self.anneal!r}")
        if self.demos.isdigit() and int(self.demos) < 1:
            raise ValueError(f"demos must be a number ≥ 1 or a path, got {self.demos!r}")
