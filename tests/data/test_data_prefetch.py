"""Work ahead: in order, errors where they belong, no thread left behind."""

from __future__ import annotations

import threading
import time

import pytest

from xdfast.data.prefetch import prefetched


def running() -> int:
    return sum(thread.name == "xdfast-prefetch" for thread in threading.enumerate())


def test_results_come_in_order_and_the_thread_ends():
    assert list(prefetched(lambda x: x * x, range(20), 3)) == [x * x for x in range(20)]
    assert running() == 0


def test_an_error_comes_where_its_result_would_have():
    def work(x: int) -> int:
        if x == 3:
            raise KeyError("three")
        return x

    results = prefetched(work, range(10), 2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(results)
    assert running() == 0


def test_a_generator_left_early_ends_its_thread():
    done: list[int] = []
    results = prefetched(lambda x: done.append(x) or x, range(1000), 2)
    assert next(results) == 0
    results.close()
    assert running() == 0 and len(done) <= 5


def test_no_more_than_depth_is_made_ahead():
    done: list[int] = []
    results = prefetched(lambda x: done.append(x) or x, range(100), 3)
    next(results)
    time.sleep(0.3)
    assert len(done) <= 1 + 3 + 1  # taken, waiting, in hand
    results.close()
