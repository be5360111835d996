"""Pictures and tables of README and docs that are drawn from ``bench/results``: ``python -m xdfast.bench.figures``.

Every bar and line belongs to a committed file, which the picture names; a file that is not there leaves its part out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import routed_table, table
from .markers import between_markers
from .rsd import OURS

__all__ = ["main", "speed_picture", "update_comparison"]

#: Of all pictures here: ours, rivals from near to far, the ideal.
_OURS, _RIVALS, _IDEAL = "#1b6ca8", ("#9fb8c8", "#c9a66b", "#b5651d"), "#888888"


def speed_picture(results: Path, to: Path) -> list[str]:
    """Draws what is fast, and how fast, into one PNG; returns the titles of its panels.

    Args:
        results: a folder of committed results, ``bench/results/cpu``.
        to: the file.

    Raises:
        FileNotFoundError: none of the files it draws from is there.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    wanted: list[tuple[str, Callable[[Any, Path], str]]] = [
        ("rsd.json", _loss),
        ("routed.json", _layers),
        ("policy_avx2.json", _decision),
    ]
    there = [(results / name, draw) for name, draw in wanted if (results / name).is_file()]
    if not there:
        raise FileNotFoundError(f"{results} has none of {', '.join(name for name, _ in wanted)}")
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(1, len(there), figsize=(4.6 * len(there), 3.4), squeeze=False)
        titles = [draw(axis, path) for axis, (path, draw) in zip(axes[0], there)]
        figure.tight_layout()
        to.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            to, dpi=110, metadata={"Software": None}
        )  # no version in the file: it changes with its data alone
        plt.close(figure)
    return titles


def _loss(axis: Any, path: Path) -> str:
    results, machine = table.from_benchmark_json(path)
    results = [r for r in results if not r["both"]]
    rivals = ("lightly-style compiled", "lightly-style", "literal")
    for place, name in enumerate(rivals):
        times = [r["median_ms"][name] / r["median_ms"][OURS] if name in r["median_ms"] else 0 for r in results]
        at = [i + 0.27 * (place - 1) for i in range(len(results))]
        axis.bar(at, times, 0.25, color=_RIVALS[place], label=name.replace("literal", "D × D, as published"))
    axis.axhline(1, color=_OURS, linewidth=1.5, label="ours")
    axis.set_yscale("log")
    axis.set_yticks([1, 2, 5, 10, 20, 50, 100], [f"{x} ×" for x in (1, 2, 5, 10, 20, 50, 100)])
    axis.minorticks_off()
    axis.set_xticks(range(len(results)), [f"{r['n']}×{r['d']}" for r in results], rotation=50, ha="right")
    axis.set_ylim(0.8, 800)  # room for the legend above the bars
    axis.legend(fontsize=7, frameon=False, loc="upper left", ncols=2)
    return _titled(axis, "RSD, loss and gradient: time of others", machine, path)


def _layers(axis: Any, path: Path) -> str:
    results, machine = routed_table.load(path)
    shown = [
        r for r in results if r["gates"] == "exact" and not r["train"] and r["batch"] == 16 and len(r["size"]) == 1
    ]
    for result in shown:
        points = sorted(
            (row["share"], result["median_ms"]["eager"] / row["median_ms"]) for row in result["shares"] if row["share"]
        )
        half = result["dtype"] == "bfloat16"
        name = f"ViT-{result['size']}, {'bf16' if half else 'fp32'}"
        axis.plot(
            *zip(*points), "o-" if half else "s--", color=_OURS if result["size"] == "S" else _RIVALS[2], label=name
        )
    shares = sorted({row["share"] for r in shown for row in r["shares"] if row["share"]})
    axis.plot(shares, [1 / share for share in shares], ":", color=_IDEAL, label="1 / active layers")
    axis.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
    axis.invert_xaxis()
    axis.set_yticks([1, 2, 3, 4, 5], [f"{x} ×" for x in (1, 2, 3, 4, 5)])
    axis.set_xlabel("layers that run")
    axis.legend(fontsize=7, frameon=False, loc="upper left")
    return _titled(axis, "Routed layers: speed over dense, eager", machine, path)


def _decision(axis: Any, path: Path) -> str:
    found = [b["extra_info"] for b in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]]
    order = ("usual loop", "ours, by modules", "ours, compiled loop", "ours")
    ours = next(one for one in found if "target_ms" in one)  # the small one
    bars = [(name, ours["median_ms"][name]) for name in order if name in ours["median_ms"]]
    colours = [_OURS if name == "ours" else _RIVALS[0] for name, _ in bars]
    axis.barh(range(len(bars)), [ms for _, ms in bars], color=colours)
    axis.set_yticks(range(len(bars)), [name.replace("ours, ", "").replace("ours", "fused layers") for name, _ in bars])
    axis.invert_yaxis()
    axis.axvline(ours["target_ms"], color=_IDEAL, linestyle=":")
    for place, (_, ms) in enumerate(bars):
        axis.text(ms, place, f" {ms:.0f}", va="center", fontsize=8)
    axis.set_xlabel(f"ms (dotted: the {ours['target_ms']:.0f} ms we set ourselves)")
    return _titled(axis, "A decision of a diffusion policy", ours["machine"], path)


def _titled(axis: Any, title: str, machine: dict[str, Any], path: Path) -> str:
    cores = machine.get("threads") or machine.get("cores") or machine.get("logical_cpus")
    where = f"{machine.get('cpu', 'CPU')}, {machine.get('capability', '')}".strip(", ")
    axis.set_title(title, fontsize=10, loc="left", pad=16)
    axis.text(0, 1.02, f"{where}, {cores} threads; {path.name}", transform=axis.transAxes, fontsize=7, color=_IDEAL)
    return title


def update_comparison(document: str, told: dict[str, Any]) -> str:
    """A document's text with the tables of a ``compare.json`` between its markers.

    Raises:
        ValueError: the markers are missing.
    """
    from xdfast.pipeline.compare_table import markdown

    return between_markers(document, "compare", markdown(told["rows"]).strip())


def main(argv: Sequence[str] | None = None) -> int:
    """``figures.py [ROOT]``: the repository's root, by default the working directory."""
    given = sys.argv[1:] if argv is None else argv
    root = Path(given[0] if given else ".")
    results, images = root / "bench/results/cpu", root / "docs/images"
    print(f"{images / 'speed.png'}: {'; '.join(speed_picture(results, images / 'speed.png'))}")
    file = results / "compare_cifar10.json"
    if file.is_file():
        from xdfast.pipeline.compare_table import picture

        told = json.loads(file.read_text(encoding="utf-8"))
        picture(told["rows"], images / "comparison.png")
        page = root / "docs/comparison.md"
        page.write_text(update_comparison(page.read_text(encoding="utf-8"), told), encoding="utf-8")
        print(f"{images / 'comparison.png'}, {page}: from {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
