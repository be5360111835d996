"""``xdfast bench routed``: measures routed stacks on this machine and prints the table."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from xdfast.distributed import device_for_rank

from .harness import machine
from .routed import measure
from .routed_cases import SIZES, RoutedCase, default_cases
from .routed_table import SHORT_HEADINGS, marked, rows, target_lines
from .run import _write

__all__ = ["RoutedOptions", "cases_of", "main", "run"]

_MALLOC = (
    "freed memory goes back to the system at every call (no MALLOC_MMAP_THRESHOLD_ set), which can be slower than the layers: "
    "`make bench-routed` sets what keeps it"
)


@dataclass
class RoutedOptions:
    """Routed stacks: ours by share of active work against dense stacks and other ways to skip, in interleaved rounds.

    Without sizes, batch, dtype, gates or train: the committed table's cases (about 12 minutes on 2 cores).
    """

    sizes: tuple[str, ...] = ()
    """S, B, L (ViT), llama (D = 1024), llama-7b (4 layers of it), vla-7b (all 32)."""
    batch: tuple[int, ...] = ()
    """Batch sizes; default 16 on the CPU, 64 on a GPU."""
    shares: tuple[float, ...] = ()
    """Active shares in [0, 1]; default 1 0.75 0.5 0.25 0."""
    dtype: tuple[str, ...] = ()
    """float32, bfloat16, float16; default: float32 and bfloat16 on the CPU, bfloat16 on a GPU."""
    gates: tuple[str, ...] = ()
    """exact, bernoulli, path (batch 1, correlated in time), tokens, clustered (tokens in runs)."""
    keys: str = "all"
    """With tokens: attention sees all or active ones."""
    train: bool = False
    """Training steps instead of inference."""
    device: str = "auto"
    """auto, cpu or cuda."""
    budget: float = 20.0
    """Seconds of timed rounds for a case at most, at least five rounds; batches of one and tokens get half."""
    compiled: bool = True
    """Measure the dense stack under torch.compile, too."""
    out: str = ""
    """Also write the figures to this JSON file, after every case."""


def cases_of(options: RoutedOptions, device: str) -> list[RoutedCase]:
    """The cases that the options ask for.

    Raises:
        ValueError: unknown sizes, dtypes or gates, shares outside [0, 1], what does not go together.
    """
    if options.keys not in ("all", "active"):
        raise ValueError(f"keys must be all or active, got {options.keys!r}")
    if not (options.sizes or options.batch or options.dtype or options.gates or options.train):
        return default_cases(device, options.shares)
    gates = options.gates or ("exact",)
    batches = options.batch or ((1,) if gates == ("path",) else (64 if device == "cuda" else 16,))
    dtypes = options.dtype or (("bfloat16",) if device == "cuda" else ("float32", "bfloat16"))
    shares = tuple(options.shares) or ((0.5,) if options.train else (1.0, 0.75, 0.5, 0.25, 0.0))
    asked = product(options.sizes or ("S",), batches, dtypes, gates)
    return [RoutedCase(size, b, dtype, kind, shares, options.keys, options.train) for size, b, dtype, kind in asked]


def run(**options: Any) -> list[dict[str, Any]]:
    """Measures the cases one after another, prints the tables and writes the figures to ``out`` if given.

    What was measured so far is printed and stays in the file if a later case fails or is interrupted.

    Raises:
        ValueError: options that cannot be, see :class:`RoutedOptions`; a budget that is not positive.
        RuntimeError: CUDA asked for and not there; a result that is wrong.
    """
    unknown = set(options) - {f.name for f in fields(RoutedOptions)}
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}")
    chosen = RoutedOptions(**options)
    if not chosen.budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {chosen.budget!r}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that measures memory talks on stderr
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # the compiler's remark on a missing GPU
    where = device_for_rank(chosen.device).type
    cases = cases_of(chosen, where)
    about = machine(where)
    console = Console()
    console.print(f"{about.get('gpu') or about['cpu']}, {about['threads']} threads, torch {about['torch']}")
    if where == "cpu" and about["malloc"] == "default":
        console.print(_MALLOC)
    data: dict[str, Any] = {"machine": about}
    if where == "cuda":
        from .routed_cuda import graph_costs

        data["graph_costs"] = graph_costs()
        console.print(", ".join(f"{name} {value:.2f}" for name, value in data["graph_costs"].items()))
    results: list[dict[str, Any]] = data.setdefault("results", [])
    bars = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*bars, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                progress.update(task, description=str(case))
                share_of_budget = chosen.budget / (2 if case.batch == 1 or case.by_token else 1)
                results.append(measure(case, device=where, budget=share_of_budget, compiled=chosen.compiled))
                if chosen.out:
                    _write(Path(chosen.out), data)
                progress.advance(task)
    finally:
        _report(console, results, chosen.out)
    return results


def _report(console: Console, results: Sequence[dict[str, Any]], out: str) -> None:
    for result in results:
        size = SIZES[result["size"]]
        title = f"{result['case']}, D={size.dim}, T={size.tokens}, {size.layers} layers, {result['rounds']} rounds"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        for heading in SHORT_HEADINGS:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows(result):
            table.add_row(*row)
        console.print(table)
        parts = [
            f"{name} {result['median_ms'][name]:.2f} ms" for name in ("plan", "router") if name in result["median_ms"]
        ]
        if "error" in result:
            ours = [e for name, e in result["error"].items() if name.startswith("xdfast")]
            parts.append(f"largest error of ours {max(ours):.1e}")
        if parts:
            console.print(", ".join(parts))
    for line in target_lines(results):
        console.print(line, highlight=False)
    met, promised = marked(results)
    if promised:
        console.print(f"{met} of {promised} targets met")
    if results:
        console.print(
            "times are medians in ms; ×: how many times faster ours is; ideal: dense FLOPs over those asked for"
        )
    if out and results:
        console.print(f"written to {out}")


def main(args: Sequence[str]) -> int:
    """``xdfast bench routed …``."""
    import tyro

    description = f"{RoutedOptions.__doc__}"
    options = tyro.cli(RoutedOptions, args=list(args), prog="xdfast bench routed", description=description)
    run(**vars(options))
    return 0
