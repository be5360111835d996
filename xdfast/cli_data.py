"""``xdfast data check``: every image looked at before a long run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from xdfast.errors import nearest

if TYPE_CHECKING:
    from rich.table import Table

    from xdfast.data.check import ImageCheck

__all__ = ["main"]

_SHOWN = 10
_USAGE = """usage: xdfast data COMMAND [options]

  check DATA [--full] [--workers N] [--out bad_images.jsonl]   look at every image, name those that cannot be read"""


@dataclass
class _CheckOptions:
    """Looks at every image of a data set, of both parts where it has two. Exit status 1 if one cannot be read.

    Headers are read, and files without an end mark decoded: empty files, other files and files that are cut short are
    found. --full finds JPEGs damaged in the middle, too, as far as Pillow notices: a JPEG has no checksum.
    """

    data: tuple[str, ...]
    """As data= of a run: a folder, an archive, shards or a pattern, torchvision:NAME, …; docs/data.md lists them."""
    full: bool = False
    """Decode every image instead of reading its header: about ten times as long."""
    workers: int | Literal["auto"] = "auto"
    """Processes; 0: none but this one; auto: one per core."""
    out: str = ""
    """Write the unreadable images to this file, a line of JSON for each: path, reason, part."""
    progress: bool = True
    """Show how far it is."""


def main(args: Sequence[str]) -> int:
    """Runs ``xdfast data …``; returns the exit status: 0, 1 if an image cannot be read, 2 for a wrong call, 130 after Ctrl-C.

    Raises:
        FileNotFoundError, ValueError: as :func:`open_source`; an ``--out`` that is a folder.
    """
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if args[0] != "check":
        print(f"xdfast data: unknown command {args[0]!r}.{nearest(args[0], ['check'])}\n\n{_USAGE}", file=sys.stderr)
        return 2
    import tyro
    from rich.console import Console

    options = tyro.cli(
        _CheckOptions, args=args[1:], prog="xdfast data check", config=(tyro.conf.PositionalRequiredArgs,)
    )
    if not options.data:
        raise ValueError("name the data: xdfast data check DATA, as data= of a run; docs/data.md lists the forms")
    out = Path(options.out).expanduser() if options.out else None
    if out is not None and out.is_dir():
        raise ValueError(f"--out {options.out} is a folder; name a file, such as {out / 'bad_images.jsonl'}")
    data = options.data[0] if len(options.data) == 1 else list(options.data)
    found: dict[str, ImageCheck] = {}
    for part, source in _parts(data):
        found[part] = _check(part, source, options)
        if found[part].interrupted:
            break
    console = Console()
    console.print(_table(found, options.full))
    bad = [
        {"path": path, "reason": reason, "part": part} for part, check in found.items() for path, reason in check.bad
    ]
    for line in bad[:_SHOWN]:
        console.print(f"{line['path']}: {line['reason']}", markup=False, highlight=False, soft_wrap=True)
    if len(bad) > _SHOWN:
        console.print(f"… and {len(bad) - _SHOWN} more" + ("" if out else "; --out FILE.jsonl lists them all"))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in bad), encoding="utf-8")
        console.print(f"{len(bad)} written to {out}", markup=False, highlight=False, soft_wrap=True)
    if any(check.interrupted for check in found.values()):
        print("interrupted; this is what was found so far", file=sys.stderr)
        return 130
    return 1 if bad else 0


def _parts(data: Any) -> list[tuple[str, Any]]:
    """(name, source) of both parts where the data has two, else of the whole."""
    from xdfast.data import open_source

    first = open_source(data, "train", val_fraction=None)
    if first.part is None:
        return [("all", first)]
    return [("train", first), ("val", open_source(data, "val", val_fraction=None))]


def _check(part: str, source: Any, options: _CheckOptions) -> ImageCheck:
    from xdfast.data.check import check_images
    from xdfast.pipeline.journal import ProgressLine

    line = ProgressLine(f"check {part}", len(source), enabled=options.progress)
    began = time.monotonic()

    def progress(done: int, total: int) -> None:
        line.update(done, f"{done / max(time.monotonic() - began, 1e-9):.0f} images/s")

    try:
        return check_images(source, full=options.full, workers=options.workers, progress=progress)
    finally:
        line.close()


def _table(found: dict[str, ImageCheck], full: bool) -> Table:
    from rich.table import Table

    table = Table(title="images, decoded" if full else "images, by their headers", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    for part in found:
        table.add_column(part, justify="right")
    checks = list(found.values())
    if any(check.checked < check.total for check in checks):
        table.add_row("in the data", *(str(check.total) for check in checks))
    table.add_row("looked at", *(str(check.checked) for check in checks))
    table.add_row("good", *(str(check.good) for check in checks))
    table.add_row("unreadable", *(str(len(check.bad)) for check in checks))
    counts = {kind: [check.kinds[kind] for check in checks] for kind in {k for check in checks for k in check.kinds}}
    for kind, values in sorted(counts.items(), key=lambda item: (-sum(item[1]), item[0])):
        table.add_row("  " + " ".join(kind), *map(str, values))
    for name, values in (
        ("EXIF-rotated (used as stored)", [check.rotated for check in checks]),
        ("16 bits a channel", [check.sixteen_bit for check in checks]),
    ):
        if any(values):
            table.add_row(name, *map(str, values))
    for name, sides in (("width", [c.widths for c in checks]), ("height", [c.heights for c in checks])):
        table.add_row(f"{name}: min, median, max", *map(_range, sides))
    return table


def _range(sides: np.ndarray) -> str:
    return f"{sides.min()}, {np.median(sides):.0f}, {sides.max()}" if len(sides) else "–"
