"""Modules with parameters: projectors between student and teacher, the router of a routed student and its gates.

And the graph heads that read from a policy's layers what they say about the action."""

from __future__ import annotations

from xdfast.nn.aad import AAD
from xdfast.nn.baseline_routers import RandomRouter, StaticRouter, block_influence, most_influential
from xdfast.nn.budget_shift import BudgetShift, budget_shift
from xdfast.nn.calibrate import Calibration, calibrate_flops, select_per_sample
from xdfast.nn.calibrated_model import calibrate_model
from xdfast.nn.contrast_heads import ContrastHeads
from xdfast.nn.convert import Routed, route
from xdfast.nn.convert_timm import whole_block
from xdfast.nn.gates import GateFunction, GateSchedule
from xdfast.nn.graph_encapsulation import GATLayer, GraphEncapsulation
from xdfast.nn.latency_budget import LatencyCalibration, calibrate_latency
from xdfast.nn.ofa_projector import OFAProjector
from xdfast.nn.router import LayerRouter
from xdfast.nn.spatial import HintRegressor, map_side, to_grid, to_map
from xdfast.nn.steps import fixed_gates, routed_stacks

__all__ = [
    "AAD",
    "BudgetShift",
    "Calibration",
    "ContrastHeads",
    "GATLayer",
    "GateFunction",
    "GateSchedule",
    "GraphEncapsulation",
    "HintRegressor",
    "LatencyCalibration",
    "LayerRouter",
    "OFAProjector",
    "RandomRouter",
    "Routed",
    "StaticRouter",
    "block_influence",
    "budget_shift",
    "calibrate_flops",
    "calibrate_latency",
    "calibrate_model",
    "fixed_gates",
    "map_side",
    "most_influential",
    "route",
    "routed_stacks",
    "select_per_sample",
    "to_grid",
    "to_map",
    "whole_block",
]
