"""Runs kernels under Triton's interpreter: requests on stdin, answers on stdout, each a length and a torch.save.

TRITON_INTERPRET must be set before Triton is imported, and the process of the tests may have imported it; hence a
process of its own (fixture ``interpreter``). Fresh memory is poisoned in every request: NaN in floating tensors, garbage
in integer ones, so that a kernel that reads what nobody wrote is found out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import struct
import sys
import traceback
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from xdfast.kernels import configs, routed_configs, rsd

_SMALL = configs.Tile(limit=None, rows=16, columns=16, warps=1, depth=16)
_TABLES = {
    # No resident tiles: streaming statistics, U parked, many tiles of every product.
    "small": {kernel: () if kernel.endswith("resident") else (_SMALL,) for kernel in configs.KERNELS},
    # Many tiles along a side of the product, quickly.
    "small product": {"product": (replace(_SMALL, depth=128),)},
}


def _forward(s, t, kappa, eps, eps_mode, precision, need_student, need_teacher, gram=None):
    """(invariance, decorrelation, mean diagonal, ∂L/∂s, ∂L/∂t), scale 1."""
    options = (kappa, eps, eps_mode, precision, 1.0, need_student, need_teacher, gram)
    return rsd.rsd_loss_and_gradients(s, t, *options)[1:]


_functions = {
    "rsd_forward": _forward,
    "rsd_loss_and_gradients": rsd.rsd_loss_and_gradients,
    "teacher_gram": rsd.teacher_gram,
}
_original = {name: getattr(configs, name) for name in ("tiles", "groups", "splits")}
_routed = {name: getattr(routed_configs, name) for name in ("lookup", "ragged_tile", "row_tile", "PART")}
# Many tiles, and several parts of the statistics in one of them.
_SMALL_ROUTED = {
    "lookup": lambda *key: routed_configs.RoutedTile(None, 16, 32, 1, 1, 16),
    "ragged_tile": lambda *key: routed_configs.RoutedTile(None, 16, 32, 1, 1, 16, programs=3),
    "row_tile": lambda *key: routed_configs.RoutedTile(None, 4, 16, 1),
    "PART": 16,
}


def _launch(function, *args, **kwargs):
    """Calls ``module.function`` of xdfast.kernels, which returns nothing but writes into tensors; returns those."""
    module, name = function.split(".")
    returned = getattr(importlib.import_module(f"xdfast.kernels.{module}"), name)(*args, **kwargs)
    return returned if returned is not None else (args, kwargs)


class _Log(TorchDispatchMode):
    """What a call does besides arithmetic: launches, operators on tensors, elements allocated at once."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.operators, self.largest, self.inside = [], [], 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not self.inside:  # the interpreter uses PyTorch too
            self.operators.append(function.overloadpacket.__name__)
            if self.operators[-1] == "empty":
                self.largest = max(self.largest, out.numel())
                self.inside = True
                out.fill_(float("nan") if out.is_floating_point() else 123456789)
                self.inside = False
        return out


@contextlib.contextmanager
def _logged_launches(log: _Log):
    run = interpreter.GridExecutor.__call__

    def logged(self, *args, **kwargs):
        log.launches.append(self.fn.__name__)
        log.inside = True
        run(self, *args, **kwargs)
        log.inside = False

    interpreter.GridExecutor.__call__ = logged
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = run


def _answer(function, args, kwargs, table=None, groups=None, splits=None):
    for name, value in _original.items():
        setattr(configs, name, value)
    if table:
        configs.tiles = lambda kernel, *key: _TABLES[table].get(kernel, _original["tiles"](kernel, *key))
    if groups:
        configs.groups = lambda arch, blocks, row_tiles: min(groups, row_tiles)
    if splits:
        configs.splits = lambda arch, tiles, steps: splits
    for name, value in (_SMALL_ROUTED if table == "small" else _routed).items():
        setattr(routed_configs, name, value)
    rsd._plan.cache_clear()
    rsd._plan_gram.cache_clear()
    log = _Log()
    with log, _logged_launches(log):
        run = _functions.get(function) or functools.partial(_launch, function)
        outputs = run(*args, **kwargs)
    return {"outputs": outputs, "launches": log.launches, "operators": log.operators, "largest": log.largest}


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not get between the answers
    torch.set_num_threads(1)
    while header := sys.stdin.buffer.read(8):
        request = torch.load(io.BytesIO(sys.stdin.buffer.read(*struct.unpack("<q", header))), weights_only=True)
        try:
            answer = _answer(**request)
        except Exception:
            answer = {"error": traceback.format_exc()}
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        answers.write(struct.pack("<q", buffer.tell()) + buffer.getvalue())
        answers.flush()


if __name__ == "__main__":
    main()
