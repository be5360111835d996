"""The benchmark itself: it measures what it says, refuses a wrong result, and its tables come from its files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import xdfast
from xdfast.bench import cases, harness, rivals, rsd, table
from xdfast.bench.run import parse_shape, run

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results/cpu/rsd.json"


def test_rounds_are_interleaved_and_every_candidate_is_timed_equally_often() -> None:
    order: list[str] = []
    times = harness.interleave({n: lambda n=n: order.append(n) for n in "abc"}, budget=1.0, rounds=(6, 6), warmup=1)
    assert {len(samples) for samples in times.values()} == {6}
    rounds = [order[3 + 3 * i : 6 + 3 * i] for i in range(6)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert {r[0] for r in rounds} == {"a", "b", "c"}


def test_ratios_say_how_much_faster_ours_is() -> None:
    found = harness.ratios({"ours": [1.0, 1.0, 1.0], "slow": [2.0, 4.0, 6.0]}, "ours")
    assert found == {"slow": {"ratio": 4.0, "quartile_low": 2.0, "quartile_high": 6.0}}


def test_peak_memory_counts_what_is_alive_at_the_worst_moment() -> None:
    def two_then_one() -> None:
        first = torch.empty(1000, 250)
        second = torch.empty(1000, 250)
        del first
        second = torch.empty(1000, 250)
        del second

    assert harness.peak_memory(two_then_one) == 2_000_000


def test_the_kernels_need_memory_in_proportion_to_n_times_d() -> None:
    """N < D: O(N D), scratch memory inside the kernel included; the D×D matrix alone would be 16.8 MB."""
    for both in (False, True):
        student, teacher = cases.RSDCase(32, 2048, both).inputs()
        peak = harness.peak_memory(lambda s=student, t=teacher: xdfast.rsd_loss(s, t).backward())
        assert peak < 8 * 32 * 2048 * 4


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_rivals_compute_the_loss(shape, both) -> None:
    student, teacher = cases.RSDCase(*shape, both).inputs(torch.float64)
    torch.testing.assert_close(rivals.literal(student, teacher), xdfast.rsd_loss(student, teacher))
    torch.testing.assert_close(
        rivals.lightly_style(student, teacher), xdfast.rsd_loss(student, teacher, eps_mode="var")
    )


def test_the_floor_is_the_two_products() -> None:
    for shape in ((16, 40), (40, 16)):
        s, t = (x.detach() for x in cases.RSDCase(*shape).inputs())
        small, large = torch.empty(16, 16), torch.empty(shape)
        rivals.gemm_floor(s, t, small, large)
        torch.testing.assert_close(large, t @ (t.T @ s), rtol=1e-4, atol=1e-3)


def test_what_autograd_alone_costs_is_a_gradient_like_any_other() -> None:
    wanted = [torch.randn(4, 3, requires_grad=True), torch.randn(4, 5, requires_grad=True)]
    for some in (wanted[:1], wanted):
        backward = rivals.bare_gradient(some)
        found = backward()
        assert len(backward()) == len(found)  # again and again
        assert len(found) == len(some) and all(torch.equal(g, torch.ones_like(x)) for g, x in zip(found, some))


def test_a_wrong_result_gets_no_time() -> None:
    case = cases.RSDCase(16, 24)
    with pytest.raises(RuntimeError, match="broken at 16x24 is off by"):
        rsd.check(case, {"broken": lambda s, t: rivals.literal(s, t) * 1.1}, *case.inputs())


def test_measure_and_its_table(tmp_path, capsys) -> None:
    results = run(shapes=["16x40"], budget=0.05, compiled=False, out=str(tmp_path / "x.json"), device="cpu")
    found = results[0]
    assert found["median_ms"]["literal"] > 0 and found["speedup"]["literal"]["ratio"] > 0
    assert found["backend"] in ("cpp", "torch") and found["rounds"] >= 3  # the least, on a busy machine
    ms = found["median_ms"]
    assert found["limit"]["literal"] == pytest.approx(ms["literal"] / (ms["floor"] + ms[rsd.BARE]))
    assert found["gflop"] == pytest.approx(4 * 16 * 40 * 16 / 1e9)
    assert "16 × 40" in capsys.readouterr().out
    again, about = table.from_benchmark_json(tmp_path / "x.json")
    assert again == json.loads(json.dumps(results)) and about["torch"] == torch.__version__
    assert len(table.rows(again)[0]) == len(table.HEADINGS)


def test_flops_of_both_gradients_take_the_cheaper_form() -> None:
    assert cases.RSDCase(10, 1000, True).flops == 8 * 10**2 * 1000
    assert cases.RSDCase(1000, 10, True).flops == 6 * 1000 * 10**2
    assert cases.RSDCase(10, 1000).flops == 4 * 10**2 * 1000


@pytest.mark.parametrize("text", ["128", "x768", "1x8", "128x0", "a x b"])
def test_shapes_that_cannot_be_read(text) -> None:
    with pytest.raises(ValueError, match="shape must be N and D joined by x.*got"):
        parse_shape(text)


def test_bad_options(tmp_path) -> None:
    with pytest.raises(ValueError, match="budget must be a positive number"):
        run(budget=0)
    with pytest.raises(ValueError, match="no result of the RSD benchmark"):
        (tmp_path / "x.json").write_text("{}")
        table.from_benchmark_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match="must contain .* once, found 0"):
        table.update_readme("nothing here", [])


def test_the_table_in_the_readme_is_the_committed_one() -> None:
    """`make figures` writes it; nobody edits it by hand."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results, _ = table.from_benchmark_json(RESULTS)
    assert table.update_readme(readme, [r for r in results if not r["both"]]) == readme


def test_the_table_of_limits_is_the_committed_one() -> None:
    document = (ROOT / "docs/rsd.md").read_text(encoding="utf-8")
    results, about = table.from_benchmark_json(RESULTS.with_name("rsd_avx2.json"))
    assert about["capability"] == "AVX2"
    student = [r for r in results if not r["both"]]
    assert table.limits(document, student) == document  # if not: make figures
    assert {(r["n"], r["d"]) for r in student} >= set(rsd.MUST_REACH)
    assert max(r["gradient_error"][rsd.OURS] for r in results) < 1e-5


def test_committed_figures_cover_the_promised_shapes_and_are_right() -> None:
    results, _ = table.from_benchmark_json(RESULTS)
    assert {(r["n"], r["d"], r["both"]) for r in results} == {(c.n, c.d, c.both) for c in cases.RSD_CASES}
    for r in results:
        assert max(e for name, e in r["gradient_error"].items() if name in (rsd.OURS, "literal")) < 1e-5
        assert re.fullmatch(r"cpp|torch|triton", r["backend"])
