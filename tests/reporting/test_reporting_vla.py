"""Reports of students that skip layers: intervals, tables and sentences with figures worked out by hand, and the page."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from xdfast.reporting import PolicyRecord, RunRecord, VLARecord, build_report
from xdfast.reporting.intervals import newcombe_interval, paired_interval
from xdfast.reporting.vla_cost import cost_rows
from xdfast.reporting.vla_curves import curves, terms
from xdfast.reporting.vla_plots import _apart, heat_maps, over_time, pareto
from xdfast.reporting.vla_tables import (
    column_rows,
    comparisons,
    fraction_of,
    groups_of,
    path_table,
    success_table,
    task_names,
)
from xdfast.reporting.vla_words import findings, points, remarks, unsteady

OPEN, CLOSE = "metaworld/drawer-open-v3", "metaworld/drawer-close-v3"
TIMES = {
    "dense": {"p50": 20.0, "p95": 25.0},
    "routed": {"p50": 10.0, "p95": 14.0},
    "speedup_low": 1.9,
    "speedup_high": 2.1,
}
COST = {
    "counted": {
        "stack": {"dense": 1000, "nominal": 500, "executed": 520},
        "decision": {"dense": 1400, "nominal": 900, "executed": 920},
    },
    "measured": [
        {"batch": 1, "fraction": 0.52, "stack": {**TIMES, "speedup": 2.0}, "decision": {**TIMES, "speedup": 1.5}}
    ],
    "machine": "a machine, 2 threads; 64 observations",
    "measurement": {"run": "x", "key": {}, "result": {}},
}


def routed(fraction=0.5, decisions=100, layers=4, paths=(("1101", 60), ("1001", 40))) -> dict:
    return {
        "layers": layers, "decisions": decisions, "dense": 1000, "nominal": 1000 * fraction, "executed": 1000 * fraction,
        "fraction": fraction, "use": [1.0, 0.6, 0.0, 1.0], "use_over_time": [[1.0, 0.6, 0.0, 1.0], None] * 5,
        "paths": [list(path) for path in paths], "distinct": len(paths),
    }  # fmt: skip


def record(
    name="vla", routing="dense", seed=0, solved=(8, 6), of=10, first=0, target=0.5, fraction=0.5, **fields
) -> VLARecord:
    """Two tasks; the first ``solved`` episodes after ``first`` succeed."""
    tasks = [
        PolicyRecord(
            name, "", seed, "vla", {"success": count / of}, task=task, evaluated={"max_steps": None},
            episodes=[{"seed": 100 + i, "success": (i - first) % of < count, "steps": 50} for i in range(of)],
        )
        for task, count in zip((OPEN, CLOSE), solved)
    ]  # fmt: skip
    dense = routing == "dense"
    words = {"dense": "teacher", "learned": "student", "static": "static", "random": "random"}[routing]
    values = {
        "config": {
            "steps": 10,
            "seed": seed,
            "target_flops": None if dense else target,
            "routing": None if dense else routing,
        },
        "history": [
            {"kind": "train", "step": s, "loss": 1 / s, "loss_budget": 0.1 / s, "lr": 1.0} for s in range(1, 6)
        ],
        "tasks": tasks,
        "paths": {} if dense else {OPEN: routed(fraction), CLOSE: routed(fraction, 300)},
        "is_teacher": dense,
        "target_flops": None if dense else target,
        **fields,
    }
    method = words if dense else f"{words}, {100 * target:g} %"
    return VLARecord(name, method, seed, "vla", {}, model_name="resnet18", routing=routing, **values)


def four() -> list[VLARecord]:
    return [
        record("rnd", "random", solved=(1, 2)),
        record("sta", "static", solved=(3, 4)),
        record("stu", "learned", solved=(8, 7), first=1, cost=COST),
        record("vla"),
    ]


def told_of(records) -> tuple[list[str], list[str]]:
    groups, _ = groups_of(records)
    table = success_table(groups)
    words = findings(column_rows(groups), table["total"], comparisons(groups), cost_rows(groups))
    return words, remarks(groups, table["total"])


def test_intervals_of_differences_are_newcombes() -> None:
    # Newcombe 1998: table II, 56/70 - 48/80, method 10; paired example 36, 12, 2, 0, method 10
    assert newcombe_interval(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert paired_interval(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    low, high = paired_interval(10, 0, 0, 10)
    assert low == pytest.approx(-high) and 0 < high < newcombe_interval(10, 20, 10, 20)[1]
    assert newcombe_interval(0, 5, 5, 5)[0] >= -1
    with pytest.raises(ValueError, match="counts ≥ 0 of at least one trial"):
        paired_interval(0, 0, 0, 0)
    with pytest.raises(ValueError, match="successes ≤ trials"):
        newcombe_interval(0, 0, 1, 2)


def test_table_and_comparisons_by_hand() -> None:
    groups, notes = groups_of(four())
    assert notes == [] and [g.label for g in groups] == ["teacher", "student, 50 %", "static, 50 %", "random, 50 %"]
    table = success_table(groups)
    assert [row["task"] for row in table["rows"]] == [OPEN, CLOSE] == task_names(groups)
    assert [cell["solved"] for cell in table["rows"][0]["cells"]] == [8, 8, 3, 1]
    student = table["total"]["cells"][1]
    assert (student["solved"], student["episodes"], student["rate"]) == (15, 20, 0.75) and table["total"]["tasks"] == 2
    rows = {(row["label"], row["base"]): row for row in comparisons(groups)}
    assert len(rows) == 5
    row = rows["student, 50 %", "teacher"]
    # task one: 8 of 10 each, moved by one: both 7, one each alone, one neither; task two: 7 (seeds 1 to 7) and 6 (0 to 5)
    assert row["pairs"] == {"both": 12, "only_first": 3, "only_second": 2, "neither": 3} and row["how"] == "paired"
    assert row["points"] == pytest.approx(0.05) and (row["low"], row["high"]) == paired_interval(12, 3, 2, 3)
    assert rows["student, 50 %", "static, 50 %"]["equal_flops"] is True and row["equal_flops"] is False
    assert row["fractions"] == [0.5, 1.0] and row["seeds"] is None


def test_several_seeds_are_pooled_and_paired_by_seed() -> None:
    students = [record(f"stu-s{s}", "learned", s, solved=(8 - s, 7)) for s in range(3)]
    static = [record(f"sta-s{s}", "static", s, solved=(4, 3)) for s in range(3)]
    for run in (*students, *static):  # the first stage of a seed is its own: no other method
        run.config["stage1"] = f"runs/stage1-{run.seed}" if run.seed else "runs/stage1"
    groups, _ = groups_of([record(), *students, *static])
    assert [len(group.runs) for group in groups] == [1, 3, 3]
    cell = success_table(groups)["total"]["cells"][1]
    assert (cell["solved"], cell["episodes"]) == (42, 60) and cell["per_run"] == pytest.approx([0.75, 0.7, 0.65])
    assert cell["over_runs"]["mean"] == pytest.approx(0.7) and cell["over_runs"]["half_width"] > 0
    rows = {(row["label"], row["base"]): row for row in comparisons(groups)}
    against = rows["student, 50 %", "static, 50 %"]
    assert against["pairs"] is None and against["how"] == "independent"
    assert (against["low"], against["high"]) == newcombe_interval(42, 60, 21, 60)
    assert against["seeds"]["mean"] == pytest.approx(0.35) and against["seeds"]["n"] == 3
    assert rows["student, 50 %", "teacher"]["seeds"] is None
    words, told = told_of([record(), *students, *static])
    assert (
        words[0]
        == "The student solves 42 of 60 episodes (3 training runs) with 50 % of the transformer's FLOPs; the teacher 14 of 20."
    )
    assert "over 3 training seeds, paired, +35.0 ±" in " ".join(words) and "not independent" in " ".join(told)


def test_sentences_say_what_is_shown_and_what_is_not() -> None:
    words, told = told_of(four())
    assert (
        words[0] == "The student solves 15 of 20 episodes with 50 % of the transformer's FLOPs; the teacher 14 of 20."
    )
    assert words[1].startswith("That is 5 points above the teacher (95 % interval −")
    assert "both solve 12, the student alone 3, the teacher alone 2): no difference is shown" in words[1]
    assert "A loss of more than" in words[1] and "anything between is possible" in words[1]
    assert words[2].startswith(
        "Leaving out the same layers always (static, 50 %) solves 7 of 20 with 50 % of the FLOPs"
    )
    assert "the student is 40 points above it" in words[2] and words[2].endswith("the student is better.")
    assert words[3].startswith("Skipping layers at random (random, 50 %) solves 3 of 20")
    assert words[4] == (
        "Measured on a machine, 2 threads: the layers of the student run at 2.00× at batch 1 (the whole decision 1.50×) the "
        "speed of the teacher's."
    )
    assert any("one training run" in text for text in told)
    worse, _ = told_of([record(solved=(10, 10)), record("stu", "learned", solved=(2, 1))])
    assert "85 points below the teacher" in worse[1] and "a loss that chance over episodes does not explain" in worse[1]
    better, _ = told_of([record(solved=(1, 1)), record("stu", "learned", solved=(9, 10))])
    assert "more than chance over episodes explains" in better[1]
    alone, _ = told_of([record(is_teacher=False)])
    assert alone == ["Teacher solves 14 of 20 episodes (95 % interval 48 to 85 %)."]
    two, _ = told_of([record(), record("a", "learned"), record("b", "learned", target=0.3, fraction=0.3)])
    assert two[0].startswith("The 50 % student solves 14") and any(t.startswith("The 30 % student") for t in two)
    assert (points(0.034), points(-0.1), points(-0.001), points(0.0), points(0.1, 1)) == (
        "+3",
        "−10",
        "0",
        "0",
        "+10.0",
    )


def test_what_is_not_comparable_is_told() -> None:
    student = record("stu", "learned", of=20, fraction=0.7, remarks=["x was gone"])
    student.tasks[0].evaluated = {"max_steps": 99}
    blind = record("blind", "static", paths={})
    groups, _ = groups_of([record(), student, blind])
    text = " ".join(remarks(groups, success_table(groups)["total"]))
    assert "Every task: the runs were not evaluated in the same episodes (vla 10, stu 20, blind 10)" in text
    assert (
        "drawer-open-v3: episodes ended after different numbers of steps (99, the task's)" in text
        and "stu: x was gone" in text
    )
    assert "student, 50 %: 50 % of the FLOPs were asked for, 70 % were executed" in text
    assert (
        "static, 50 %: its share of FLOPs is not known, because the evaluation does not tell which layers ran" in text
    )
    fewer = record("stu", "learned")
    fewer.tasks = fewer.tasks[:1]
    groups, _ = groups_of([record(), fewer])
    total = success_table(groups)["total"]
    assert total["tasks"] == 1 and "drawer-close-v3 is not among them" in " ".join(remarks(groups, total))


def test_unsteady_measurements_are_not_stated() -> None:
    wide = {
        **COST,
        "measured": [{"batch": 1, "stack": {**TIMES, "speedup": 1.0, "speedup_low": 0.4}, "decision": None}],
    }
    words, _ = told_of([record(), record("stu", "learned", cost=wide)])
    assert words[-1] == "The speedup at batch 1 was too uncertain to state."
    slow = {"dense": {"p50": 20.0, "p95": 41.0}, "routed": {"p50": 10.0, "p95": 14.0}}
    row = {"label": "student", "measured": [{"batch": 1, "stack": slow, "decision": None}]}
    assert unsteady([row])[0].startswith("The machine was not quiet during the measurement (student at batch 1:")
    assert unsteady([{**row, "measured": COST["measured"]}]) == []


def test_cost_is_that_of_the_episodes_where_it_is_known() -> None:
    groups, _ = groups_of([record(), record("stu", "learned", cost=COST), record("sta", "static", paths={}, cost=COST)])
    teacher, student, static = cost_rows(groups)
    assert (
        teacher["counted"]["stack"] == {"dense": 1000, "nominal": 1000, "executed": 1000} and teacher["measured"] == []
    )
    assert student["counted"]["stack"] == {"dense": 1000, "nominal": 500, "executed": 500}
    assert student["counted"]["decision"] == {"dense": 1400, "nominal": 900, "executed": 900}
    assert static["counted"] == COST["counted"] and student["measured"][0]["stack_speedup"] == 2.0
    assert student["measured"][0]["of_ideal"] == pytest.approx(2.0 * 0.52)
    assert cost_rows(groups_of([record(), record("sta", "static", paths={})])[0]) == []


def test_shares_and_paths_weigh_decisions() -> None:
    run = record("stu", "learned", paths={OPEN: routed(0.4, 100), CLOSE: routed(0.8, 300, paths=(("1101", 300),))})
    assert fraction_of([run]) == pytest.approx(0.7) and fraction_of([record()]) == 1.0
    assert fraction_of([record("stu", "learned", paths={})]) is None
    table = path_table([run])
    assert [(r["path"], r["active"], r["share"]) for r in table["rows"]] == [("1101", 3, 0.9), ("1001", 2, 0.1)]
    assert table["rows"][1]["by_task"] == {OPEN: 0.4, CLOSE: 0.0} and table["covered"] == 1 and table["distinct"] == 2
    halves = record("stu", "learned", paths={OPEN: routed(paths=(("1am0", 100),))})
    assert path_table([halves])["rows"][0]["active"] == 2 and path_table([halves])["rows"][0]["halved"]


def test_pictures_say_in_words_what_they_show() -> None:
    groups, _ = groups_of(four())
    columns, total = column_rows(groups), success_table(groups)["total"]
    picture = pareto(columns, total)
    assert "student, 50 % 75 % at 50 % of the FLOPs" in picture.alt and "squares: the same layers" in picture.caption
    for label in ("teacher", "student, 50 %", "static, 50 %", "random, 50 %"):
        assert f">{label}</text>" in picture.svg
    assert pareto(columns[:1], {"cells": total["cells"][:1]}) is None
    run = record("stu", "learned", always_on=(0, 3))
    drawn = heat_maps(run, "student")
    assert "0 100 %, 1 60 %, 2 0 %, 3 100 %" in drawn.alt and "Always on (•): 0, 3." in drawn.caption
    assert over_time(run, "student").alt.startswith("One map per task (drawer-open-v3, drawer-close-v3)")
    assert heat_maps(record(), "teacher") is None and over_time(record(), "teacher") is None
    no_times = record("stu", "learned", paths={OPEN: {**routed(), "use_over_time": [None] * 10}})
    assert heat_maps(no_times, "student") is not None and over_time(no_times, "student") is None


def test_marks_are_moved_only_where_they_hide_each_other() -> None:
    assert _apart([(100, 60, 70), (12.7, 78, 82), (12.5, 64, 69), (12.5, 25, 34)]) == [100, 12.7, 12.5, 12.5]
    assert _apart([(50, 60, 70), (50.4, 65, 75), (50, 10, 20)]) == pytest.approx([49.4, 51.0, 50])
    # the first and the last do not overlap, but each does with the one between
    assert _apart([(50, 60, 70), (50, 68, 80), (50, 78, 90)]) == pytest.approx([48.4, 50, 51.6])


def test_curves_have_every_term_known_or_not() -> None:
    history = [
        {
            "kind": "train",
            "step": s,
            "loss": 2.0,
            "loss_fraction": 0.6,
            "loss_mine": 1.0,
            "loss_policy": 0.5,
            "time": 1.0,
            "lr": 1,
        }
        for s in range(1, 200)
    ]
    groups, _ = groups_of([record(history=[]), record("stu", "learned", history=history)])
    assert terms(groups) == ["loss", "policy", "fraction", "mine"]
    picture = curves(groups)
    assert "share of the stack's FLOPs, %" in picture.alt and "Dotted: the share that was asked for" in picture.caption
    assert curves(groups_of([record(history=[])])[0]) is None


class _Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.opened.append(tag)
        self.ids += [value for name, value in attrs if name == "id" and tag == "section"]


def test_the_page_has_its_sections_and_no_empty_ones(tmp_path) -> None:
    report = build_report([], [], tmp_path / "r", vlas=four(), title="Students", measure_speed=False)
    text, data = report.path.read_text(encoding="utf-8"), json.loads(report.json_path.read_text(encoding="utf-8"))
    page = _Texts()
    page.feed(text)
    assert page.ids == ["success", "decision", "layers", "training", "settings", "environment"]
    assert page.opened.count("svg") == 1 + 3 * 2 + 1 and "<title>Students</title>" in text
    assert {"columns", "success", "comparisons", "cost", "routing", "paths", "measurements", "remarks"} <= data[
        "vla"
    ].keys()
    assert data["vla"]["routing"][0]["tasks"][OPEN]["use"] == [1.0, 0.6, 0.0, 1.0] and data["headline"]
    bare = build_report([], [], tmp_path / "bare", vlas=[record(history=[], tasks=[])], measure_speed=False)
    page = _Texts()
    page.feed(bare.path.read_text(encoding="utf-8"))
    assert page.ids == ["settings", "environment"] and "#success" not in bare.path.read_text(encoding="utf-8")


def test_other_runs_have_another_page(tmp_path) -> None:
    with pytest.raises(ValueError, match="a page of their own: make two reports"):
        build_report([RunRecord("a", "RSD", 0, "distill", {})], [], tmp_path / "r", vlas=[record()])
