"""Registers an op: one schema, one fake kernel, one autograd rule, whatever backend runs it.

Python owns the schema (``torch.library.custom_op``), so ``torch.compile``, ``torch.export``, FakeTensor and opcheck see
the same op on a laptop without a compiler and on a GPU with Triton. The backend is chosen inside the op, at run time.

A call through the dispatcher costs about 150 µs for forward and backward, more than a small loss itself. Where nothing
watches the dispatcher (no compiler, no mode, no transform, plain tensors), the same implementation runs through a
``torch.autograd.Function`` with the same rules instead, at a fifth of that cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["define_op", "is_one", "watched"]


def define_op(
    name: str,
    implementation: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    setup_context: Callable[[Any, Any, Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers ``xdfast::NAME`` and returns a function that calls it, past the dispatcher where nothing watches.

    Args:
        name: op name without the namespace.
        implementation: the kernel. Its type annotations are the schema. It runs with autocast disabled, so that an
            op decides its own precision (fp32 statistics and accumulation) instead of inheriting half matmuls.
        fake: shapes and dtypes only, no data.
        setup_context: saves for backward, after the forward.
        backward: gradients for every input (``None`` where there is none). Without it the op has no gradient.
    """

    def without_autocast(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return implementation(*args)
        with torch.autocast(device_type=device, enabled=False):
            return implementation(*args)

    schema = torch.library.infer_schema(implementation, mutates_args=())
    op = torch.library.custom_op(f"xdfast::{name}", without_autocast, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if backward is None or setup_context is None:
        return op
    op.register_autograd(backward, setup_context=setup_context)

    def forward(ctx: Any, *args: Any) -> Any:
        output = without_autocast(*args)
        setup_context(ctx, args, output)
        return output

    # With setup_context as a method of its own, apply() inspects signatures at every call: 25 µs.
    rules = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    eager: Any = type(f"xdfast_{name}", (torch.autograd.Function,), rules)

    def call(*args: Any) -> Any:
        if watched(args):
            return op(*args)
        return eager.apply(*args) if torch.is_grad_enabled() else without_autocast(*args)

    call.__name__ = call.__qualname__ = name
    return call


#: Types of arguments that need no closer look.
_PLAIN = frozenset({torch.Tensor, nn.Parameter, float, int, bool, str, type(None)})


def watched(args: tuple[Any, ...]) -> bool:
    """Whether anything (compiler, FakeTensor, FLOP counter, functorch, tensor subclass) has to see the op in the dispatcher."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
        or any(isinstance(a, torch.Tensor) for a in args if type(a) not in _PLAIN)
    )


def is_one(grad: torch.Tensor) -> bool:
    """Whether an incoming gradient is the number 1, where looking is free: a plain CPU tensor that nothing traces.

    A saved gradient may then be returned as it is, without a pass over it: autograd copies what others still hold.
    """
    return grad.device.type == "cpu" and not watched((grad,)) and grad.item() == 1
