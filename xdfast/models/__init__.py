"""Teachers and students: any timm model, ``nn.Module`` or checkpoint behind one interface, and the files they live in."""

from __future__ import annotations

from xdfast.models.checkpoint import CheckpointError, atomic_write, load_resume, save_resume
from xdfast.models.create import create_model
from xdfast.models.encoder import load_encoder
from xdfast.models.features import FeatureModel, ModelOutput
from xdfast.models.routed import budget_loss, hold_budget, load_routed, save_routed
from xdfast.models.students import save_student, weights_hash
from xdfast.models.taps import pool_tap, tap_widths

__all__ = [
    "CheckpointError",
    "FeatureModel",
    "ModelOutput",
    "atomic_write",
    "budget_loss",
    "create_model",
    "hold_budget",
    "load_encoder",
    "load_resume",
    "load_routed",
    "pool_tap",
    "save_resume",
    "save_routed",
    "save_student",
    "tap_widths",
    "weights_hash",
]
