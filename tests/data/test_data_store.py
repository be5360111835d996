"""The store of a teacher's outputs: what is read is what was written; sizes, arguments, several processes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from store_parts import SAMPLES, everything, fill, make, outputs

from xdfast.data.store import CHANGED, HIT, MISS, TeacherStore, describe, layout, store_bytes

PROCESSES = Path(__file__).with_name("store_processes.py")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "BLOCK", 16)  # 100 rows in seven shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


# Values


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_float32_rows_come_back_bit_for_bit(folder, given):
    ids, views = everything()
    written = {name: tensor.to(given) for name, tensor in outputs(len(ids)).items()}
    written["features"][3, :4] = torch.tensor([-0.0, 1e-45, 3e38 if given != torch.float16 else 6e4, -1.0])
    with make(folder) as store:
        store.write(ids, views, ids, written)
        assert store.complete and store.count == store.total == 100
    with TeacherStore.load(folder) as store:  # another object: from the files
        again = np.random.default_rng(1).permutation(np.repeat(np.arange(len(ids)), 2))  # any order, rows twice
        found, status = store.read(ids[again], torch.from_numpy(views[again]), ids[again].astype(np.uint32))
    assert status.dtype == np.uint8 and (status == HIT).all()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        bits = tensor.view(torch.int32)
        assert torch.equal(bits, written[name].float()[again].view(torch.int32))


def test_float16_rows_are_the_values_rounded_once(folder):
    with make(folder, dtype="float16") as store:
        ids, views, given = fill(store)
        found, status = store.read(ids, views, ids)
    assert (status == HIT).all()
    for name, tensor in found.items():
        assert torch.equal(tensor, given[name].half().float())


def test_what_comes_back_is_fresh_memory(folder):
    with make(folder) as store:
        ids, views, given = fill(store)
        found, _ = store.read(ids, views, ids)
        found["features"].zero_()
        again, _ = store.read(ids, views, ids)
    assert torch.equal(again["features"], given["features"])
    assert torch.equal(found["logits"], given["logits"])


def test_rows_never_written_are_missing_and_zero(folder):
    with make(folder) as store:
        given = outputs(2)
        store.write([7, 40], [0, 1], [5, 0], given)
        found, status = store.read([40, 40, 7, 7], [0, 1, 0, 1], [0, 0, 5, 5])
        assert status.tolist() == [MISS, HIT, HIT, MISS]
        assert torch.equal(
            found["logits"], torch.stack([torch.zeros(3), given["logits"][1], given["logits"][0], torch.zeros(3)])
        )
        assert store.count == 2 and not store.complete
        found, status = store.read([], [], [])
        assert found["features"].shape == (0, 6) and status.shape == (0,)
        store.write([], [], [], outputs(0))


def test_another_image_is_found_and_its_row_replaced(folder):
    with make(folder) as store:
        first, second = outputs(1, 1), outputs(1, 2)
        store.write([3], [1], [2**32 - 1], first)
        found, status = store.read([3], 1, [0])
        assert status.tolist() == [CHANGED] and not found["features"].any()
        store.write([3], [1], np.array([0], dtype=np.uint32), second)
        assert store.read([3], 1, 2**32 - 1)[1].tolist() == [CHANGED]
        found, status = store.read([3], 1, 0)
        assert status.tolist() == [HIT] and torch.equal(found["features"], second["features"])
        assert store.count == 1


def test_one_view_and_digest_may_stand_for_all(folder):
    with make(folder) as store:
        given = outputs(SAMPLES)
        store.write(np.arange(SAMPLES), 1, 9, given)
        found, status = store.read(torch.arange(SAMPLES), 1, 9)
    assert (status == HIT).all() and torch.equal(found["features"], given["features"])


def test_prefetch_changes_nothing(folder):
    with make(folder) as store:
        store.prefetch([1, 2], [0, 0])  # no shard yet
        ids, views, given = fill(store)
        store.prefetch(ids, views)
        assert torch.equal(store.read(ids, views, ids)[0]["logits"], given["logits"])


# Sizes


def test_size_of_imagenet():
    assert store_bytes(1_281_167, 1, {"features": 1024}, "float16") == 1_281_167 * 2048  # 2.62 GB
    assert round(store_bytes(1_281_167, 1, {"features": 1024}, "float16") / 1e9, 2) == 2.62
    assert store_bytes(10, 3, {"a": 2, "b": 5}, "float32") == 10 * 3 * 7 * 4


def test_shards_appear_when_first_written_and_have_the_size_of_their_rows(folder):
    with make(folder) as store:
        assert sorted(p.name for p in folder.glob("rows-*")) == []
        store.write([0], [0], [0], outputs(1))
        store.write([49], [1], [0], outputs(1))  # row 99, in the last and shorter shard
        sizes = {p.name: p.stat().st_size for p in folder.glob("rows-*")}
        assert sizes == {"rows-00000.bin": 16 * 36, "rows-00006.bin": 4 * 36}
        assert store.nbytes == 100 * 36


def test_a_large_store_has_few_shards(monkeypatch):
    monkeypatch.undo()
    assert layout.Layout(1_281_167, 1, {"f": 1024}, "float16").shards == 20
    large = layout.Layout(14_197_122, 8, {"f": 1024}, "float16")
    assert large.block == 65_536 * 8 and large.shards == 217


def test_no_import_before_it_is_used():
    code = "import sys, xdfast; assert not [m for m in sys.modules if m.startswith('xdfast.data.store')]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([50], [0], [0]), ValueError, "ids has 50 at position 0; this store has samples 0 to 49"),
        (([-1], [0], [0]), ValueError, "ids has -1"),
        (([1], [2], [0]), ValueError, "views has 2 at position 0; this store has views 0 to 1"),
        (([1], [0], [2**32]), ValueError, "digests has 4294967296"),
        (([1], [0], [-1]), ValueError, "digests has -1"),
        (([1.0], [0], [0]), TypeError, "ids must be integers, got float64"),
        (([True], [0], [0]), TypeError, "ids must be integers, got bool"),
        (([1], [0, 1], [0]), ValueError, r"views must be as many as ids \(1\), got 2"),
        (([1], [0], [0, 1]), ValueError, r"digests must be as many as ids \(1\), got 2"),
        (([[1]], [0], [0]), ValueError, r"ids must have shape \[B\], got \[1, 1\]"),
        ((3, [0], [0]), ValueError, r"ids must have shape \[B\], got \[\]"),
    ],
)
def test_bad_ids(folder, arguments, error, message):
    with make(folder) as store:
        with pytest.raises(error, match=message):
            store.write(*arguments, outputs(1))
        with pytest.raises(error, match=message):
            store.read(*arguments)
        assert store.count == 0


def test_a_row_twice_in_one_write(folder):
    with make(folder) as store:
        with pytest.raises(ValueError, match="sample 4, view 1 comes twice"):
            store.write([4, 4, 4], [1, 0, 1], [0, 0, 0], outputs(3))
        assert store.count == 0
        store.write([4, 4], [1, 0], [0, 0], outputs(2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"features": torch.zeros(2, 7)},
            ValueError,
            r"'features' must have shape \[2, 6\] \(rows, width\), got \[2, 7\]",
        ),
        ({"features": torch.zeros(3, 6)}, ValueError, r"got \[3, 6\]"),
        ({"more": torch.zeros(2, 6)}, ValueError, r"expected the outputs \['features', 'logits'\], got .*'more'"),
        (
            {"logits": torch.zeros(2, 3, dtype=torch.int64)},
            TypeError,
            "'logits' must be a floating point tensor, got torch.int64",
        ),
        ({"logits": np.zeros((2, 3))}, TypeError, "got ndarray"),
    ],
)
def test_bad_outputs(folder, change, error, message):
    with make(folder) as store:
        with pytest.raises(error, match=message):
            store.write([0, 1], 0, 0, outputs(2) | change)
        with pytest.raises(ValueError, match="expected the outputs"):
            store.write([0, 1], 0, 0, {"features": torch.zeros(2, 6)})
        assert store.count == 0


@pytest.mark.parametrize("value", [65_505.0, -70_000.0, 3e38])
def test_float16_does_not_hold_everything(folder, value):
    given = outputs(3)
    with make(folder, dtype="float16") as store:
        given["logits"][1, 2] = value
        with pytest.raises(ValueError, match=r"output 'logits' of sample 9, view 1 reaches .*dtype=\"float32\""):
            store.write([8, 9, 10], 1, 0, given)
        assert store.count == 0
        given["logits"][1, 2] = -65_504.0
        store.write([8, 9, 10], 1, 0, given)
        assert store.read([9], 1, 0)[0]["logits"][0, 2] == -65_504.0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_teacher_that_is_not_finite(folder, dtype, value):
    given = outputs(3)
    given["features"][2] = value
    given["features"][1, 0] = value
    with make(folder, dtype=dtype) as store:
        with pytest.raises(
            ValueError, match=r"'features' of sample 9, view 0 \(and 1 more rows\) is not finite.*broken"
        ):
            store.write([8, 9, 10], 0, 0, given)
        assert store.count == 0


# Several processes


@pytest.mark.parametrize(("mode", "says"), [("kill", "killed 40"), ("ranks", "filled by 3"), ("facts", "one of two")])
def test_processes(folder, mode, says):
    command = [sys.executable, str(PROCESSES), mode, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0 and says in result.stdout, result.stdout + result.stderr


def test_threads_read_while_one_writes(folder):
    ids, views = everything()
    given = outputs(len(ids))
    done = threading.Event()

    def reads(store: TeacherStore) -> int:
        turns = 0
        while not done.is_set() or turns == 0:
            store.prefetch(ids, views)
            found, status = store.read(ids, views, ids)
            hit = torch.from_numpy(status == HIT)
            assert torch.equal(found["features"][hit], given["features"][hit])
            turns += 1
        return turns

    with make(folder) as store, ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(reads, store) for _ in range(2)]
        try:
            for i in range(0, len(ids), 3):
                here = slice(i, i + 3)
                store.write(ids[here], views[here], ids[here], {k: v[here] for k, v in given.items()})
        finally:
            done.set()
        assert all(reader.result() > 0 for reader in readers)
        assert store.complete and store.damaged == 0


# Summary


def test_describe(folder):
    with make(folder) as store:
        store.write(np.arange(25), 1, 0, outputs(25))
        lines = dict(describe(store))
        assert lines["rows"] == "25 of 100 (25.0%)"
        assert lines["outputs"] == "features [6], logits [3], float32"
        assert lines["size when full"] == "3.60 kB"
        assert lines["precision"] == "bf16" and json.loads(lines["teacher"]) == {
            "weights": "sha256:ab12",
            "size": [224, 224],
        }
        assert lines["folder"] == str(folder)
        fill(store)
        assert dict(describe(store))["rows"] == "100 of 100 (complete)"
