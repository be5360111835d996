"""A comparison: every cell an ordinary run, continued, told before it begins what is wrong; tables whose figures are the runs'."""

from __future__ import annotations

import json
import math

import pytest

import xdfast
from xdfast.cli import main
from xdfast.pipeline import CompareConfig, load_run
from xdfast.pipeline.compare_table import markdown, table_rows
from xdfast.pipeline.folder import RunResult

TINY = {
    "data": "sklearn:digits",
    "settings": {
        "epochs": 1, "batch_size": 128, "labels_per_class": 40, "augment": "none", "student_size": 32, "lr": 0.02,
        "image_size": 32, "workers": 0, "progress": False,
    },
    "device": "cpu", "seeds": 1, "jobs": 1, "progress": False, "pages": False,
}  # fmt: skip
PAIR = {
    "teacher": {"model": "test_vit", "student_options": {"patch_size": 8}},
    "student": "test_resnet",
    "settings": {"optimizer": "sgd"},
}
METHODS = {"scratch": {}, "kd": {"loss": "kd"}, "rsd-linear": {"loss": "rsd", "aad_expansion": 0}}


def made(path, top1: float, seed: int, kind: str = "distill", cost: dict | None = None) -> RunResult:
    path.mkdir(parents=True)
    if cost is not None:
        (path / "cost.json").write_text(json.dumps(cost))
    return RunResult(kind, path, {"seed": seed}, {"top1": top1, "seconds": 2.0 + seed, "steps": 10})


def test_rows_are_paired_by_seed_with_t_intervals(tmp_path) -> None:
    cost = {"peak_bytes": 5e8, "of": "process", "extra_parameters": 1_310_000}
    methods = {
        "scratch": [made(tmp_path / f"s{i}", x, i, "finetune") for i, x in enumerate([0.60, 0.62, 0.64])],
        "rsd": [made(tmp_path / f"r{i}", x, i, cost=cost) for i, x in enumerate([0.63, 0.66, 0.66])],
    }
    scratch, rsd = table_rows("vit-cnn", methods, 0.7)
    assert scratch["against_scratch"] is None and scratch["top1"]["mean"] == pytest.approx(0.62)
    gained = rsd["against_scratch"]  # 0.03, 0.04, 0.02: s = 0.01, t(2) = 4.3027
    assert gained["mean"] == pytest.approx(0.03) and gained["n"] == 3
    assert gained["half_width"] == pytest.approx(4.30265 * 0.01 / math.sqrt(3), rel=1e-4)
    assert rsd["ms_per_step"] == pytest.approx(300) and rsd["peak_mb"] == 500 and scratch["peak_mb"] is None
    text = markdown([scratch, rsd])
    assert "### vit-cnn (teacher 70.0 %)" in text
    assert "| rsd | 3 | 65.0 ± 4.3 | +3.0 ± 2.5 | 300 | 500 | 1.31 M |" in text
    assert "| scratch | 3 | 62.0 ± 5.0 | – | 300 | – | – |" in text


def test_a_seed_that_scratch_lacks_is_not_compared(tmp_path) -> None:
    methods = {
        "scratch": [made(tmp_path / "s0", 0.5, 0, "finetune")],
        "kd": [made(tmp_path / f"k{i}", x, i) for i, x in enumerate([0.6, 0.9])],
    }
    _, kd = table_rows("p", methods, None)
    assert kd["against_scratch"] == {"mean": pytest.approx(0.1), "half_width": None, "n": 1} and kd["top1"]["n"] == 2
    assert "+10.0 |" in markdown([kd])


@pytest.mark.slow
def test_cells_are_runs_and_a_second_call_repeats_nothing(tmp_path) -> None:
    given = {**TINY, "pairs": {"vit-cnn": PAIR}, "methods": METHODS, "out": str(tmp_path / "compare")}
    result = xdfast.compare(**given)
    assert not result.failed and [row["method"] for row in result.rows] == list(METHODS)
    folder = tmp_path / "compare" / "vit-cnn"
    run = load_run(folder / "rsd-linear-seed0")
    assert run.config["teacher"] == str(folder / "teacher") and run.config["optimizer"] == "sgd"
    assert result.metrics["vit-cnn/kd"] == load_run(folder / "kd-seed0").metrics["top1"]
    rows = {row["method"]: row for row in result.rows}
    projector = run.student.num_features * load_run(folder / "teacher").student.num_features
    assert rows["rsd-linear"]["extra_parameters"] == projector and rows["kd"]["extra_parameters"] == 0
    assert rows["scratch"]["peak_mb"] > 50 and rows["scratch"]["teacher_top1"] is not None
    told = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert told["rows"] == json.loads(json.dumps(result.rows)) and told["failed"] == {}
    assert (tmp_path / "compare" / "compare.png").stat().st_size > 5000
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    assert xdfast.compare(**given).rows == result.rows
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")} == before
    with pytest.raises(ValueError, match="holds a run with other settings .*epochs"):
        xdfast.compare(**{**given, "student_settings": {"epochs": 2}})


