"""Modules with parameters: projectors between student and teacher."""

from __future__ import annotations

from xdfast.nn.aad import AAD

__all__ = ["AAD"]
