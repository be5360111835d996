"""The fixture ``interpreter``: calls functions of ``xdfast.kernels`` under Triton's interpreter on the CPU."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory) -> Iterator[Callable[..., SimpleNamespace]]:
    """``interpreter("rsd_forward", student, …, table=None, groups=None, splits=None)`` → outputs, launches, …

    The functions of rsd by their name; others as ``module.function``: where they return nothing, ``outputs`` is their
    (arguments, keyword arguments) after the call.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("interpreter") / "stderr.txt"
    worker = Path(__file__).parent / "interpreter_worker.py"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
        )

    def call(function: str, *args: Any, table=None, groups=None, splits=None, **kwargs: Any) -> SimpleNamespace:
        buffer = io.BytesIO()
        request = {"function": function, "args": args, "kwargs": kwargs}
        torch.save(request | {"table": table, "groups": groups, "splits": splits}, buffer)  # keeps strides of views
        process.stdin.write(struct.pack("<q", buffer.tell()) + buffer.getvalue())
        process.stdin.flush()
        header = process.stdout.read(8)
        assert len(header) == 8, f"the interpreter's process ended: {log.read_text()[-3000:]}"
        answer = torch.load(io.BytesIO(process.stdout.read(*struct.unpack("<q", header))), weights_only=True)
        assert "error" not in answer, answer["error"]
        return SimpleNamespace(**answer)

    yield call
    process.stdin.close()
    try:
        process.wait(timeout=3)
    except subprocess.TimeoutExpired:  # it has answered all that was asked; how long it takes to leave is no test
        process.kill()
        process.wait()
