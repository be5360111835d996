"""What is wrong with demonstrations."""

from __future__ import annotations

__all__ = ["DemoError"]


class DemoError(ValueError):
    """Demonstrations that cannot be written, read or used. The message names the file, the bad value and the way out."""
