"""Modules with parameters: the projector between student and teacher, the router of a routed student and its gates.

And the graph heads that read from a policy's layers what they say about the action."""

from __future__ import annotations

from xdfast.nn.aad import AAD
from xdfast.nn.baseline_routers import RandomRouter, StaticRouter, block_influence, most_influential
from xdfast.nn.budget_shift import BudgetShift, budget_shift
from xdfast.nn.calibrate import Calibration, calibrate_flops, select_per_sample
from xdfast.nn.calibrated_model import calibrate_model
from xdfast.nn.convert import Routed, route
from xdfast.nn.convert_timm import whole_block
from xdfast.nn.gates import GateFunction, GateSchedule
from xdfast.nn.graph_encapsulation import GATLayer, GraphEncapsulation
from xdfast.nn.latency_budget import LatencyCalibration, calibrate_latency
from xdfast.nn.router import LayerRouter
from xdfast.nn.steps import fixed_gates, routed_stacks

__all__ = [
    "AAD",
    "BudgetShift",
    "Calibration",
    "GATLayer",
    "GateFunction",
    "GateSchedule",
    "GraphEncapsulation",
    "LatencyCalibration",
    "LayerRouter",
    "RandomRouter",
    "Routed",
    "StaticRouter",
    "block_influence",
    "budget_shift",
    "calibrate_flops",
    "calibrate_latency",
    "calibrate_model",
    "fixed_gates",
    "most_influential",
    "route",
    "routed_stacks",
    "select_per_sample",
    "whole_block",
]
