"""What an exporter says when it cannot, in a sentence that names the operator and the line."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch

__all__ = ["ExportError", "cannot"]

_OPERATOR = (
    re.compile(r"op='([\w.:]+)'(?:, overload='(\w+)')?"),  # torch.onnx
    re.compile(r"call_function\[target=(?:torch\.ops\.)?([\w.]+)\]"),  # a node of torch.fx
    re.compile(r"\b((?:aten|prims|torchvision|xdfast|quantized|higher_order)(?:\.|::)\w+(?:\.\w+)?)\b"),
)
#: Lines in there are not the model's.
_TORCH = Path(torch.__file__).parent


class ExportError(RuntimeError):
    """A model cannot be exported, or what was exported does not agree with it. The message names what stands in the way."""


def cannot(what: str, tool: str, error: BaseException, hint: str = "") -> ExportError:
    """An :class:`ExportError` from an exporter's own: operator, reason, and the line of Python it comes from.

    Args:
        what: the graph.
        tool: who refused it.
        error: its exception, with causes.
        hint: what to do, a sentence.
    """
    chain = _chain(error)
    text = "\n".join(str(part) for part in chain)
    operator = _operator(text)
    deepest: BaseException = error
    while deepest.__cause__ is not None:  # what merely happened before is no reason
        deepest = deepest.__cause__
    reason = next((line.strip() for line in str(deepest).splitlines() if line.strip()), type(deepest).__name__)
    parts = [f"{what} cannot be exported by {tool}"]
    if operator:
        parts.append(f"operator {operator}")
    parts.append(reason if len(reason) < 400 else f"{reason[:400]}…")
    message = ": ".join(parts)
    place = _place(chain)
    if place:
        message += f" (at {place})"
    return ExportError(f"{message}. {hint}".rstrip(". ") + ".")


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what caused it, the root last."""
    found: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in found:
        found.append(at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return found


def _operator(text: str) -> str:
    for pattern in _OPERATOR:
        match = pattern.search(text)
        if match:
            return ".".join(part for part in match.groups() if part)
    return ""


def _place(chain: list[BaseException]) -> str:
    """The innermost line that is not torch's: what asked for the operator."""
    for error in reversed(chain):
        frames = traceback.extract_tb(error.__traceback__)
        ours = [
            frame for frame in frames if _TORCH not in Path(frame.filename).parents and Path(frame.filename).is_file()
        ]
        ours = [
            frame for frame in ours if Path(frame.filename).parent != Path(__file__).parent or "forward" in frame.name
        ]
        if ours:
            frame = ours[-1]
            return f"{Path(frame.filename).name}:{frame.lineno}, {frame.line}"
    return ""
