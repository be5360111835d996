"""Processes that share a teacher store. As a script: ``store_processes.py MODE FOLDER``; it forks, so torch is loaded once.

Modes: ``kill`` kills a writer again and again and checks the rows after each time; ``ranks`` fills a store from three
processes that start at the same moment; ``facts`` has two processes open new folders for different facts.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from xdfast.data.store import CHANGED, HIT, MISS, TeacherStore, layout

SAMPLES, VIEWS = 300, 2
OUTPUTS = {"features": 200, "logits": 56}
FACTS = {"teacher": "abc"}
KILLS = 40
layout.BLOCK = 128  # several shards from few rows


def values(ids: np.ndarray, views: np.ndarray, digests: np.ndarray) -> dict[str, torch.Tensor]:
    """What the teacher says: a function of sample, view and image; exact in float32."""
    seeds = (ids * 7919 + views * 104_729 + digests * 1_299_709) % 16_777_213
    grid = (seeds[:, None] + np.arange(256)[None] * 31) % 16_777_213
    all_values = torch.from_numpy(grid.astype(np.float32))
    return {"features": all_values[:, :200], "logits": all_values[:, 200:]}


def open_store(folder: str, facts: dict[str, object] | None = None) -> TeacherStore:
    return TeacherStore.open(
        folder, FACTS if facts is None else facts, samples=SAMPLES, views=VIEWS, outputs=OUTPUTS, dtype="float32"
    )


def everything() -> tuple[np.ndarray, np.ndarray]:
    row = np.arange(SAMPLES * VIEWS)
    return row % SAMPLES, row // SAMPLES


def check(store: TeacherStore, digests: np.ndarray) -> np.ndarray:
    """The status of all rows; asserts that each HIT has its values and each other row is zero."""
    ids, views = everything()
    found, status = store.read(ids, views, digests)
    expected = values(ids, views, digests)
    for name in OUTPUTS:
        hit = torch.from_numpy(status == HIT)
        assert torch.equal(found[name][hit], expected[name][hit]), name
        assert not found[name][~hit].any(), name
    return status


def child(work: Callable[[], None]) -> int:
    """Runs ``work`` in a forked process."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(folder: str) -> None:
    rng = np.random.default_rng(0)
    ids, views = everything()
    with open_store(folder + "-warm") as store:  # torch's first calls take milliseconds: before the fork
        store.write(ids, views, ids, values(ids, views, ids))
        check(store, ids)
    hits = []
    for turn in range(KILLS):
        read, write = os.pipe()

        def work(turn: int = turn, write: int = write) -> None:
            rng = np.random.default_rng(100 + turn)
            store = open_store(folder)
            while True:  # rows of two generations of images replace each other
                rows = rng.permutation(len(ids))[:37]
                digests = rng.integers(0, 2, 37)
                store.write(ids[rows], views[rows], digests, values(ids[rows], views[rows], digests))
                os.write(write, b".")

        pid = child(work)
        os.close(write)
        for _ in range(int(rng.integers(1, 9))):  # some batches, then any moment, on a busy machine too
            assert os.read(read, 1) == b"."
        time.sleep(rng.uniform(0.0, 0.002))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        os.close(read)
        with open_store(folder) as store:
            assert store.damaged == 0
            zero = check(store, np.zeros(len(ids), dtype=np.int64))
            one = check(store, np.ones(len(ids), dtype=np.int64))
            assert ((zero == MISS) == (one == MISS)).all()  # absent for both
            assert ((zero == CHANGED) == (one == HIT)).all()
            assert store.damaged == 0  # a killed writer leaves no torn row
            assert store.count == int((zero != MISS).sum())
            hits.append((int((zero == HIT).sum()), int((one == HIT).sum())))
    with open_store(folder) as store:
        ones = np.ones(len(ids), dtype=np.int64)
        left = np.flatnonzero(check(store, ones) != HIT)
        assert len(left) > 0
        store.write(ids[left], views[left], ones[left], values(ids[left], views[left], ones[left]))
        assert (check(store, ones) == HIT).all() and store.complete
        assert store.verify().complete
    assert len(set(hits)) > KILLS // 2, hits  # the kills came at different moments
    print("killed", KILLS)


def ranks(folder: str) -> None:
    world = 3
    ids, views = everything()
    gate, start = os.pipe()

    def work(rank: int) -> None:
        os.close(start)
        os.read(gate, 1)  # returns when the parent closes its end: all at once
        with open_store(folder) as store:
            mine = np.random.default_rng(rank).permutation(np.arange(rank, len(ids), world))
            for i in range(0, len(mine), 16):
                rows = mine[i : i + 16]
                store.write(ids[rows], views[rows], ids[rows], values(ids[rows], views[rows], ids[rows]))
                _, status = store.read(ids[rows], views[rows], ids[rows])
                assert (status == HIT).all()
                check(store, ids)  # rows of the others: right, or not there

    pids = [child(lambda rank=rank: work(rank)) for rank in range(world)]
    os.close(gate)
    os.close(start)
    assert [ended(pid) for pid in pids] == [0] * world
    with TeacherStore.load(folder) as store:
        assert (check(store, ids) == HIT).all() and store.complete
    print("filled by", world)


def facts(folder: str) -> None:
    for turn in range(20):
        here = Path(folder) / str(turn)
        gate, start = os.pipe()

        def work(which: int, here: Path = here, gate: int = gate, start: int = start) -> None:
            os.close(start)
            os.read(gate, 1)
            try:
                open_store(str(here), {"teacher": which}).close()
            except ValueError as error:
                os._exit(7 if "facts.teacher" in str(error) else 8)

        pids = [child(lambda which=which: work(which)) for which in range(2)]
        os.close(gate)
        os.close(start)
        codes = [ended(pid) for pid in pids]
        assert sorted(codes) == [0, 7], codes
        assert TeacherStore.load(here).facts == {"teacher": codes.index(0)}
    print("one of two")


if __name__ == "__main__":
    {"kill": kill, "ranks": ranks, "facts": facts}[sys.argv[1]](sys.argv[2])
