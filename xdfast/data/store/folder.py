"""The folder of a store: made once, whichever process comes first."""

from __future__ import annotations

from pathlib import Path

from xdfast.data.store.files import locked, make_file
from xdfast.data.store.layout import ENTRY_BYTES
from xdfast.data.store.manifest import NAME, Manifest
from xdfast.data.store.shards import INDEX, SHARDS

__all__ = ["make_folder", "read_manifest"]


def make_folder(folder: Path, manifest: Manifest) -> None:
    """Writes an empty index and the manifest, unless a manifest is there.

    Raises:
        ValueError: rows without a manifest.
        OSError: no room, or no permission.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if (folder / NAME).exists():
            return
        _check_no_rows(folder)
        (folder / INDEX).unlink(missing_ok=True)  # of a process killed right here, or of rows that are gone
        make_file(folder / INDEX, manifest.layout.total * ENTRY_BYTES)
        manifest.write(folder)  # last: who sees it finds the index too


def read_manifest(folder: Path) -> Manifest:
    """
    Raises:
        FileNotFoundError: no store there.
        ValueError: a damaged one, or of another format.
    """
    if not (folder / NAME).exists():
        _check_no_rows(folder)
        raise FileNotFoundError(f"no teacher outputs in {folder} (no {NAME}); fill it first, or check the path")
    return Manifest.read(folder)


def _check_no_rows(folder: Path) -> None:
    if any(folder.glob(SHARDS)):
        raise ValueError(
            f"{folder} has rows but no {NAME}: nothing says what they are, and nothing was changed; restore the file, or delete "
            f"{folder} and fill a new one"
        )
