"""Words shared by error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["nearest"]


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """`` Did you mean 'a', 'b'?`` with the names most like ``name``; an empty string when nothing is near."""
    close = difflib.get_close_matches(str(name), list(names), n=count, cutoff=0.5)
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""
