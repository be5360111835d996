"""Graphs → a folder of files that agree with PyTorch, with what was measured in ``export.json``."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xdfast._version import __version__
from xdfast.atomic import write_whole
from xdfast.deploy.agree import measure_parity
from xdfast.deploy.errors import ExportError
from xdfast.deploy.formats import FORMATS, check_formats, load_file, trace, write_file
from xdfast.deploy.graph import Graph
from xdfast.deploy.timing import EAGER, measure_latency
from xdfast.progress import ProgressLine
from xdfast.reporting.adapt import device_name

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["RECORD", "Exported", "export_graphs"]

log = logging.getLogger("xdfast")

RECORD = "export.json"

#: Whose versions the record names, where they are installed.
_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "timm")


@dataclass
class Exported:
    """What was written.

    Attributes:
        path: the folder.
        data: the content of ``export.json``.
    """

    path: Path
    data: dict[str, Any]

    @property
    def files(self) -> dict[str, Path]:
        """``"graph.format"`` → file, such as ``"model.onnx"``; the same as its name."""
        return {f["file"]: self.path / f["file"] for graph in self.data["graphs"] for f in graph["files"]}

    @property
    def table(self) -> Table:
        """Format, size, error and latency, for a terminal."""
        from rich.table import Table

        table = Table(
            *("graph", "format", "MB", "max abs error", "max rel error", "batch", "p50 ms", "p95 ms", "× eager"),
            title=f"exported to {self.path}: {self.data['model']}, {self.data['device']}, {self.data['threads']} threads",
            title_justify="left",
        )
        for graph in self.data["graphs"]:
            for file in [{"format": EAGER, "latency": graph["eager"]}, *graph["files"]]:
                parity = file.get("parity")
                size = f"{file['bytes'] / 1e6:.2f}" if "bytes" in file else ""
                error = (f"{parity['max_abs']:.1e}", f"{parity['max_rel']:.1e}") if parity else ("", "")
                for number, row in enumerate(file["latency"] or [None]):
                    first = (graph["name"], file["format"], size, *error) if number == 0 else ("",) * 5
                    times = ("", "", "", "") if row is None else _times(row)
                    table.add_row(*first, *times)
        return table


def export_graphs(
    graphs: Sequence[Graph],
    out: str | Path,
    *,
    formats: Sequence[str] = ("pt2", "onnx"),
    device: torch.device | str = "cpu",
    tolerance: float = 1e-4,
    batches: Sequence[int] = (1, 8),
    latency_seconds: float = 5.0,
    record: dict[str, Any] | None = None,
    progress: bool = True,
) -> Exported:
    """Traces every graph once, writes it in every format, loads each file again and compares and times it.

    Files appear in ``out`` when all of them agree, ``export.json`` last; if anything fails the folder stays as it was.

    Args:
        graphs: with different names.
        out: folder, made if missing.
        formats: of ``"pt2"`` (torch.export), ``"onnx"`` and ``"aoti"`` (AOTInductor: compiled for this kind of machine).
        device: where eager runs, and what pt2 and aoti are made for.
        tolerance: see :class:`xdfast.deploy.agree.Parity`.
        batches: sizes that are compared and timed; a graph of a fixed size is taken at 1.
        latency_seconds: for the timing of one graph; 0 leaves it out.
        record: further facts for ``export.json``.
        progress: tell what is being done.

    Raises:
        ValueError: unknown formats, a bad number.
        ImportError: a package is missing.
        ExportError: an operator that a format lacks, or a file that does not agree.
        NotADirectoryError: ``out`` is a file.
    """
    formats = tuple(dict.fromkeys(formats))
    _check(formats, tolerance, batches, latency_seconds)
    check_formats(formats)
    place, out = torch.device(device), Path(out).expanduser()
    if place.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device={str(device)!r}, but torch sees no CUDA device here; use device='cpu'")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out must be a folder, but {out} is a file")
    out.mkdir(parents=True, exist_ok=True)
    aside = out / f".export-{os.getpid()}"
    aside.mkdir()
    steps = len(graphs) * (1 + 2 * len(formats) + (latency_seconds > 0))
    line = ProgressLine("export", steps, enabled=progress, every=0.0)
    data = {
        "xdfast": __version__,
        "packages": _versions(),
        "device": device_name(place),
        "threads": torch.get_num_threads(),
        "model": graphs[0].facts.get("model", graphs[0].name),
        **(record or {}),
        "graphs": [],
    }
    try:
        done = 0
        for graph in graphs:
            found = _Work(graph, aside, place, line, done)
            data["graphs"].append(found.run(formats, tolerance, batches, latency_seconds))
            done = found.done
        _move(aside, out, data)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        line.close()
    return Exported(out, data)


class _Work:
    """One graph through all formats."""

    def __init__(self, graph: Graph, folder: Path, device: torch.device, line: ProgressLine, done: int) -> None:
        self.graph, self.folder, self.device, self._line, self.done = graph, folder, device, line, done

    def run(
        self, formats: tuple[str, ...], tolerance: float, batches: Sequence[int], latency_seconds: float
    ) -> dict[str, Any]:
        graph = self.graph
        sizes = tuple(sorted(set(batches))) if graph.free_batch else (1,)
        self._tell("torch.export")
        program = trace(graph, self.device)
        if graph.eager is not None:
            graph.eager.to(self.device)
        files, calls = [], {}
        for name in formats:
            path = self.folder / f"{graph.name}{FORMATS[name]}"
            self._tell(f"writing {path.name}" + (" (C++ is compiled: a minute or more)" if name == "aoti" else ""))
            began = time.perf_counter()
            facts = write_file(name, program, graph, path)
            seconds = time.perf_counter() - began
            self._tell(f"comparing {path.name} with eager")
            loaded = load_file(name, path, graph, self.device)
            parity = measure_parity(graph, loaded.call, self.device, batches=sizes, tolerance=tolerance)
            if not parity.agrees:
                raise ExportError(
                    f"{path.name} does not agree with PyTorch: {parity.max_abs:.2g} absolute, {parity.max_rel:.2g} relative error, "
                    f"over the tolerance of {tolerance:g}; nothing was written"
                )
            calls[name] = loaded.call
            files.append(
                {
                    "format": name,
                    "file": path.name,
                    "bytes": _bytes(self.folder, path),
                    "seconds": seconds,
                    "runs_by": loaded.how,
                    **facts,
                    "parity": parity.to_dict(),
                    "latency": [],
                }
            )
        eager: list[dict[str, Any]] = []
        if latency_seconds > 0:
            self._tell("timing")
            for timed in measure_latency(graph, calls, self.device, batches=sizes, seconds=latency_seconds):
                place = eager if timed.name == EAGER else files[formats.index(timed.name)]["latency"]
                place.append(timed.to_dict())
        return {
            "name": graph.name,
            "batch": "any" if graph.free_batch else 1,
            "inputs": [port.to_dict() for port in graph.inputs],
            "outputs": [port.to_dict() for port in graph.outputs],
            **graph.facts,
            "files": files,
            "eager": eager,
        }

    def _tell(self, what: str) -> None:
        self._line.update(self.done, f"{self.graph.name}: {what}")
        self.done += 1


def _move(aside: Path, out: Path, data: dict[str, Any]) -> None:
    """The old record goes first and the new one comes last, so that a folder with a record is whole."""
    (out / RECORD).unlink(missing_ok=True)
    for file in sorted(aside.iterdir()):
        os.replace(file, out / file.name)
    text = json.dumps(data, indent=2)
    write_whole(out / RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def _bytes(folder: Path, path: Path) -> int:
    """Of a file with its weights, which large ONNX files have beside them."""
    return sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))


def _times(row: dict[str, Any]) -> tuple[str, str, str, str]:
    ratio = "1" if row["name"] == EAGER else f"{row['speedup']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
    return str(row["batch"]), f"{row['p50_ms']:.2f}", f"{row['p95_ms']:.2f}", ratio


def _versions() -> dict[str, str]:
    found = {"torch": str(torch.__version__)}  # with what it was built for
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _check(formats: tuple[str, ...], tolerance: float, batches: Sequence[int], latency_seconds: float) -> None:
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance!r}")
    if latency_seconds < 0:
        raise ValueError(f"latency_seconds must be ≥ 0, got {latency_seconds!r}")
    if not batches:
        raise ValueError("batches must hold at least one size")
    for batch in batches:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batches are whole numbers ≥ 1, got {batch!r}")
