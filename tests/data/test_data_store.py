"""The store of a teacher's outputs: what is read is what was written, or is not served."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from xdfast.data.store import CHANGED, HIT, MISS, StoreFull, TeacherStore, describe, files, layout, store_bytes

FACTS = {"teacher": {"weights": "sha256:ab12", "size": (224, 224)}, "precision": "bf16", "views": None}
OUTPUTS = {"features": 6, "logits": 3}
SAMPLES, VIEWS = 50, 2
PROCESSES = Path(__file__).with_name("store_processes.py")


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "BLOCK", 16)  # 100 rows in seven shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def make(folder: Path, facts=FACTS, **changes) -> TeacherStore:
    settings = {"samples": SAMPLES, "views": VIEWS, "outputs": OUTPUTS, "dtype": "float32"} | changes
    return TeacherStore.open(folder, facts, **settings)


def outputs(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, width, generator=generator) for name, width in OUTPUTS.items()}


def everything() -> tuple[np.ndarray, np.ndarray]:
    row = np.random.default_rng(0).permutation(SAMPLES * VIEWS)
    return row % SAMPLES, row // SAMPLES


def fill(store: TeacherStore) -> tuple[np.ndarray, np.ndarray, dict[str, torch.Tensor]]:
    ids, views = everything()
    given = outputs(len(ids))
    store.write(ids, views, ids, given)
    return ids, views, given


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


# Opening


def test_reopening_continues(folder):
    with make(folder) as store:
        store.write([0], [0], [0], outputs(1))
        created = store.created
    with make(folder) as store:
        store.write([1], [0], [0], outputs(1))
        assert store.count == 2 and store.created == created
        assert store.facts == {
            "teacher": {"weights": "sha256:ab12", "size": [224, 224]},
            "precision": "bf16",
            "views": None,
        }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["facts"] == store.facts and manifest["outputs"] == OUTPUTS and manifest["format"] == 1
    assert manifest["rows_per_shard"] == 16


def test_shard_size_is_that_of_the_folder(folder, monkeypatch):
    with make(folder) as store:
        ids, views, given = fill(store)
    monkeypatch.setattr(layout, "BLOCK", 1024)
    with make(folder) as store:
        assert torch.equal(store.read(ids, views, ids)[0]["features"], given["features"])


def test_outputs_in_another_order_are_the_same_store(folder):
    with make(folder) as store:
        ids, views, given = fill(store)
    with make(folder, outputs=dict(reversed(OUTPUTS.items()))) as store:
        assert torch.equal(store.read(ids, views, ids)[0]["features"], given["features"])


@pytest.mark.parametrize("read_only", [False, True])
def test_another_use_names_every_difference(folder, read_only):
    make(folder).close()
    facts = {"teacher": {"weights": "sha256:cd34", "size": [224, 224]}, "precision": "bf16", "seed": 3}
    with pytest.raises(ValueError) as error:
        make(folder, facts, samples=51, outputs={"features": 6, "hidden": 2}, dtype="float16", read_only=read_only)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert set(lines[1:-1]) == {
        "samples: there 50, here 51",
        'dtype: there "float32", here "float16"',
        "outputs.hidden: there (not there), here 2",
        "outputs.logits: there 3, here (not there)",
        'facts.teacher.weights: there "sha256:ab12", here "sha256:cd34"',
        "facts.seed: there (not there), here 3",
        "facts.views: there null, here (not there)",
    }
    assert "another folder" in lines[-1] and "delete" in lines[-1] and str(folder) in lines[0]
    with pytest.raises(ValueError, match="views: there 2, here 4"):
        make(folder, views=4)


@pytest.mark.parametrize(
    ("facts", "message"),
    [({"a": {1}}, r"facts\['a'\]"), ({"a": float("nan")}, r"facts\['a'\]"), ({3: 1}, "string keys, got 3")],
)
def test_facts_json_cannot_hold(folder, facts, message):
    with pytest.raises(TypeError, match=message):
        make(folder, facts)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples must be an integer ≥ 1, got 0"),
        ({"views": 1.5}, "views must be an integer ≥ 1, got 1.5"),
        ({"outputs": {}}, "at least one output"),
        ({"outputs": {"features": -1}}, "width of output 'features' must be an integer ≥ 1, got -1"),
        ({"dtype": "bfloat16"}, "dtype must be one of 'float16', 'float32', got 'bfloat16'"),
    ],
)
def test_settings_out_of_range(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        make(folder, **settings)
    assert not folder.exists()


def test_reading_a_folder_that_is_not_there(folder):
    with pytest.raises(FileNotFoundError, match="fill it first"):
        TeacherStore.load(folder)
    with pytest.raises(FileNotFoundError, match="no teacher outputs"):
        make(folder, read_only=True)
    assert not folder.exists()


def test_read_only_writes_nothing(folder):
    with make(folder) as store:
        fill(store)
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    with make(folder, read_only=True) as store:
        assert store.complete
        with pytest.raises(RuntimeError, match="read_only=False"):
            store.write([0], [0], [0], outputs(1))
        with pytest.raises(RuntimeError, match="read_only=False"):
            store.verify(forget=True)
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()} == before


def test_a_closed_store_says_so(folder):
    store = make(folder)
    store.close()
    store.close()
    for call in (lambda: store.read([0], [0], [0]), lambda: store.count, store.flush, store.verify):
        with pytest.raises(RuntimeError, match="closed; open it again"):
            call()
    assert "closed" in repr(store)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "rows but no manifest.json"),
        ("", "manifest.json is damaged"),
        ("{}", "no format number"),
        ('{"format": 1}', "'rows_per_shard' is missing"),
        ('{"format": 9, "xdfast": "7.0"}', r"format 9, this xdfast .* reads format 1.*7\.0"),
    ],
)
def test_a_bad_manifest_stops_everything_and_costs_nothing(folder, content, message):
    with make(folder) as store:
        fill(store)
    good = (folder / "manifest.json").read_text()
    (folder / "manifest.json").unlink()
    if content is not None:
        (folder / "manifest.json").write_text(content)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for attempt in (lambda: make(folder), lambda: make(folder, read_only=True), lambda: TeacherStore.load(folder)):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    (folder / "manifest.json").write_text(good)
    assert make(folder).complete


@pytest.mark.parametrize("field", ["samples", "outputs", "dtype", "rows_per_shard", "facts"])
def test_a_manifest_with_a_wrong_field(folder, field):
    make(folder).close()
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "x"}))
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        TeacherStore.load(folder)


def test_a_missing_or_short_index_stops(folder):
    with make(folder) as store:
        fill(store)
    content = (folder / "index.bin").read_bytes()
    (folder / "index.bin").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="index.bin is missing or cut short"):
        make(folder)
    (folder / "index.bin").unlink()
    with pytest.raises(ValueError, match="index.bin is missing or cut short"):
        TeacherStore.load(folder)


def test_a_process_killed_while_making_the_folder_leaves_it_usable(folder):
    folder.mkdir()
    (folder / "index.bin").write_bytes(b"\1" * 800)  # the index comes before the manifest
    (folder / "manifest.json.new").write_text("{")
    with make(folder) as store:
        assert store.count == 0
        (folder / "rows-00000.bin.new").write_bytes(b"x" * 10_000)
        ids, views, given = fill(store)
        assert torch.equal(store.read(ids, views, ids)[0]["features"], given["features"])


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
    for row, byte in ((5, 0), (6, 2), (7, 4)):  # present bit (4 flips bit 2: part of the CRC), CRC, digest
        flip(folder / "index.bin", 8 * row + byte)
    with make(folder) as store:
        _, status = store.read(ids, views, ids)
        assert {int(i): int(s) for i, v, s in zip(ids, views, status) if s != HIT} == {5: MISS, 6: MISS, 7: CHANGED}
        assert store.verify().damaged == 3
        assert store.verify(forget=True).damaged == 3
        assert store.verify().missing == 3 and store.count == 97


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


@pytest.mark.parametrize("size", [None, 0, 3 * 36 + 5])
def test_a_lost_or_short_shard_costs_its_rows_only(folder, size):
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
            patch.setattr(os, "posix_fallocate", refuse)
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
    monkeypatch.delattr(os, "posix_fallocate")  # macOS
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
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 5


def test_a_warning_when_the_disk_is_too_small(folder, caplog):
    with caplog.at_level(logging.WARNING, logger="xdfast"):
        make(folder, samples=2_000_000, views=1, outputs={"tokens": 10**9}).close()
    assert "8,000,000,000,000,000 more bytes when full" in caplog.text


# Several processes


@pytest.mark.parametrize(("mode", "says"), [("kill", "killed 40"), ("ranks", "filled by 3"), ("facts", "one of two")])
def test_processes(folder, mode, says):
    command = [sys.executable, str(PROCESSES), mode, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100)
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
