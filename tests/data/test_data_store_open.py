"""Opening a store: the same one again, one of another use, a damaged one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from store_parts import OUTPUTS, fill, make, outputs

from xdfast.data.store import TeacherStore, layout


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "BLOCK", 16)  # 100 rows in seven shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


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
        assert (folder / "rows-00000.bin").stat().st_size == 16 * 36
        assert torch.equal(store.read(ids, views, ids)[0]["features"], given["features"])
