"""``xdfast bench rsd``: measures on this machine and prints the table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from xdfast.distributed import device_for_rank

from .cases import RSD_CASES, RSDCase
from .harness import machine
from .rsd import measure
from .table import HEADINGS, SHORT_HEADINGS, rows

__all__ = ["parse_shape", "run"]


def parse_shape(text: str, both: bool = False) -> RSDCase:
    """``"128x768"`` → N = 128, D = 768.

    Raises:
        ValueError: not two positive numbers joined by x.
    """
    match = re.fullmatch(r"(\d+)[x×](\d+)", text.strip())
    if match is None or int(match[1]) < 2 or int(match[2]) < 1:
        raise ValueError(f"shape must be N and D joined by x, N ≥ 2, such as 128x768; got {text!r}")
    return RSDCase(int(match[1]), int(match[2]), both)


def run(
    *,
    shapes: Sequence[str] = (),
    both: bool = False,
    device: str = "auto",
    budget: float = 5.0,
    compiled: bool = True,
    out: str = "",
) -> list[dict]:
    """Measures the cases one after another, prints the table and writes the figures to ``out`` if given.

    A file written so far is kept if a later case fails or is interrupted.

    Raises:
        ValueError: a shape that cannot be read, a budget that is not positive.
        RuntimeError: CUDA asked for and not there.
    """
    if not budget > 0:
        raise ValueError(f"budget must be a positive number of seconds, got {budget!r}")
    where = device_for_rank(device).type
    default = [c for c in RSD_CASES if c.both == both and c.n * c.d * min(c.n, c.d) <= 1024 * 768**2]
    cases = [parse_shape(s, both) for s in shapes] or default
    console = Console()
    about = machine(where)
    console.print(
        f"{about.get('gpu') or about['cpu']}, {about['threads']} threads, torch {about['torch']}, forward + backward"
    )
    results: list[dict] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            results.append(measure(case, device=where, budget=budget, compiled=compiled))
            if out:
                _write(Path(out), {"machine": about, "results": results})
            progress.advance(task)
    title = "Barlow Twins, both gradients" if both else "RSD, student gradient"
    table = Table(title=f"{title}: ours against its rivals", box=None, padding=(0, 1, 0, 0))
    for heading in SHORT_HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(
        "; ".join(f"{short}: {long}" for short, long in zip(SHORT_HEADINGS, HEADINGS, strict=True) if short != long)
    )
    console.print(
        f"{results[0]['rounds']} to {results[-1]['rounds']} rounds, medians; backend {results[0]['backend']!r}"
    )
    if out:
        console.print(f"written to {out}")
    return results


def _write(path: Path, data: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(path.suffix + ".tmp")
    aside.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)
