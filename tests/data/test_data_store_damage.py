"""Rows that are damaged and disks that are full: nothing wrong is served, nothing written is lost."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from store_parts import SAMPLES, fill, make, outputs

from xdfast.data.store import CHANGED, HIT, MISS, StoreFull, TeacherStore, files, layout


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "BLOCK", 16)  # 100 rows in seven shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def flip(path: Path, at: int, mask: int = 4) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ mask]))


# Damage


@pytest.mark.parametrize("at", [0, 17, 35])
def test_a_flipped_bit_is_never_served(folder, caplog, at):
    with make(folder) as store:
        ids, views, given = fill(store)
    flip(folder / "rows-00001.bin", 3 * 36 + at)  # row 19: sample 19, view 0
    with make(folder) as store, caplog.at_level(logging.WARNING, logger="xdfast"):
        for _ in range(2):
            found, status = store.read(ids, views, ids)
            bad = (ids == 19) & (views == 0)
            assert (status == np.where(bad, MISS, HIT)).all()
            assert torch.equal(found["features"][~bad], given["features"][~bad]) and not found["features"][bad].any()
        assert store.damaged == 2
        assert [r.message for r in caplog.records if "damaged" in r.message] == [caplog.messages[0]]  # once
        assert "1 row(s)" in caplog.text and "sample 19, view 0" in caplog.text
        seen = []
        check = store.verify(lambda done, total: seen.append((done, total)))
        assert (check.present, check.damaged, check.missing, check.total) == (99, 1, 0, 100)
        assert check.examples == ((19, 0),) and "(19, 0)" in str(check) and not check.complete
        assert seen[-1] == (100, 100)
        store.write([19], [0], [19], {k: v[bad] for k, v in given.items()})
        assert store.verify().complete and (store.read(ids, views, ids)[1] == HIT).all()


def test_damage_in_the_index_is_never_served(folder):
    with make(folder) as store:
        ids, views, _ = fill(store)
    for row, byte, mask in ((5, 0, 1), (6, 2, 4), (7, 4, 4)):  # present bit, CRC, digest
        flip(folder / "index.bin", 8 * row + byte, mask)
    with make(folder) as store:
        _, status = store.read(ids, views, ids)
        assert {int(i): int(s) for i, v, s in zip(ids, views, status) if s != HIT} == {5: MISS, 6: MISS, 7: CHANGED}
        assert store.verify().damaged == 3
        assert store.verify(forget=True).damaged == 3
        assert store.verify().missing == 3 and store.count == 97


def test_a_row_written_meanwhile_is_not_forgotten(folder):
    with make(folder) as store:
        store.write([4, 5], 0, 1, outputs(2))
        old = store._shards.index[[4, 5]].copy()
        store.write([4], 0, 1, outputs(1, 9))  # between verify's look at row 4 and its verdict
        store._shards.forget(np.array([4, 5]), old)
        assert store.read([4, 5], 0, 1)[1].tolist() == [HIT, MISS]


def test_rows_in_the_wrong_place_are_never_served(folder):
    with make(folder) as store:
        store.write(np.arange(SAMPLES), 0, 1, {k: v.expand(SAMPLES, -1) for k, v in outputs(1).items()})
        store.write(np.arange(SAMPLES), 1, 1, outputs(SAMPLES))
    a, b = folder / "rows-00003.bin", folder / "rows-00004.bin"
    data = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(data)
    with make(folder) as store:
        check = store.verify()
        assert check.damaged == 32 and check.present == 68


@pytest.mark.parametrize("allocates", [True, False])
@pytest.mark.parametrize("size", [None, 0, 3 * 36 + 5])
def test_a_lost_or_short_shard_costs_its_rows_only(folder, monkeypatch, size, allocates):
    if not allocates:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with make(folder) as store:
        ids, views, given = fill(store)
    path = folder / "rows-00002.bin"
    content = path.read_bytes()
    path.unlink()
    if size is not None:
        path.write_bytes(content[:size])
    with make(folder) as store:
        row = views * SAMPLES + ids
        _, status = store.read(ids, views, ids)
        lost = (row >= 32) & (row < 48)
        assert ((status == MISS) == lost).all()
        assert store.verify().damaged == 16
        one = (ids == 40) & (views == 0)
        store.write(
            [40], [0], [40], {k: v[one] for k, v in given.items()}
        )  # makes the file whole, and keeps what it had
        assert path.stat().st_size == 16 * 36
        assert store.verify().damaged == (12 if size else 15)
        store.write(ids[lost], views[lost], ids[lost], {k: v[torch.from_numpy(lost)] for k, v in given.items()})
        found, status = store.read(ids, views, ids)
        assert (status == HIT).all() and torch.equal(found["logits"], given["logits"])


# A full disk


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def check_full(store: TeacherStore, error: StoreFull, kept: int) -> None:
    text = str(error)
    assert f"{kept} of 100 rows are kept" in text and "run again: it continues" in text and str(store.folder) in text
    assert "bytes needed" in text and "bytes free" in text
    assert store.count == kept and store.verify().present == kept


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_another_shard(folder, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with make(folder) as store:
        given = outputs(16)
        store.write(np.arange(16), 0, 0, given)
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", refuse, raising=False)
            with pytest.raises(StoreFull) as raised:
                store.write([15, 16], 0, 1, outputs(2))
        assert raised.value.errno == number and f"{84 * 36:,} bytes needed" in str(raised.value)
        check_full(store, raised.value, 16)
        assert not list(folder.glob("*.new"))
        found, status = store.read(np.arange(16), 0, 0)
        assert (status == HIT).all() and torch.equal(found["features"], given["features"])
        fill(store)  # there is room again
        assert store.complete


def test_no_room_in_the_middle_of_a_write(folder, monkeypatch):
    real = os.pwrite
    with make(folder) as store:
        ids, views, given = fill(store)
        calls = []

        def partly(fd, data, at):
            calls.append(at)
            if len(calls) == 5:
                real(fd, bytes(data)[: len(data) // 2], at)
                disk_full()
            return real(fd, data, at)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", partly)
            with pytest.raises(StoreFull) as raised:
                store.write([1, 3], 0, [100, 101], outputs(2, 5))
        # Two entries zeroed, one row written and entered, half of the other: absent.
        check_full(store, raised.value, 99)
        assert store.read([1, 3], 0, [100, 101])[1].tolist() == [HIT, MISS]
        store.write([3], 0, [3], {k: v[(ids == 3) & (views == 0)] for k, v in given.items()})
        assert store.complete


def test_short_writes_are_carried_on(folder, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:5], at))
    with make(folder) as store:
        ids, views, given = fill(store)
        assert torch.equal(store.read(ids, views, ids)[0]["features"], given["features"])


def test_no_room_for_the_index(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", disk_full)
        with pytest.raises(StoreFull, match="800 bytes needed"):
            make(folder)
    with make(folder) as store:
        assert store.count == 0


def test_no_room_for_the_folder_itself(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", disk_full)
        with pytest.raises(StoreFull, match="bytes free"):
            make(folder)


def test_a_file_system_without_locks(folder, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.raises(OSError, match="no file locks .* local disk"):
        make(folder)


def test_a_flush_the_disk_refuses(folder, monkeypatch):
    with make(folder) as store:
        fill(store)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", disk_full)
            with pytest.raises(StoreFull, match="100 of 100 rows"):
                store.flush()
        store.flush()


def test_file_systems_that_cannot_allocate(folder, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    monkeypatch.setattr(files, "_ZEROS", bytes(100))  # shards of 576 bytes take several
    with make(folder) as store:
        ids, views, given = fill(store)
        assert (folder / "rows-00000.bin").stat().st_size == 576
        assert torch.equal(store.read(ids, views, ids)[0]["features"], given["features"])
    monkeypatch.delattr(os, "posix_fallocate", raising=False)  # macOS
    with make(folder.with_name("other")) as store:
        fill(store)
        assert store.complete


def test_a_file_size_limit_is_an_error_not_a_signal(folder):
    code = f"""
import sys, torch
from xdfast.data.store import StoreFull, TeacherStore
store = TeacherStore.open({str(folder)!r}, {{}}, samples=1000, views=1, outputs={{"features": 64}}, dtype="float32")
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    store.write([0], 0, 0, {{"features": torch.ones(1, 64)}})
except StoreFull as error:
    assert "0 of 1,000 rows are kept" in str(error), error
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.write([0], 0, 0, {{"features": torch.ones(1, 64)}})
    assert store.count == 1
    sys.exit(5)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=200).returncode == 5


def test_a_warning_when_the_disk_is_too_small(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="xdfast"):
        make(folder, samples=2_000_000, views=1, outputs={"tokens": 10**9}).close()
    assert "8,000,000,000,000,000 more bytes when full" in caplog.text
