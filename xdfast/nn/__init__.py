"""Modules with parameters: the projector between student and teacher, the router of a routed student and its gates."""

from __future__ import annotations

from xdfast.nn.aad import AAD
from xdfast.nn.calibrate import Calibration, calibrate_flops, select_per_sample
from xdfast.nn.gates import GateFunction, GateSchedule
from xdfast.nn.latency_budget import LatencyCalibration, calibrate_latency
from xdfast.nn.router import LayerRouter

__all__ = [
    "AAD",
    "Calibration",
    "GateFunction",
    "GateSchedule",
    "LatencyCalibration",
    "LayerRouter",
    "calibrate_flops",
    "calibrate_latency",
    "select_per_sample",
]
