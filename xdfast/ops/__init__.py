"""Functions on tensors: maths, checks, schema, fake kernel, autograd, choice of backend.

Only this room registers ops, validates tensors and chooses backends.
"""

from __future__ import annotations

from xdfast.ops._backends import backend, explain
from xdfast.ops.rsd import prepare_teacher, rsd_loss

__all__ = ["backend", "explain", "prepare_teacher", "rsd_loss"]
