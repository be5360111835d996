"""Distillation losses with one interface, and a registry to make them by name."""

from __future__ import annotations

from xdfast.losses.actdistill import ActDistillComponents, ActDistillLoss, stage1_loss
from xdfast.losses.barlow_twins import BarlowTwinsLoss
from xdfast.losses.base import DistillLoss, create_loss, list_losses, loss_options, parse_losses, register_loss
from xdfast.losses.budget import BudgetLoss
from xdfast.losses.crd import CRDLoss
from xdfast.losses.dist import DISTLoss
from xdfast.losses.dkd import DKDLoss
from xdfast.losses.feature import FeatureMSELoss
from xdfast.losses.fitnet import FitNetLoss
from xdfast.losses.kd import KDLoss
from xdfast.losses.ofa import OFALoss
from xdfast.losses.rkd import RKDLoss
from xdfast.losses.rsd import RSDLoss
from xdfast.losses.vicreg import VICRegLoss

__all__ = [
    "ActDistillComponents",
    "ActDistillLoss",
    "BarlowTwinsLoss",
    "BudgetLoss",
    "CRDLoss",
    "DISTLoss",
    "DKDLoss",
    "DistillLoss",
    "FeatureMSELoss",
    "FitNetLoss",
    "KDLoss",
    "OFALoss",
    "RKDLoss",
    "RSDLoss",
    "VICRegLoss",
    "create_loss",
    "list_losses",
    "loss_options",
    "parse_losses",
    "register_loss",
    "stage1_loss",
]
