"""Pictures of README and docs: drawn from committed files, complete without some of them, none out of nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from xdfast.bench import figures

RESULTS = Path(__file__).resolve().parents[2] / "bench/results/cpu"
ROW = {
    "pair": "cnn-vit", "method": "kd", "teacher_top1": 0.7, "top1": {"mean": 0.4, "half_width": 0.01, "n": 3},
    "against_scratch": {"mean": 0.03, "half_width": 0.02, "n": 3}, "by_seed": {"0": 0.4}, "ms_per_step": 100.0,
    "peak_mb": 900.0, "peak_of": "process", "extra_parameters": 0,
}  # fmt: skip


def test_a_panel_for_every_file_that_is_there(tmp_path) -> None:
    whole = figures.speed_picture(RESULTS, tmp_path / "whole.png")
    assert len(whole) == 3
    (tmp_path / "some").mkdir()
    shutil.copy(RESULTS / "routed.json", tmp_path / "some")
    assert figures.speed_picture(tmp_path / "some", tmp_path / "part.png") == [whole[1]]
    with Image.open(tmp_path / "whole.png") as large, Image.open(tmp_path / "part.png") as small:
        assert large.width > 2.5 * small.width and len(large.convert("L").getcolors()) > 20
    with pytest.raises(FileNotFoundError, match="has none of rsd.json, routed.json, policy_avx2.json"):
        figures.speed_picture(tmp_path, tmp_path / "x.png")


def test_the_same_files_make_the_same_picture(tmp_path) -> None:
    for name in ("a.png", "b.png"):
        figures.speed_picture(RESULTS, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_tables_of_a_comparison_go_between_their_markers(tmp_path) -> None:
    page = "before\n<!-- bench:compare -->\nold\n<!-- /bench:compare -->\nafter\n"
    text = figures.update_comparison(page, {"rows": [ROW]})
    assert "| kd | 3 | 40.0 ± 1.0 | +3.0 ± 2.0 | 100 | 900 |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
    with pytest.raises(ValueError, match="found 0"):
        figures.update_comparison("no markers", {"rows": [ROW]})


def test_all_of_it_from_a_repositorys_root(tmp_path, capsys) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/comparison.md").write_text("<!-- bench:compare -->\n<!-- /bench:compare -->\n")
    shutil.copytree(RESULTS, tmp_path / "bench/results/cpu")
    (tmp_path / "bench/results/cpu/compare_cifar10.json").write_text(json.dumps({"rows": [ROW]}))
    assert figures.main([str(tmp_path)]) == 0
    assert (tmp_path / "docs/images/comparison.png").stat().st_size > 5000
    assert "| kd | 3 |" in (tmp_path / "docs/comparison.md").read_text()
    assert "speed.png" in capsys.readouterr().out
