"""Results of the routed benchmark as tables: on the terminal, and as Markdown between markers of a document.

``python -m xdfast.bench.routed_table README.md bench/results/cpu/routed.json`` rewrites what stands between
``<!-- bench:routed -->`` and ``<!-- /bench:routed -->``; further arguments keep the cases whose names contain one of them
(``exact training``).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .markers import between_markers

__all__ = ["HEADINGS", "SHORT_HEADINGS", "load", "markdown", "marked", "rows", "target_lines", "update"]

HEADINGS = (
    "stack",
    "active",
    "eager ms",
    "ours ms",
    "× eager",
    "× compiled",  # of compiled and graphed dense stacks the fastest
    "× loop",
    "× index_add",
    "× plain torch",
    "ideal",
    "of ideal",
    "peak MB (eager's)",
)

#: The same for a terminal; the case is a line of its own there.
SHORT_HEADINGS = (
    "active",
    "eager",
    "ours",
    "×eager",
    "×comp.",
    "×loop",
    "×i.add",
    "×torch",
    "ideal",
    "%",
    "MB",
    "eager's",
)

#: Columns of a short table: up to index_add.
_USUAL = 8


def rows(result: dict[str, Any]) -> list[list[str]]:
    """One row per share of a measured case: :data:`SHORT_HEADINGS`' columns; a figure with a target is marked ✓ or ✗."""
    table = []
    middle = min(result["shares"], key=lambda row: abs(row["share"] - 0.5))
    marks = {(t["share"], t["rival"]): " ✓" if t["met"] else " ✗" for t in result["targets"]}
    for row in result["shares"]:
        figures = {name: entry["ratio"] for name, entry in row["speedup"].items()}
        compiled = min(
            (figures[n] for n in ("compiled", "compiled graph", "eager graph") if n in figures), default=None
        )
        memory = result["peak_mb"] if row is middle else {}

        def times(value: float | None, rival: str, share: float = row["share"]) -> str:
            return "–" if value is None else _number(value) + marks.get((share, rival), "")

        table.append(
            [
                f"{row['share']:g}",
                _number(result["median_ms"]["eager"]),
                _number(row["median_ms"]),
                times(figures["eager"], "eager"),
                times(compiled, "compiled"),
                times(figures.get("loop"), "loop"),
                times(figures.get("index_add"), "index_add"),
                times(figures.get("torch-only"), "torch-only"),
                "–" if row["ideal"] is None else _number(row["ideal"]),
                "–" if row["ideal"] is None else f"{100 * row['fraction_of_ideal']:.0f} %",
                _number(memory[row["ours"]]) if row["ours"] in memory else "–",
                _number(memory["eager"]) if memory else "–",
            ]
        )
    return table


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def marked(results: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """(targets met, targets)."""
    found = [target for result in results for target in result["targets"]]
    return sum(target["met"] for target in found), len(found)


def target_lines(results: Sequence[dict[str, Any]]) -> list[str]:
    """One line per target: met or missed, the figure, what was promised."""
    return [
        f"{'met   ' if t['met'] else 'missed'} {r['case']}, active {t['share']:g}: {t['figure']:.2f} × {t['rival']}, "
        f"target {t['target']:g}"
        for r in results
        for t in r["targets"]
    ]


def markdown(results: Sequence[dict[str, Any]], words: Sequence[str] = ()) -> str:
    """The cases that ``words`` select (all without) as one Markdown table."""
    shares = {float(word) for word in words if _is_number(word)}
    names = [word for word in words if not _is_number(word)]
    width = _USUAL if words else len(HEADINGS)
    lines = [list(HEADINGS), ["---"] + ["---:"] * (len(HEADINGS) - 1)]
    for result in results:
        if (result["train"] and names) or not all(word in result["case"].split() for word in names):
            continue
        for row in rows(result):
            if not shares or float(row[0]) in shares:
                memory = "–" if row[-2] == "–" else f"{row[-2]} ({row[-1]})"
                lines.append([_stack(result), *(cell.replace(" ✓", "").replace(" ✗", "") for cell in row[:-2]), memory])
    return "\n".join("| " + " | ".join(line[:width]) + " |" for line in lines)


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdigit()


def _stack(result: dict[str, Any]) -> str:
    kind = {"exact": "", "bernoulli": ", by chance", "path": ", path"}.get(result["gates"], f", {result['gates']}")
    keys = f" ({result['keys']} keys)" if result["gates"] in ("tokens", "clustered") else ""
    name = f"ViT-{result['size']}" if len(result["size"]) == 1 else result["size"]
    train = ", training step" if result["train"] else ""
    return f"{name} {_short(result['dtype'])} B={result['batch']}{kind}{keys}{train}"


def _short(dtype: str) -> str:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[dtype]


def load(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(results, machine) from a file that ``xdfast bench routed`` or pytest-benchmark wrote.

    Raises:
        ValueError: the file holds no result of this benchmark.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(data, dict) and "benchmarks" in data:
        found = [b["extra_info"] for b in data["benchmarks"] if "shares" in b.get("extra_info", {})]
        data = {"results": found, "machine": found[0]["machine"] if found else {}}
    if not isinstance(data, dict) or not data.get("results") or "shares" not in data["results"][0]:
        raise ValueError(f"{path} holds no result of the routed benchmark")
    return data["results"], data["machine"]


def update(text: str, results: Sequence[dict[str, Any]], words: Sequence[str] = ()) -> str:
    """A document's text with the table of ``results`` between its markers; ``words`` as of :func:`markdown`.

    Raises:
        ValueError: the markers are missing.
    """
    return between_markers(text, "routed", markdown(results, words))


def main(argv: Sequence[str] | None = None) -> int:
    """``routed_table.py DOCUMENT RESULTS.json [WORD …]``."""
    first, second, *words = sys.argv[1:] if argv is None else argv
    document, (results, _) = Path(first), load(Path(second))
    document.write_text(update(document.read_text(encoding="utf-8"), results, words), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
