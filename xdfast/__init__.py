"""xdfast: distil a big vision model into a small fast one, and prove that it is fast.

Every public name is loaded on first use (PEP 562), so ``import xdfast`` costs little beyond ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from xdfast._version import __version__

_PUBLIC = {
    # drop-in pieces
    "RSDLoss": "xdfast.losses.rsd",
    "BarlowTwinsLoss": "xdfast.losses.barlow_twins",
    "VICRegLoss": "xdfast.losses.vicreg",
    "KDLoss": "xdfast.losses.kd",
    "FeatureMSELoss": "xdfast.losses.feature",
    "AAD": "xdfast.nn.aad",
    "BudgetLoss": "xdfast.losses.budget",
    "route": "xdfast.nn.convert",
    "RoutedStack": "xdfast.nn.routed",
    "create_loss": "xdfast.losses",
    "list_losses": "xdfast.losses",
    "rsd_loss": "xdfast.ops",
    "prepare_teacher": "xdfast.ops",
    "backend": "xdfast.ops",
    # models
    "create_model": "xdfast.models",
    "load_encoder": "xdfast.models",
    "load_routed": "xdfast.models",
    "save_routed": "xdfast.models",
    "load_policy": "xdfast.robot",
    "DiffusionPolicy": "xdfast.robot",
    # the pipeline
    "DistillConfig": "xdfast.pipeline",
    "FinetuneConfig": "xdfast.pipeline",
    "EvaluateConfig": "xdfast.pipeline",
    "PolicyConfig": "xdfast.pipeline",
    "EvaluatePolicyConfig": "xdfast.pipeline",
    "ActDistillConfig": "xdfast.pipeline",
    "CompareConfig": "xdfast.pipeline",
    "compare": "xdfast.pipeline",
    "VLAConfig": "xdfast.pipeline",
    "distill": "xdfast.pipeline",
    "finetune": "xdfast.pipeline",
    "evaluate": "xdfast.pipeline",
    "report": "xdfast.pipeline",
    "export": "xdfast.pipeline",
    "push": "xdfast.pipeline",
    "pull": "xdfast.pipeline",
}

__all__ = [
    "AAD",
    "ActDistillConfig",
    "BarlowTwinsLoss",
    "BudgetLoss",
    "CompareConfig",
    "DiffusionPolicy",
    "DistillConfig",
    "EvaluateConfig",
    "EvaluatePolicyConfig",
    "FeatureMSELoss",
    "FinetuneConfig",
    "KDLoss",
    "PolicyConfig",
    "RSDLoss",
    "RoutedStack",
    "VICRegLoss",
    "VLAConfig",
    "__version__",
    "backend",
    "compare",
    "create_loss",
    "create_model",
    "distill",
    "evaluate",
    "export",
    "finetune",
    "list_losses",
    "load_encoder",
    "load_policy",
    "load_routed",
    "prepare_teacher",
    "pull",
    "push",
    "report",
    "route",
    "rsd_loss",
    "save_routed",
]

if TYPE_CHECKING:  # what type checkers and editors see; nothing of it runs
    from xdfast.losses import create_loss, list_losses
    from xdfast.losses.barlow_twins import BarlowTwinsLoss
    from xdfast.losses.budget import BudgetLoss
    from xdfast.losses.feature import FeatureMSELoss
    from xdfast.losses.kd import KDLoss
    from xdfast.losses.rsd import RSDLoss
    from xdfast.losses.vicreg import VICRegLoss
    from xdfast.models import create_model, load_encoder, load_routed, save_routed
    from xdfast.nn.aad import AAD
    from xdfast.nn.convert import route
    from xdfast.nn.routed import RoutedStack
    from xdfast.ops import backend, prepare_teacher, rsd_loss
    from xdfast.pipeline.actdistill_config import ActDistillConfig
    from xdfast.pipeline.compare import CompareConfig, compare
    from xdfast.pipeline.config import DistillConfig, EvaluateConfig, FinetuneConfig
    from xdfast.pipeline.distill import distill  # from its module: of xdfast.pipeline type checkers take the module
    from xdfast.pipeline.evaluate import evaluate
    from xdfast.pipeline.export import export
    from xdfast.pipeline.finetune import finetune
    from xdfast.pipeline.policy_config import EvaluatePolicyConfig, PolicyConfig
    from xdfast.pipeline.publish import pull, push
    from xdfast.pipeline.report import report
    from xdfast.pipeline.vla_config import VLAConfig
    from xdfast.robot import DiffusionPolicy, load_policy


#: Sub-packages reachable as attributes, loaded on first use like the names above.
_ROOMS = ("data", "deploy", "losses", "models", "nn", "ops", "pipeline", "reporting", "robot")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"xdfast.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'xdfast' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
