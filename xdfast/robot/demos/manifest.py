"""The settings that all episodes of a folder share: ``manifest.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from xdfast.atomic import write_whole
from xdfast.robot.demos.errors import DemoError

__all__ = ["MANIFEST", "Manifest"]

MANIFEST = "manifest.json"
_FORMAT, _VERSION = "xdfast-demos", 1


@dataclass(frozen=True)
class Manifest:
    """What a folder of demonstrations says about all of them.

    Attributes:
        task: ``"metaworld/drawer-open-v3"``, or None where it is unknown.
        cameras: camera → (height, width) in pixels, in the order of recording.
        fps: control frequency in Hz, or None.
        action_dim: numbers in an action.
        state_dim: numbers of proprioception.
        facts: whatever else is worth keeping, as JSON: simulator versions, collection settings, the source of a conversion.
    """

    task: str | None
    cameras: dict[str, tuple[int, int]]
    fps: float | None
    action_dim: int
    state_dim: int
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        for camera, size in self.cameras.items():
            if len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size):
                raise DemoError(f"cameras: the size of {camera!r} is {size!r}; give (height, width) in pixels")
        for name, least in (("action_dim", 1), ("state_dim", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise DemoError(f"{name} is {value!r}; it must be a whole number of at least {least}")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise DemoError(f"fps is {self.fps!r}; give a frequency in Hz, or None")
        for name, value in self.facts.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise DemoError(f"facts[{name!r}] cannot be kept as JSON ({error}): {value!r}") from error

    def save(self, folder: Path) -> None:
        """Writes ``folder/manifest.json``.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=1, ensure_ascii=False)
        write_whole(folder / MANIFEST, lambda aside: aside.write_text(text + "\n", encoding="utf-8"))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads ``folder/manifest.json``.

        Raises:
            DemoError: missing, damaged, of another format or of a version this xdfast does not know.
        """
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DemoError(f"cannot read {path}: {error}") from error
        except ValueError as error:
            raise DemoError(
                f"{path} is damaged ({error}); restore it from a copy: the episodes do not repeat it"
            ) from error
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise DemoError(f'{path} is not a manifest of xdfast demonstrations: it lacks "format": "{_FORMAT}"')
        if values.get("version") != _VERSION:
            raise DemoError(
                f"{path} has version {values.get('version')!r}, this xdfast reads {_VERSION}; "
                "use the xdfast that wrote it, or a newer one"
            )
        try:
            cameras = {str(name): (size[0], size[1]) for name, size in values["cameras"].items()}
            return cls(**{f.name: values[f.name] for f in fields(cls)} | {"cameras": cameras})
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DemoError(f"{path} is damaged: {error!r}; restore it from a copy") from error

    def differences(self, other: Manifest) -> list[str]:
        """``"fps: 20 there, 80 now"`` for each setting that ``other`` (now) has otherwise than this one (there)."""
        there, now = _flat(self), _flat(other)
        nothing = "nothing"
        return [
            f"{name}: {there.get(name, nothing)} there, {now.get(name, nothing)} now"
            for name in {**there, **now}
            if there.get(name, nothing) != now.get(name, nothing)
        ]


def _flat(manifest: Manifest) -> Mapping[str, str]:
    """Name → value as JSON, so that a tuple equals the list it becomes in the file; facts one by one."""
    values = asdict(manifest)
    facts = values.pop("facts")
    # the order of cameras is the order of the policy's inputs, so it counts; that of facts does not
    flat = {name: json.dumps(value) for name, value in values.items()}
    return flat | {f"facts[{name!r}]": json.dumps(value, sort_keys=True) for name, value in facts.items()}
