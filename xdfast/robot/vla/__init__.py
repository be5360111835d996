"""Vision-language-action models: our own compact one, its data and files, and what any of them offers as a teacher.

Names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "CompactVLA": "compact",
    "HuggingFaceSpec": "hf_spec",
    "HuggingFaceVLA": "hf",
    "InstructedVLA": "acting",
    "MultiTaskLoader": "multitask",
    "MultiTaskWindows": "multitask",
    "Observation": "interface",
    "TeacherVLA": "interface",
    "Tokenizer": "instructions",
    "VLABatch": "multitask",
    "VLASpec": "spec",
    "ViewBatch": "views",
    "ViewLoader": "views",
    "check_teacher": "interface",
    "derive_student": "students",
    "hidden_states": "interface",
    "instructions_of": "instructions",
    "load_hf_vla": "hf_pretrained",
    "load_vla": "files",
    "save_hf_vla": "hf_pretrained",
    "save_vla": "files",
    "task_experts": "task_experts",
    "task_paths": "task_paths",
}

__all__ = [
    "CompactVLA",
    "HuggingFaceSpec",
    "HuggingFaceVLA",
    "InstructedVLA",
    "MultiTaskLoader",
    "MultiTaskWindows",
    "Observation",
    "TeacherVLA",
    "Tokenizer",
    "VLABatch",
    "VLASpec",
    "ViewBatch",
    "ViewLoader",
    "check_teacher",
    "derive_student",
    "hidden_states",
    "instructions_of",
    "load_hf_vla",
    "load_vla",
    "save_hf_vla",
    "save_vla",
    "task_experts",
    "task_paths",
]

if TYPE_CHECKING:
    from xdfast.robot.vla.acting import InstructedVLA
    from xdfast.robot.vla.compact import CompactVLA
    from xdfast.robot.vla.files import load_vla, save_vla
    from xdfast.robot.vla.hf import HuggingFaceVLA
    from xdfast.robot.vla.hf_pretrained import load_hf_vla, save_hf_vla
    from xdfast.robot.vla.hf_spec import HuggingFaceSpec
    from xdfast.robot.vla.instructions import Tokenizer, instructions_of
    from xdfast.robot.vla.interface import Observation, TeacherVLA, check_teacher, hidden_states
    from xdfast.robot.vla.multitask import MultiTaskLoader, MultiTaskWindows, VLABatch
    from xdfast.robot.vla.spec import VLASpec
    from xdfast.robot.vla.students import derive_student
    from xdfast.robot.vla.task_experts import task_experts
    from xdfast.robot.vla.task_paths import task_paths
    from xdfast.robot.vla.views import ViewBatch, ViewLoader


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'xdfast.robot.vla' has no attribute {name!r}; there are: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"xdfast.robot.vla.{_NAMES[name]}"), name)
    globals()[name] = value
    return value
