"""``manifest.json``: what the rows of a store are and what they depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from xdfast._version import __version__
from xdfast.data.store.files import replace_text
from xdfast.data.store.layout import Layout

__all__ = ["FORMAT", "NAME", "Manifest", "plain"]

FORMAT = 1
NAME = "manifest.json"
_ABSENT = "(not there)"


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """``facts`` as JSON gives them back (tuples are lists), so that they compare equal after a round trip.

    Raises:
        TypeError: a value JSON cannot hold, NaN and infinity included.
    """
    result = {}
    for key, value in facts.items():
        if not isinstance(key, str):
            raise TypeError(f"facts must have string keys, got {key!r}")
        try:
            result[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"facts[{key!r}] must be plain JSON values, got {value!r} ({error})") from error
    return result


@dataclass(frozen=True)
class Manifest:
    layout: Layout
    facts: dict[str, Any]
    created: str  # UTC, ISO 8601
    version: str  # of xdfast

    @classmethod
    def new(cls, layout: Layout, facts: Mapping[str, Any]) -> Manifest:
        now = datetime.now(timezone.utc).replace(microsecond=0).isoformat()
        return cls(layout, plain(facts), now, __version__)

    def write(self, folder: Path) -> None:
        layout = self.layout
        content = {
            "format": FORMAT,
            "created": self.created,
            "xdfast": self.version,
            "samples": layout.samples,
            "views": layout.views,
            "outputs": layout.outputs,
            "dtype": layout.dtype,
            "rows_per_shard": layout.block,
            "facts": self.facts,
        }
        replace_text(folder / NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """
        Raises:
            FileNotFoundError: none there.
            ValueError: damaged, or of another format.
        """
        path = folder / NAME
        damaged = (
            f"{path} is damaged ({{}}): nothing was changed; restore the file, or delete {folder} and fill a new one"
        )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(damaged.format(error)) from error
        if not isinstance(content, dict) or "format" not in content:
            raise ValueError(damaged.format("no format number"))
        if content["format"] != FORMAT:
            raise ValueError(
                f"{path} has format {content['format']!r}, this xdfast {__version__} reads format {FORMAT}: use the xdfast that "
                f"wrote it ({content.get('xdfast', 'unknown')}), or another folder"
            )
        try:
            block = content["rows_per_shard"]
            if not isinstance(block, int) or block < 1:
                raise ValueError(f"rows_per_shard must be an integer ≥ 1, got {block!r}")
            layout = Layout(content["samples"], content["views"], content["outputs"], content["dtype"], block)
            return cls(layout, dict(content["facts"]), str(content["created"]), str(content["xdfast"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(damaged.format(reason)) from error

    def check_same(self, wanted: Layout, facts: Mapping[str, Any], folder: Path) -> None:
        """
        Raises:
            ValueError: the folder was filled for something else; names every key that differs, with both values.
        """
        there, here = _flat(_shape(self.layout), self.facts), _flat(_shape(wanted), plain(facts))
        differ = [key for key in [*here, *(k for k in there if k not in here)] if _pick(there, key) != _pick(here, key)]
        if differ:
            lines = [f"  {key}: there {_pick(there, key)}, here {_pick(here, key)}" for key in differ]
            raise ValueError(
                f"{folder} holds teacher outputs made with other settings:\n" + "\n".join(lines)
                + f"\nUse another folder for these settings, or delete {folder} to fill it again"
            )  # fmt: skip


def _shape(layout: Layout) -> dict[str, Any]:
    return {
        "samples": layout.samples,
        "views": layout.views,
        "dtype": layout.dtype,
        **{f"outputs.{name}": width for name, width in layout.outputs.items()},
    }


def _flat(shape: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """{"samples": "100", "facts.views.scale": "[0.08, 1.0]", …}; values as JSON, so ``1`` and ``true`` and ``"1"`` differ."""
    flat: dict[str, str] = {key: json.dumps(value) for key, value in shape.items()}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)
        else:
            flat[prefix] = json.dumps(value, ensure_ascii=False)

    for key, value in facts.items():
        walk(f"facts.{key}", value)
    return flat


def _pick(flat: Mapping[str, str], key: str) -> str:
    return flat.get(key, _ABSENT)
