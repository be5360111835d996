"""The three verbs (distill, finetune, evaluate), the report, and their settings."""

from __future__ import annotations

from xdfast.pipeline.actdistill_config import ActDistillConfig
from xdfast.pipeline.compare import CompareConfig, CompareResult, compare
from xdfast.pipeline.config import DistillConfig, EvaluateConfig, FinetuneConfig
from xdfast.pipeline.distill import distill
from xdfast.pipeline.evaluate import EvaluateResult, evaluate
from xdfast.pipeline.export import export
from xdfast.pipeline.finetune import finetune
from xdfast.pipeline.folder import RunResult, load_run
from xdfast.pipeline.policy_config import EvaluatePolicyConfig, PolicyConfig
from xdfast.pipeline.publish import pull, push
from xdfast.pipeline.report import report
from xdfast.pipeline.vla_config import VLAConfig

__all__ = [
    "ActDistillConfig",
    "CompareConfig",
    "CompareResult",
    "DistillConfig",
    "EvaluateConfig",
    "EvaluatePolicyConfig",
    "EvaluateResult",
    "FinetuneConfig",
    "PolicyConfig",
    "RunResult",
    "VLAConfig",
    "compare",
    "distill",
    "evaluate",
    "export",
    "finetune",
    "load_run",
    "pull",
    "push",
    "report",
]
