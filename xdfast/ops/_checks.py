"""One wording for bad tensors: what was expected, what came, what to do."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xdfast.errors import nearest

__all__ = ["check_choice", "check_matrix", "check_number", "check_pair"]


def check_matrix(name: str, x: Tensor, *, min_rows: int = 1) -> None:
    """``x`` must be a real floating-point matrix [N, D] with N ≥ ``min_rows`` and D ≥ 1.

    Raises:
        TypeError: not a tensor, or an integer, boolean or complex dtype.
        ValueError: not two-dimensional, too few rows, no column.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape [N, D], got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"{name} must be floating point (float64, float32, bfloat16 or float16), got {x.dtype}; use {name}.float()"
        )
    if x.dim() != 2:
        hint = "pool or flatten it to one vector per sample" if x.dim() > 2 else "add the batch dimension"
        raise ValueError(f"{name} must have shape [N, D] (samples, features), got {list(x.shape)}; {hint}")
    if x.shape[0] < min_rows:
        raise ValueError(
            f"{name} must have at least {min_rows} samples, got shape {list(x.shape)}: a correlation over the batch is "
            "undefined for fewer; use a larger batch or drop_last=True in the loader"
        )
    if x.shape[1] < 1:
        raise ValueError(f"{name} must have at least one feature, got shape {list(x.shape)}")


def check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor, *, fix: str) -> None:
    """``a`` and ``b`` must have the same shape and device.

    Raises:
        ValueError: shapes or devices differ; ``fix`` says what to do about shapes.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"{name_a} and {name_b} must have the same shape, got {list(a.shape)} and {list(b.shape)}; {fix}"
        )
    if a.device != b.device:
        raise ValueError(
            f"{name_a} and {name_b} must be on the same device, got {a.device} and {b.device}; use {name_b}.to({name_a}.device)"
        )


def check_number(name: str, value: float, *, minimum: float, strict: bool = False) -> float:
    """``value`` must be a finite number ≥ ``minimum`` (> if ``strict``); returned as float.

    Raises:
        TypeError: not a real number.
        ValueError: out of range, NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} ({value!r})")
    bad = not value > minimum if strict else not value >= minimum
    if bad or value == float("inf"):
        raise ValueError(f"{name} must be finite and {'>' if strict else '≥'} {minimum:g}, got {value!r}")
    return float(value)


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """``value`` must be one of ``choices``; returned.

    Raises:
        ValueError: it is not; the nearest choice is offered.
    """
    if value not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"{name} must be one of {known}, got {value!r}{nearest(str(value), choices)}")
    return value
