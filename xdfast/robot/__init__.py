"""Robots: simulators, demonstrations, the diffusion policy, closed-loop rollouts.

``sim/`` and ``demos/`` import neither torch nor Triton: they also run in processes that render with software OpenGL, whose
LLVM does not get along with Triton's. So names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "Controller": "xdfast.robot.controller",
    "DiffusionPolicy": "xdfast.robot.policy",
    "PolicySpec": "xdfast.robot.policy",
    "DiffusionSettings": "xdfast.robot.diffusion",
    "EncoderSpec": "xdfast.robot.encoder",
    "build_encoder": "xdfast.robot.encoder",
    "load_policy": "xdfast.robot.policy_files",
    "save_policy": "xdfast.robot.policy_files",
}

__all__ = [
    "Controller",
    "DiffusionPolicy",
    "DiffusionSettings",
    "EncoderSpec",
    "PolicySpec",
    "build_encoder",
    "load_policy",
    "save_policy",
]

if TYPE_CHECKING:
    from xdfast.robot.controller import Controller
    from xdfast.robot.diffusion import DiffusionSettings
    from xdfast.robot.encoder import EncoderSpec, build_encoder
    from xdfast.robot.policy import DiffusionPolicy, PolicySpec
    from xdfast.robot.policy_files import load_policy, save_policy


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'xdfast.robot' has no attribute {name!r}; there are: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value