@pytest.mark.slow
def test_models_of_ones_own_as_teacher_and_student_with_pages(tmp_path, monkeypatch) -> None:
    """Every run is a process of its own, and none may be told by a folder alone what code to run."""
    from own_net import CODE

    monkeypatch.setenv("XDFAST_OWN_CODE", "")
    (tmp_path / "net.py").write_text(CODE)
    own = f"{tmp_path}/net.py:Net"
    pairs = {"p": {"teacher": {"model": own, "student_options": {"width": 12}}, "student": own, "settings": {}}}
    given = {**TINY, "pairs": pairs, "methods": {"scratch": {}, "rsd": {"loss": "rsd"}}, "out": str(tmp_path / "c")}
    result = xdfast.compare(**{**given, "pages": True, "measure_speed": False})
    assert not result.failed and [row["method"] for row in result.rows] == ["scratch", "rsd"]
    assert (tmp_path / "c/p/report.html").stat().st_size > 10_000
    assert json.loads((tmp_path / "c/compare.json").read_text())["pairs"] == pairs


@pytest.mark.slow
def test_a_failing_method_does_not_stop_the_others(tmp_path) -> None:
    methods = {"scratch": {}, "broken": {"loss": "kd", "taps": {"layer9": "blocks.0"}}}
    result = xdfast.compare(**{**TINY, "pairs": {"p": PAIR}, "methods": methods, "out": str(tmp_path / "x")})
    assert list(result.failed) == ["p/broken-seed0"] and "log.txt" in result.failed["p/broken-seed0"]
    assert [row["method"] for row in result.rows] == ["scratch"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"methods": {}}, "methods is empty"),
        ({"pairs": {}}, "pairs is empty"),
        ({"methods": {"a/b": {}}}, "'a/b' becomes a folder's name"),
        ({"methods": {"x": {"loss": "rds"}}}, "rds"),
        ({"methods": {"x": {"los": "rsd"}}}, "los"),
        ({"pairs": {"p": {"student": "resnet18"}}}, "p names no teacher"),
        ({"pairs": {"p": {**PAIR, "studnet": "x"}}}, "did you mean 'student'|studnet"),
        (
            {"pairs": {"p": PAIR, "q": {**PAIR, "teacher": {"of": "pp"}}}},
            "q takes the teacher of 'pp'.*Did you mean 'p'",
        ),
        ({"pairs": {"p": PAIR, "q": {**PAIR, "teacher": {"of": "p", "lr": 1}}}}, "nothing else beside it"),
        ({"pairs": {"p": {**PAIR, "teacher": {"of": "p"}}}}, "has none of its own"),
        ({"only_methods": ("rds",)}, "only_methods: there is no 'rds'"),
        ({"only_pairs": ("q",)}, "only_pairs: there is no 'q'"),
        ({"seeds": 0}, "seeds"),
        ({"settings": {"epochs": 0}}, "epochs"),
    ],
)
def test_bad_settings_are_told_before_anything_runs(tmp_path, change, match) -> None:
    given = {**TINY, "pairs": {"p": PAIR}, "methods": METHODS, "out": str(tmp_path / "x"), **change}
    with pytest.raises(ValueError, match=match):
        xdfast.compare(**given)
    assert not (tmp_path / "x").exists()


def test_a_part_can_be_chosen_and_the_command_line_names_what_is_wrong(tmp_path, capsys) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(json.dumps({"verb": "compare", **TINY, "pairs": {"p": PAIR}, "methods": METHODS}))  # JSON is YAML
    assert main(["compare", "--recipe", str(file), "--out", str(tmp_path / "x"), "--only-methods", "kdd"]) == 1
    assert "did you mean 'kd'" in capsys.readouterr().err.lower()
    from xdfast.pipeline.compare import _students

    config = CompareConfig.from_dict(
        {**TINY, "pairs": {"p": PAIR}, "methods": METHODS, "out": "x", "only_methods": ["kd"]}
    )
    config.validate()
    assert [cell.method for cell in _students(config)] == ["kd"]


def test_a_pair_may_take_the_teacher_of_another() -> None:
    from xdfast.pipeline.compare import _students, _teachers

    own = {"teacher": {"of": "p"}, "student": "timm.models.mlp_mixer:MlpMixer"}
    given = {**TINY, "pairs": {"p": PAIR, "q": own}, "methods": METHODS, "out": "x", "only_pairs": ["q"]}
    config = CompareConfig.from_dict(given)
    config.validate()
    assert [cell.name for cell in _teachers(config)] == ["p/teacher"]  # also where p itself is not asked for
    assert {cell.config.teacher for cell in _students(config) if cell.method != "scratch"} == {"x/p/teacher"}
    config = CompareConfig.from_dict({**given, "only_pairs": []})
    assert [cell.name for cell in _teachers(config)] == ["p/teacher"]
