"""``python -m xdfast.robot.sim.install``: what simulated tasks need, installed or named. ``make install-robot`` calls it.

It never fails a set-up: whatever is missing in the end is printed with the command that installs it, and the exit status
is 0.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys

from xdfast.robot.sim.gl import NoRendererError, look_again, renderer

__all__ = ["main", "missing_requirements"]

_APT = ["apt-get", "install", "-y", "libosmesa6"]


def missing_requirements(extra: str = "robot") -> list[str]:
    """Requirements of an extra of the installed xdfast that no installed package has the name of: ``["av>=13"]``."""
    missing = []
    for requirement in importlib.metadata.requires("xdfast") or []:
        text, _, marker = requirement.partition(";")
        name = re.match(r"[\w.-]+", text)
        if name is None or not re.search(rf"""extra\s*==\s*['"]{extra}['"]""", marker):
            continue
        try:
            importlib.metadata.version(name[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(text.strip())
    return missing


def _run(command: list[str]) -> bool:
    print("+", " ".join(command), flush=True)
    try:
        return subprocess.run(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}).returncode == 0
    except OSError as error:
        print(error)
        return False


def _renders() -> str | None:
    """None if something renders, otherwise why not."""
    try:
        found = renderer()
    except (NoRendererError, ImportError) as error:
        return str(error)
    print(f"simulated tasks render with {found.name}: {found.reason}")
    return None


def main() -> int:
    """Installs what is missing; 0 in any case."""
    if (missing := missing_requirements()) and not _run([sys.executable, "-m", "pip", "install", *missing]):
        print('simulated tasks cannot run before this succeeds: pip install "xdfast[robot]"')
        return 0
    why = _renders()
    if why is None:
        return 0
    apt = shutil.which("apt-get") is not None
    if apt and os.geteuid() == 0 and not os.environ.get("MUJOCO_GL"):
        # A fresh container has no package lists; with old ones the first try may fail as well.
        if _run(_APT) or (_run(["apt-get", "update"]) and _run(_APT)):
            look_again()
            why = _renders()
        if why is None:
            return 0
    print(f"simulated tasks cannot render yet: {why}")
    if os.environ.get("MUJOCO_GL"):
        print(f"MUJOCO_GL={os.environ['MUJOCO_GL']} decides what renders; unset it, then: make install-robot")
    elif apt:
        print(f"run this, then `xdfast doctor`: sudo {' '.join(_APT)}")
    else:
        print("install OSMesa with this system's package manager (Debian, Ubuntu: libosmesa6; Fedora: mesa-libOSMesa)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
