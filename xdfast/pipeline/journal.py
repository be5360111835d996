"""What a run leaves to read while it works: metrics.jsonl, a progress bar or plain lines, TensorBoard on request."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from xdfast.progress import ProgressLine, clock

__all__ = ["Journal", "ProgressLine", "clock", "read_history"]

log = logging.getLogger("xdfast")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line cut by a kill, and any other that holds no row, is told and left out."""
    rows = []
    if path.is_file():
        # a damaged byte costs its line, not the file
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                log.warning("%s: line %d is unfinished or damaged and is left out", path, number)
    return rows


class Journal:
    """Appends rows to ``metrics.jsonl`` (and TensorBoard); on resume, forgets what came after the checkpoint.

    Every row has ``kind`` ("train" or "val"), ``epoch``, ``step``. NaN and Inf are written as null.
    """

    def __init__(self, folder: Path, *, offset: int = 0, tensorboard: bool = False, enabled: bool = True) -> None:
        self._file = None
        self._tensorboard = None
        if not enabled:
            return
        path = folder / "metrics.jsonl"
        with open(path, "ab") as file:
            file.truncate(offset)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in close())
        if tensorboard:
            from xdfast._optional import require

            require("tensorboard", extra="tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: dict[str, Any]) -> None:
        """One row, flushed."""
        if self._file is None:
            return
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for key, value in clean.items():
                if isinstance(value, (int, float)) and key not in ("epoch", "step"):
                    self._tensorboard.add_scalar(f"{row['kind']}/{key}", value, row["step"])

    @property
    def offset(self) -> int:
        """Bytes written: where a resumed run goes on."""
        return 0 if self._file is None else self._file.tell()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
