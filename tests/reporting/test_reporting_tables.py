"""Means, intervals, pairing, grouping."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from xdfast.reporting import RunRecord, method_table, summarize
from xdfast.reporting.groups import group_runs
from xdfast.reporting.tables import accuracy_table, difference


def run(name="run", method="RSD", seed=0, top1=0.9, model="net", config=None, **metrics) -> RunRecord:
    values = {**({} if top1 is None else {"top1": top1}), **metrics}
    return RunRecord(name, method, seed, "distill", values, config=config or {}, model_name=model)


def test_the_interval_is_students() -> None:
    values = [0.91, 0.93, 0.90, 0.95]
    told = summarize(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    # float64 sums of four numbers: rounding only
    assert told.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert (told.mean - told.half_width, told.mean + told.half_width) == pytest.approx((low, high), rel=1e-9)
    assert told.n == 4


def test_one_value_has_no_interval_and_missing_ones_do_not_count() -> None:
    assert summarize([0.5, float("nan"), None]).half_width is None
    assert summarize([0.5, float("nan")]).n == 1
    with pytest.raises(ValueError, match="at least one finite"):
        summarize([float("inf")])


def test_difference_is_paired_where_seeds_match() -> None:
    scratch = [run(f"s{i}", "from scratch", i, 0.8 + 0.05 * i) for i in range(3)]
    rsd = [run(f"r{i}", "RSD", i, 0.82 + 0.05 * i + 0.001 * i) for i in range(3)]
    groups, _ = group_runs(scratch + rsd)
    told = difference(groups[1], groups[0])
    assert told.paired and told.n == 3
    assert told.mean == pytest.approx(0.021)
    # 20, 21, 22 thousandths: t(2) · 0.001 / √3
    assert told.half_width == pytest.approx(stats.t.ppf(0.975, 2) * 0.001 / 3**0.5, rel=1e-6)
    assert accuracy_table(groups)[0]["to_scratch"] is None


def test_difference_of_other_seeds_is_welchs() -> None:
    a, b = [0.9, 0.92, 0.94], [0.8, 0.85]
    groups, _ = group_runs(
        [run(f"a{i}", "RSD", i, v) for i, v in enumerate(a)]
        + [run(f"b{i}", "from scratch", 10 + i, v) for i, v in enumerate(b)]
    )
    told = difference(groups[0], groups[1])
    ci = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert not told.paired
    assert (told.mean - told.half_width, told.mean + told.half_width) == pytest.approx((ci.low, ci.high), rel=1e-9)
    one, _ = group_runs([run("a", "RSD", 0, 0.9), run("b", "from scratch", 1, 0.8)])
    assert difference(one[0], one[1]).half_width is None


def test_only_the_seed_may_differ_within_a_method() -> None:
    groups, notes = group_runs(
        [
            run("a", seed=0, config={"kappa": 0.01, "out": "x", "model": "runs/kd-s0/student"}),
            run("b", seed=1, config={"kappa": 0.01, "out": "y", "model": "runs/kd-s1/student"}),
            run("c", seed=0, config={"kappa": 0.0, "out": "z", "model": "runs/kd-s0/student"}),
            run("again", seed=1, config={"kappa": 0.01, "out": "q", "model": "runs/kd-s1/student"}),
        ]
    )
    assert [g.label for g in groups] == ["RSD (kappa=0.01)", "RSD (kappa=0.0)"]
    assert [r.name for r in groups[0].runs] == ["a", "b"]
    assert "again" in notes[0] and "not an independent repetition" in notes[0]


def test_what_leaves_a_result_alone_makes_no_other_method() -> None:
    """Seeds of one method run where there was room: one with DALI, one without, one sharded."""
    other = (
        {"decoder": "dali", "monitor": 0},
        {"decoder": "auto", "overlap": True},
        {"parallel": "fsdp", "workers": 3},
    )
    groups, _ = group_runs([run(str(seed), seed=seed, config=config) for seed, config in enumerate(other)])
    assert len(groups) == 1 and len(groups[0].runs) == 3


def test_students_of_other_architecture_are_other_rows() -> None:
    groups, _ = group_runs([run(model="resnet18"), run(model="vit", seed=1)])
    assert [g.label for g in groups] == ["RSD · resnet18", "RSD · vit"]


def test_terminal_table() -> None:
    records = [run(f"r{i}", seed=i, top1=0.9 + i / 100, knn=0.5) for i in range(2)]
    records += [run("s", "[bold]odd", 0, 0.8), run("n", "no classifier", 0, None, cka=0.7)]
    text = io.StringIO()
    Console(file=text, width=160).print(method_table(records))
    shown = text.getvalue()
    assert "90.5 ± 6.4" in shown and "50.0 ± 0.0" in shown and "0.700" in shown
    assert "[bold]odd" in shown and "Top-5" not in shown
    with pytest.raises(ValueError, match="at least one run"):
        method_table([])
