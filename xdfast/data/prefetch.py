"""Work done ahead, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

__all__ = ["prefetched"]

T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = 0.1  # seconds between looks at whether the other side has gone


def prefetched(function: Callable[[T], R], items: Iterable[T], depth: int) -> Iterator[R]:
    """``map(function, items)``, up to ``depth`` results ahead of who takes them, in order.

    An exception of ``function`` is raised where its result would have come. A generator that is closed, or not read to
    the end, ends the thread after the item under way.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    gone = threading.Event()

    def put(entry: tuple[bool, Any]) -> bool:
        while not gone.is_set():
            try:
                ready.put(entry, timeout=_PATIENCE)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((True, function(item))):
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=work, name="xdfast-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            more, value = ready.get()
            if more:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        gone.set()
        thread.join()
