"""Registers an op: one schema, one fake kernel, one autograd rule, whatever backend runs it.

Python owns the schema (``torch.library.custom_op``), so ``torch.compile``, ``torch.export``, FakeTensor and opcheck see
the same op on a laptop without a compiler and on a GPU with Triton. The backend is chosen inside the op, at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["define_op"]


def define_op(
    name: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[[Any, Any, Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Registers ``xdfast::NAME`` and returns the callable op.

    Args:
        name: op name without the namespace.
        implementation: the kernel. Its type annotations are the schema. It runs with autocast disabled, so that an
            op decides its own precision (fp32 statistics and accumulation) instead of inheriting half matmuls.
        fake: shapes and dtypes only, no data.
        setup_context: saves for backward, after the forward.
        backward: gradients for every input (``None`` where there is none).
    """

    def without_autocast(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        with torch.autocast(device_type=device, enabled=False):
            return implementation(*args)

    schema = torch.library.infer_schema(implementation, mutates_args=())
    op = torch.library.custom_op(f"xdfast::{name}", without_autocast, mutates_args=(), schema=schema)
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=setup_context)
    return op
