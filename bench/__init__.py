"""Benchmarks: every figure a ratio against a named rival, measured in one interleaved run. Installed as ``xdfast.bench``."""

from __future__ import annotations

import sys

# pytest imports conftest.py and bench_*.py as `bench.…`, and with them this file; their helpers come from xdfast.bench.
if __name__ != "xdfast.bench" and "pytest" not in sys.modules:
    raise ImportError(
        f"this folder is installed as xdfast.bench and must not be imported as {__name__!r}: use `import xdfast.bench`, "
        "and run the benchmarks with `xdfast bench rsd` or the `pytest` script"
    )
