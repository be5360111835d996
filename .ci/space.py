"""Is there room for the environment that ``make install`` makes? Asked before the first download; standard library alone.

pip unpacks wheels while all it downloaded still lies in the temporary folder, and keeps another copy in its cache unless
told not to. A full disk in the middle of that is one line, `No space left on device`, that names neither the place nor the
size. This names both. ``make install`` installs torch and torchvision first, so that their downloads are gone before the rest
comes; the figures are of that order.

Prints the options that pip should get on stdout (``--no-cache-dir`` where the cache would not fit too), everything for
people on stderr. Status 1: not enough.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

GB = 10**9


@dataclass(frozen=True)
class Figures:
    """Bytes; what was measured, rounded up to 0.1 GB.

    Attributes:
        torch_installed, torch_downloads: torch, torchvision and what they bring.
        rest_installed, rest_downloads: everything else in the ``dev`` extra.
    """

    torch_installed: int
    torch_downloads: int
    rest_installed: int
    rest_downloads: int


# torch: an ext4 file system of its own with the environment and TMPDIR on it, Python 3.11, --no-cache-dir, used blocks looked
# at four times a second: torch 2.14.1 for CUDA 13 peaked at 8.7 GB and left 5.7 GB. The rest: blocks of every other package in
# an environment with `dev`, 2.8 GB; their wheels, 0.9 GB (where no wheel was at hand, taken as 35 % of what it unpacks to).
# So one file system needs 9.6 GB at most. All in one call of pip it would be 12.5 GB, and 16.4 GB with pip's cache.
CUDA = Figures(5_800_000_000, 3_100_000_000, 2_800_000_000, 1_000_000_000)
CPU = Figures(900_000_000, 300_000_000, 2_800_000_000, 1_000_000_000)


@dataclass(frozen=True)
class Place:
    """A folder that will be written to, and how much of it."""

    what: str
    folder: Path
    needed: int
    device: int
    free: int


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there: a file system is asked about those only."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def place(what: str, folder: Path, needed: int) -> Place:
    there = existing(folder)
    return Place(what, folder, needed, os.stat(there).st_dev, shutil.disk_usage(there).free)


def size(folder: Path) -> int:
    """Bytes on disk under a folder (blocks, as du counts them)."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(root, name)).st_blocks * 512
            except OSError:  # gone meanwhile
                continue
    return total


def figures(torch: str | None, environment: dict[str, str]) -> Figures:
    """Of the torch that is installed, or else of the one that pip will choose."""
    if torch is not None and "+" in torch:
        return CPU if torch.endswith("+cpu") else CUDA
    indexes = environment.get("PIP_INDEX_URL", "") + " " + environment.get("PIP_EXTRA_INDEX_URL", "")
    if "/whl/cpu" in indexes or (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return CPU
    return CUDA


def needs(of: Figures, *, torch: bool, used: int) -> tuple[int, int, int]:
    """Bytes still needed: (environment, temporary folder, both where they share a file system), ``used`` being installed."""
    missing = max(0, of.torch_installed + of.rest_installed - used)
    rest = min(of.rest_downloads, missing)  # what is installed is not downloaded again
    if torch:
        return missing, rest, missing + rest
    first = max(0, of.torch_installed - used) + of.torch_downloads
    return missing, max(of.torch_downloads, rest), max(first, missing + rest)


def shortfalls(venv: Place, temporary: Place, together: int) -> list[str]:
    """What does not fit, in words; empty if all does."""
    if venv.device == temporary.device:
        if venv.free >= together:
            return []
        return [
            f"{venv.folder} and the temporary folder {temporary.folder} are on one file system, which has "
            f"{gb(venv.free)} free; {gb(together)} are needed"
        ]
    return [
        f"{p.what} {p.folder} needs {gb(p.needed)}; its file system has {gb(p.free)} free"
        for p in (venv, temporary)
        if p.free < p.needed
    ]


def cache_fits(cache: Place, venv: Place, temporary: Place, together: int) -> bool:
    """Whether pip's cache can have a copy of the downloads as well."""
    taken = 0
    if cache.device == venv.device == temporary.device:
        taken = together
    elif cache.device == venv.device:
        taken = venv.needed
    elif cache.device == temporary.device:
        taken = temporary.needed
    return cache.free >= taken + cache.needed


def gb(count: int) -> str:
    return f"{count / GB:.1f} GB"


def pip_cache() -> Path | None:
    """pip's cache, or None if it is switched off."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "cache", "dir"]
    run = subprocess.run(pip, capture_output=True, text=True)
    return Path(run.stdout.strip()) if run.returncode == 0 and run.stdout.strip() else None


def main(argv: list[str]) -> int:
    """``space.py VENV``, run with the environment's own Python."""
    if os.environ.get("XDFAST_CHECK_SPACE", "").strip().lower() in ("0", "false"):
        return 0
    folder = Path(argv[0])
    try:
        torch: str | None = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    of = figures(torch, dict(os.environ))
    in_venv, in_temporary, together = needs(of, torch=torch is not None, used=size(folder))
    venv = place("the environment", folder, in_venv)
    temporary = place("the temporary folder", Path(tempfile.gettempdir()), in_temporary)
    if problems := shortfalls(venv, temporary, together):
        print("not enough space to install xdfast and what it needs:", file=sys.stderr)
        for problem in problems:
            print(f"  {problem}", file=sys.stderr)
        print(
            "Free some, or name other places: TMPDIR=/large/tmp make install VENV=/large/venv. A torch for CPUs takes "
            f"{gb(CUDA.torch_installed - CPU.torch_installed)} less (PIP_INDEX_URL or PIP_EXTRA_INDEX_URL with its /whl/cpu "
            "index). XDFAST_CHECK_SPACE=0 skips this check.",
            file=sys.stderr,
        )
        return 1
    where = f"{gb(together)} of {gb(venv.free)} free"
    if venv.device != temporary.device:
        where = (
            f"{gb(in_venv)} of {gb(venv.free)}, in {temporary.folder} {gb(in_temporary)} of {gb(temporary.free)} free"
        )
    print(f"space needed: {where}", file=sys.stderr)
    cache = pip_cache()
    if cache is not None:
        downloads = (0 if torch else of.torch_downloads) + min(of.rest_downloads, in_venv)
        if not cache_fits(place("pip's cache", cache, downloads), venv, temporary, together):
            print(f"pip's cache {cache} would not fit too ({gb(downloads)}): installing without it", file=sys.stderr)
            print("--no-cache-dir")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
