"""Results as tables: on the terminal, and as Markdown in the README, which is generated from the committed files.

``python -m xdfast.bench.table README.md bench/results/cpu/rsd.json`` rewrites what stands between the README's markers;
``… docs/rsd.md bench/results/cpu/rsd_avx2.json limits`` the table of what a machine allows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .markers import between_markers
from .rsd import OURS

__all__ = ["from_benchmark_json", "limits", "markdown", "rows", "update_readme"]

HEADINGS = (
    "N × D",
    "ms",
    "ms, bf16",
    "× literal",
    "× lightly-style",
    "× lightly-style compiled",
    "bf16 × lightly-style",
    "op / floor",
    "GFLOP/s",
    "peak MB",
    "literal's MB",
)

#: The same for a terminal of 80 columns.
SHORT_HEADINGS = ("N × D", "ms", "bf16", "liter.", "lightly", "compil.", "bf16:l.", "op/fl.", "GF/s", "MB", "lit.MB")


def rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One row per measured case, in :data:`HEADINGS`' order."""
    table = []
    for r in results:
        ms = r["median_ms"]
        ours, bf16 = ms[OURS], ms.get(f"{OURS} bf16")
        alone = ms.get(f"{OURS} op alone", ms[OURS])

        def times(name: str, by: float | None, ms: dict[str, float] = ms) -> str:
            return _number(ms[name] / by) if name in ms and by else "–"

        table.append(
            [
                f"{r['n']} × {r['d']}",
                _number(ours),
                _number(bf16) if bf16 else "–",
                times("literal", ours),
                times("lightly-style", ours),
                times("lightly-style compiled", ours),
                times("lightly-style", bf16),
                _number(alone / ms["floor"]),
                f"{r['gflops_per_s']:.0f}",
                _number(r["peak_mb"][OURS]),
                _number(r["peak_mb"]["literal"]),
            ]
        )
    return table


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [HEADINGS, ["---:"] * len(HEADINGS), *rows(results)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def from_benchmark_json(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(results, machine) from a file that pytest-benchmark or ``xdfast bench`` wrote.

    Raises:
        ValueError: the file holds no result of this benchmark.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if "results" in data:
        return data["results"], data["machine"]
    found = [b["extra_info"] for b in data.get("benchmarks", []) if "median_ms" in b.get("extra_info", {})]
    if not found:
        raise ValueError(f"{path} holds no result of the RSD benchmark")
    return found, found[0]["machine"]


def update_readme(readme: str, results: Sequence[dict[str, Any]]) -> str:
    """The README's text with the table of ``results`` between its markers.

    Raises:
        ValueError: the markers are missing.
    """
    return between_markers(readme, "rsd", markdown(results))


def limits(document: str, results: Sequence[dict[str, Any]]) -> str:
    """The document with a table of one gradient's cases between its markers: how many times as fast as each rival we are, and, in
    brackets, a loss would be that costs its two products by PyTorch's BLAS and an empty backward pass."""
    lines = [("N × D", "ms", "× lightly-style", "× lightly-style compiled", "× literal", "op / floor"), ("---:",) * 6]
    for r in results:
        ms = r["median_ms"]
        rivals = [
            f"{_number(ms[name] / ms[OURS])} ({_number(r['limit'][name])})"
            for name in ("lightly-style", "lightly-style compiled", "literal")
        ]
        alone = _number(ms[f"{OURS} op alone"] / ms["floor"])
        lines.append((f"{r['n']} × {r['d']}", _number(ms[OURS]), *rivals, alone))
    return between_markers(document, "rsd-limits", "\n".join("| " + " | ".join(line) + " |" for line in lines))


def main(argv: Sequence[str] | None = None) -> int:
    """``table.py DOCUMENT RESULTS.json [limits]``."""
    document, path, *form = sys.argv[1:] if argv is None else argv
    results, _ = from_benchmark_json(Path(path))
    student = [r for r in results if not r["both"]]
    update = limits if form == ["limits"] else update_readme
    Path(document).write_text(update(Path(document).read_text(encoding="utf-8"), student), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
