"""What the losses of other papers ask of their inputs, in one wording."""

from __future__ import annotations

import torch
from torch import Tensor

from xdfast.ops._checks import check_matrix, check_pair

__all__ = ["check_logits", "full_precision", "in_full_precision", "row_numbers", "target_classes"]


def full_precision(x: Tensor) -> Tensor:
    """Half inputs as float32, others as they are."""
    return x.float() if x.dtype.itemsize < 4 else x


def in_full_precision(x: Tensor) -> torch.autocast:
    """A context in which autocast leaves matrix products alone: inputs are float32 on purpose."""
    return torch.autocast(x.device.type, enabled=False)


def check_logits(student: Tensor, teacher: Tensor, *, min_rows: int = 1, min_classes: int = 1) -> None:
    """Both must be logits [N, C] of the same shape and device.

    Raises:
        ValueError, TypeError: they are not; the message names shape and fix.
    """
    check_matrix("student", student, min_rows=min_rows)
    check_matrix("teacher", teacher, min_rows=min_rows)
    check_pair("student", student, "teacher", teacher, fix="both models must have the same classes")
    if student.shape[1] < min_classes:
        raise ValueError(
            f"student must have at least {min_classes} classes, got shape {list(student.shape)}: there is no class besides "
            "the target"
        )


def target_classes(targets: Tensor, logits: Tensor) -> Tensor:
    """int64 [N]: the class of each row, from class numbers [N] or probabilities [N, C] (mixup: the likeliest).

    Raises:
        TypeError: no tensor, or class numbers that are no integers.
        ValueError: another shape or device, or (on the CPU; elsewhere asking would wait for the device) a class outside of
            [0, C).
    """
    n, c = logits.shape
    if isinstance(targets, Tensor) and targets.is_floating_point() and targets.dim() == 2:
        if targets.shape != logits.shape:
            raise ValueError(
                f"targets must be class numbers [{n}] or probabilities [{n}, {c}], got {list(targets.shape)}; use the "
                "labels of the same batch and classes"
            )
        targets = targets.argmax(1)
    return row_numbers("targets", targets, logits, c, "a class")


def row_numbers(name: str, numbers: Tensor, rows: Tensor, limit: int, what: str) -> Tensor:
    """int64 [N] in [0, ``limit``), one for each of ``rows``.

    Raises:
        TypeError: no tensor of integers.
        ValueError: another shape or device than that of ``rows``, or (on the CPU) a number out of range.
    """
    if not isinstance(numbers, Tensor) or numbers.is_floating_point() or numbers.dtype in (torch.bool, torch.complex64):
        got = numbers.dtype if isinstance(numbers, Tensor) else type(numbers).__name__
        raise TypeError(f"{name} must be a tensor of integers [N], got {got}; use {name}.long()")
    if numbers.shape != rows.shape[:1]:
        raise ValueError(
            f"{name} must have shape [{rows.shape[0]}], {what} for each sample, got {list(numbers.shape)}; use those of "
            "the same batch"
        )
    if numbers.device != rows.device:
        raise ValueError(
            f"{name} must be on {rows.device} like the student's output, got {numbers.device}; use {name}.to(…)"
        )
    if numbers.device.type == "cpu" and not torch.compiler.is_compiling() and numbers.numel():
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} must be in [0, {limit}), got {low if low < 0 else high}")
    return numbers.long()
