"""The loader's benchmark: equal work, CPU time of all processes, parity that notices a wrong view, committed figures."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xdfast.bench import data

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return data.make_photographs(tmp_path_factory.mktemp("made"), count=20)


def test_made_photographs_are_like_real_ones_and_the_same_each_time(photographs, tmp_path) -> None:
    sizes = [file.stat().st_size for file in photographs.rglob("*.jpg")]
    assert len(sizes) == 20 and 70_000 < statistics.median(sizes) < 150_000
    again = data.make_photographs(tmp_path, count=3)
    for file in again.rglob("*.jpg"):
        assert file.read_bytes() == (photographs / file.relative_to(again)).read_bytes()
    source = data.open_images(photographs)
    assert len(source) == 20 and 300 < source.short_side() < 450


def test_a_large_folder_is_sampled_evenly(photographs, monkeypatch) -> None:
    monkeypatch.setattr(data, "_IMAGES", 5)
    source = data.open_images(photographs)
    assert len(source) == 5 and set(source.labels) == set(range(5))


def test_cpu_time_counts_processes_under_way_and_ended() -> None:
    pytest.importorskip("psutil")
    work = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass\nprint(flush=True); input()"
    before = data.cpu_seconds()
    child = subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    alive = data.cpu_seconds() - before
    child.communicate(b"\n")
    ended = data.cpu_seconds() - before
    assert 0.28 < alive < 5 and alive - 0.03 < ended < alive + 5
    begin = data.cpu_seconds()
    time.sleep(0.2)
    assert data.cpu_seconds() - begin < 0.15


def test_parity_is_of_the_same_boxes(photographs, monkeypatch) -> None:
    monkeypatch.setattr(data, "_BATCH", 10)
    loader = data.our_loader(data.open_images(photographs), "bilinear", "pillow")
    found = data.parity(loader)
    assert found["mean"] < data.MUST_REACH["parity"] and found["max"] <= 1 and found["images"] == 20
    true = loader.views.crop
    monkeypatch.setattr(loader.views, "crop", lambda *args: true(*args)._replace(flip=False))
    assert data.parity(loader)["mean"] > 5  # workers started before still flip
    loader.close()


def test_measure_takes_turns_and_says_what_is_reached(photographs, monkeypatch) -> None:
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("psutil")
    monkeypatch.setattr(data, "_IMAGES", 20)
    monkeypatch.setattr(data, "_BATCH", 10)
    found = data.measure(photographs, "bicubic", budget=0.1, rounds=(2, 2))
    assert set(found["cpu_ms"]) == {data.OURS, "xdfast pillow", "torchvision", "dali's own crop"}
    for times in (*found["cpu_ms"].values(), *found["wall_ms"].values()):
        assert 0 < times["min"] <= times["median"]
    assert set(found["speedup"]) == set(found["cpu_ms"]) - {data.OURS} and set(found["reached"]) == set(data.MUST_REACH)
    assert found["rounds"] == 2 and found["images"]["count"] == 20 and found["parity"]["images"] == 20
    assert found["reached"]["parity"]


def test_the_committed_figures_are_whole_and_name_no_folder() -> None:
    text = (ROOT / "bench/results/cpu/data.json").read_text(encoding="utf-8")
    cases = {b["extra_info"]["interpolation"]: b["extra_info"] for b in json.loads(text)["benchmarks"]}
    assert set(cases) == {"bilinear", "bicubic"}
    for case in cases.values():
        assert case["reached"]["parity"] and case["target"] == data.MUST_REACH and case["rounds"] >= 3
    assert not any(folder in text for folder in ("/tmp", "/home", "/root", "/work", "/mnt", "/data"))
