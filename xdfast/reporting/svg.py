"""Matplotlib figures as inline SVG that takes the page's text colour, so it is readable on light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["INK", "PALETTE", "Picture", "drawing", "new_figure", "style"]

#: Stands for "the text colour of the page"; no other element may use it.
INK = "#010203"
#: Okabe and Ito's colour-blind-safe order, in mid tones that show on white and on near-black.
PALETTE = ("#2f7fc1", "#d9622b", "#1b9e77", "#c46ba8", "#c79200", "#4fb0de", "#8f6bd1", "#9a7b4f")
_MARKERS = "osD^vPX*"
_LINES = ("-", "--", "-.", ":")
_SCRATCH = "#8a8f98"


@dataclass(frozen=True)
class Picture:
    """A drawing for the page: title, what it shows in words (also its alt text), and inline SVG."""

    title: str
    alt: str
    svg: str
    caption: str = ""


def style(index: int, scratch: bool = False) -> dict[str, Any]:
    """Colour, marker and line of a method: never the colour alone. The baseline from scratch is always grey."""
    if scratch:
        marker, line = "osD^vPX*"[index % 8], ("--", ":", "-.")[index % 3]
        return {"color": _SCRATCH, "marker": marker, "linestyle": line}
    return {
        "color": PALETTE[index % len(PALETTE)],
        "marker": _MARKERS[(index + 1) % len(_MARKERS)],
        "linestyle": _LINES[(index // len(PALETTE)) % len(_LINES)],
    }


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1, **subplots: Any
) -> tuple[Any, Sequence[Any]]:
    """A figure in inches without pyplot, so without any global state; axes as a flat list, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **subplots).ravel()
    for ax in axes:
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            ax.spines[side].set_color(INK)
        ax.tick_params(which="both", colors=INK, labelsize=9)
        ax.xaxis.label.set_color(INK)
        ax.yaxis.label.set_color(INK)
        ax.title.set_color(INK)
        ax.set_facecolor("none")
        ax.grid(True, color="#8a8f98", alpha=0.25, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, list(axes)


def legend(ax: Any, **settings: Any) -> None:
    """A legend in the page's text colour, without a box."""
    ax.legend(frameon=False, fontsize=9, labelcolor=INK, **settings)


def drawing(figure: Any, title: str, alt: str, caption: str = "") -> Picture:
    """The figure as inline SVG: text stays text, ids cannot clash, nothing is loaded from outside."""
    import matplotlib

    buffer = io.StringIO()
    # rc_context restores the settings; text as text is smaller, searchable, and in the page's font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title + alt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1 … would be in every figure of the page
    svg = svg.replace(INK, "currentColor")
    label = html.escape(f"{title}. {alt}", quote=True)
    svg = re.sub(r"<svg ", f'<svg role="img" aria-label="{label}" ', svg, count=1)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    return Picture(title, alt, svg, caption)
