"""What a frozen teacher put out, kept on disk: a row per (sample, view), checked whenever it is read."""

from __future__ import annotations

from xdfast.data.store.check import StoreCheck, describe
from xdfast.data.store.files import StoreFull
from xdfast.data.store.layout import store_bytes
from xdfast.data.store.store import CHANGED, HIT, MISS, TeacherStore

__all__ = ["CHANGED", "HIT", "MISS", "StoreCheck", "StoreFull", "TeacherStore", "describe", "store_bytes"]
