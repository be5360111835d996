"""The routed benchmark: every rival computes what ours does, the sweep runs, its tables say what was reached."""

from __future__ import annotations

import json
import re

import pytest
import torch

from xdfast import cli
from xdfast.bench import routed, routed_rivals, routed_run, routed_table
from xdfast.bench.routed_cases import GATES, SIZES, RoutedCase, build, default_cases
from xdfast.bench.routed_train import training_steps

pytestmark = pytest.mark.usefixtures("one_thread")


SMALL = {"sizes": ("tiny",), "dtype": ("float32",), "device": "cpu", "budget": 0.05, "compiled": False}


def _gates(case: RoutedCase, share: float) -> torch.Tensor:
    return torch.stack(case.gates_at(share))


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_gates_have_the_share_they_are_asked_for(kind, share) -> None:
    batch = 1 if kind == "path" else 8
    case = RoutedCase("S", batch, gates=kind)
    gates, size = _gates(case, share), SIZES["S"]
    assert gates.shape[1:] == ((batch * size.tokens if case.by_token else batch), size.layers)
    assert set(gates.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(gates, _gates(case, share))
    if kind == "exact":
        assert (gates[0].sum(0) == round(share * batch)).all()
    elif case.by_token:
        per_sample = gates[0].view(batch, size.tokens, size.layers).sum(1)
        assert (per_sample == round(share * size.tokens)).all()
    else:
        assert abs(float(gates.mean()) - share) < 0.25
    assert not 0 < share < 1 or len(gates[0].T.unique(dim=0)) > 1 or batch == 1


def test_clustered_tokens_come_in_runs_and_a_path_seldom_changes() -> None:
    changes = {}
    for kind in ("tokens", "clustered"):
        gates = _gates(RoutedCase("S", 8, gates=kind), 0.25)[0].view(8, 197, 6)
        changes[kind] = float(gates.diff(dim=1).abs().mean())
    assert changes["clustered"] < changes["tokens"] / 3
    path = _gates(RoutedCase("S", 1, gates="path"), 0.5)[:, 0]
    assert float(path.diff(dim=0).abs().mean()) < 0.2 < 0.5
    assert _gates(RoutedCase("S", 1), 0.5).sum() == 3  # exact, one sample: that share of the layers


_CASES = [
    RoutedCase("tiny", 3, shares=(1.0, 0.4, 0.0)),
    RoutedCase("tiny", 1, gates="path", shares=(0.5,)),
    RoutedCase("tiny", 3, gates="bernoulli", shares=(0.5,)),
    RoutedCase("tiny", 3, gates="tokens", keys="active", shares=(0.5,)),
    RoutedCase("tiny", 3, gates="clustered", keys="all", shares=(0.5,)),
    RoutedCase("llama-tiny", 3, shares=(0.4,)),
]


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_every_rival_computes_what_ours_does(case) -> None:
    stack, x = build(case), case.input()
    with torch.no_grad():
        timed = routed.candidates(case, stack, x, compiled=False)
        errors = routed.check(case, stack, x, timed)
        for share in case.shares:
            end = f" @ {share:g}"
            results = {name: run() for name, run in timed.items() if name.endswith(end)}
            assert f"{routed.OURS}{end}" in results and f"torch-only @ {case.middle:g}" in timed
            for name, found in results.items():
                torch.testing.assert_close(found, results[f"{routed.OURS}{end}"], rtol=1e-4, atol=1e-4, msg=name)
            if share == 1:
                torch.testing.assert_close(results[f"{routed.OURS}{end}"], timed["eager"](), rtol=1e-4, atol=1e-4)
    assert max(errors.values()) < 1e-4 and "eager" in errors
    loops = case.keys == "active" or not case.by_token
    assert (f"loop @ {case.middle:g}" in timed) == loops


def test_a_wrong_result_gets_no_time() -> None:
    case = RoutedCase("tiny", 2, shares=(0.5,))
    stack, x = build(case), case.input()
    with torch.no_grad(), pytest.raises(RuntimeError, match="loop @ 0.5 of tiny B=2 .* is off by"):
        routed.check(case, stack, x, {"loop @ 0.5": lambda: x})


def test_a_loop_leaves_its_input_alone() -> None:
    case = RoutedCase("tiny", 3)
    stack, x = build(case), case.input()
    before = x.clone()
    gates = case.gates_at(0.4)[0]
    with torch.no_grad():
        for way in (
            routed_rivals.per_layer_loop(stack),
            routed_rivals.index_add(stack),
            routed_rivals.mask_multiply(stack),
        ):
            way(x, gates)
    assert torch.equal(x, before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, product", [("bfloat16", "mkldnn::_linear_pointwise"), ("float32", "mkl::_mkl_linear")])
def test_the_compiled_stack_is_the_dense_one_with_frozen_weights(dtype, product) -> None:
    case = RoutedCase("tiny", 2, dtype, shares=(1.0,))
    stack, x = build(case), case.input()
    with torch.no_grad():
        compiled, eager = routed_rivals.compiled_dense(stack, x), routed_rivals.dense(stack)
        error = (compiled(x) - eager(x)).abs().max() / eager(x).abs().max()
        with torch.profiler.profile() as profile:
            compiled(x)
    assert float(error) < (1e-4 if dtype == "float32" else 5e-2)
    names = {event.name for event in profile.events()}
    assert "aten::addmm" not in names and (product in names or "mkldnn::_linear_pointwise" in names)


def test_training_steps_have_the_same_gradients() -> None:
    case = RoutedCase("tiny", 4, shares=(1.0, 0.5), train=True)
    timed, parameters = training_steps(case, compiled=False), len(list(build(case).parameters()))
    assert set(timed) == {"eager", "xdfast @ 1", "xdfast @ 0.5", "mask-multiply @ 0.5"}
    for ours, theirs in (("xdfast @ 1", "eager"), ("xdfast @ 0.5", "mask-multiply @ 0.5")):
        found, expected = timed[ours](), timed[theirs]()
        for number, (a, b) in enumerate(zip(found, expected, strict=False)):
            if number < parameters:  # gates of what did not run have no gradient in ours
                zero = torch.zeros(()) if a is None else a
                torch.testing.assert_close(zero.expand_as(b), b, rtol=1e-3, atol=1e-3)


def test_the_sweep_its_file_and_its_tables(tmp_path, capsys) -> None:
    out = tmp_path / "routed.json"
    found = routed_run.run(**SMALL, batch=(2,), shares=(1.0, 0.5, 0.0), out=str(out))
    [result] = found
    assert [row["share"] for row in result["shares"]] == [1.0, 0.5, 0.0]
    full, half, nothing = result["shares"]
    assert half["speedup"]["loop"]["ratio"] > 0 and half["ideal"] == pytest.approx(2) and nothing["ideal"] is None
    assert (
        full["flops"]["dense"]
        == full["flops"]["executed"]
        == 2 * half["flops"]["executed"]
        > nothing["flops"]["executed"]
        == 0
    )
    expected = half["speedup"]["eager"]["ratio"] / 2
    assert half["fraction_of_ideal"] == pytest.approx(expected) and result["error"]["xdfast @ 0.5"] < 1e-4
    assert {"plan", "router", "eager"} <= set(result["median_ms"]) and result["peak_mb"]["xdfast"] > 0
    assert result["targets"] == [] and result["rounds"] >= 5
    said = capsys.readouterr().out
    assert "tiny B=2 float32 exact" in said and "written to" in said
    again, machine = routed_table.load(out)
    assert again == json.loads(json.dumps(found)) and machine["torch"] == torch.__version__ and "malloc" in machine
    assert {len(row) for row in routed_table.rows(again[0])} == {len(routed_table.SHORT_HEADINGS)}
    table = routed_table.markdown(again)
    assert len(table.splitlines()) == 2 + 3 and "tiny fp32 B=2 | 0.5 |" in table
    document = "a\n<!-- bench:routed -->\nold\n<!-- /bench:routed -->\nb\n"
    (tmp_path / "doc.md").write_text(document)
    assert routed_table.main([str(tmp_path / "doc.md"), str(out)]) == 0
    assert (tmp_path / "doc.md").read_text() == document.replace("old", table)
    short = routed_table.markdown(again, ["exact", "0.5"]).splitlines()
    assert len(short) == 2 + 1 and short[2].startswith("| tiny fp32 B=2 | 0.5 |") and "plain torch" not in short[0]
    assert len(routed_table.markdown(again, ["bernoulli"]).splitlines()) == 2


def test_a_training_case_and_tokens_print_too(capsys) -> None:
    [trained] = routed_run.run(**SMALL, batch=(2,), train=True)
    assert trained["train"] and trained["shares"][0]["speedup"]["mask-multiply"]["ratio"] > 0
    [tokens] = routed_run.run(**SMALL, batch=(2,), gates=("clustered",), keys="all", shares=(0.5,))
    half = tokens["shares"][0]["flops"]
    assert half["nominal"] < half["executed"] < half["dense"]
    assert "training" in capsys.readouterr().out
    assert len(routed_table.markdown([trained, tokens]).splitlines()) == 4


def test_cases_measured_before_an_interruption_stay(tmp_path, monkeypatch, capsys) -> None:
    true = routed_run.measure

    def second_is_interrupted(case, **options):
        if case.batch == 3:
            raise KeyboardInterrupt
        return true(case, **options)

    monkeypatch.setattr(routed_run, "measure", second_is_interrupted)
    out = tmp_path / "routed.json"
    with pytest.raises(KeyboardInterrupt):
        routed_run.run(**SMALL, batch=(2, 3), shares=(0.5,), out=str(out))
    results, _ = routed_table.load(out)
    assert [r["batch"] for r in results] == [2] and "tiny B=2" in capsys.readouterr().out


def _row(share: float, **ratios: float) -> dict:
    speedup = {name: {"ratio": ratio, "quartile_low": ratio, "quartile_high": ratio} for name, ratio in ratios.items()}
    shared = {"share": share, "speedup": speedup, "ours": "xdfast", "median_ms": 10.0}
    return {**shared, "ideal": 1 / share, "fraction_of_ideal": ratios["eager"] * share}


def test_targets_are_marked(capsys) -> None:
    result = {
        "case": "S B=16 bfloat16 exact", "size": "S", "batch": 16, "dtype": "bfloat16", "gates": "exact", "train": False,
        "keys": "all", "device": "cpu", "peak_mb": {"eager": 5.0, "xdfast": 2.0}, "median_ms": {"eager": 21.0},
        "shares": [_row(1.0, eager=1.2, compiled=0.97), _row(0.5, eager=2.1, compiled=1.6, loop=1.3), _row(0.25, eager=3.2)],
    }  # fmt: skip
    result["targets"] = routed.targets(result)
    found = {(t["share"], t["rival"]): t["met"] for t in result["targets"]}
    assert found == {
        (1.0, "strongest dense"): True,
        (0.5, "eager"): True,
        (0.5, "compiled"): False,
        (0.5, "loop"): True,
        (0.25, "eager"): True,
    }
    half = routed_table.rows(result)[1]
    assert half[3] == "2.10 ✓" and half[4] == "1.60 ✗" and half[-2:] == ["2.00", "5.00"]
    assert routed_table.marked([result]) == (4, 5)
    lines = routed_table.target_lines([result])
    assert any(line.startswith("missed") and "1.60 × compiled, target 1.7" in line for line in lines)
    assert "✓" not in routed_table.markdown([result]) and "ViT-S bf16 B=16 | 0.5 |" in routed_table.markdown([result])
    on_gpu = routed.targets({**result, "device": "cuda"})
    assert [(t["rival"], t["target"]) for t in on_gpu] == [("strongest dense", 0.95), ("loop", 2.0)]
    assert routed.targets({**result, "batch": 4}) == [] == routed.targets({**result, "gates": "bernoulli"})


def test_the_default_cases_hold_every_promise() -> None:
    cases = default_cases("cpu")
    promised = {(c.size, c.dtype) for c in cases if c.batch == 16 and c.gates == "exact" and not c.train}
    assert promised == set(routed.MUST_REACH) and len({str(c) for c in cases}) == len(cases)
    assert any(c.train for c in cases) and {c.gates for c in cases} >= {"exact", "path", "bernoulli", "clustered"}
    on_gpu = default_cases("cuda")
    assert {c.batch for c in on_gpu} == {1, 4, 16, 64}
    kind = {1: "path"}
    held = {(c.size, c.batch): c for c in on_gpu if c.gates == kind.get(c.batch, "exact") and not c.train}
    for case, promises in routed.CUDA_MUST_REACH.items():
        assert held[case].dtype == "bfloat16" and set(promises) <= set(held[case].shares)
    result = {"size": "vla-7b", "dtype": "bfloat16", "device": "cuda", "batch": 1, "gates": "path", "train": False}
    result["shares"] = [_row(0.5, eager=1.8)]
    assert [(t["rival"], t["target"], t["met"]) for t in routed.targets(result)] == [("eager", 1.75, True)]
    one = {
        **result,
        "size": "B",
        "batch": 64,
        "gates": "exact",
        "shares": [_row(0.5, **{"eager": 4.0, "eager graph": 2.0, "compiled graph": 1.7})],
    }
    assert [(t["rival"], t["figure"], t["met"]) for t in routed.targets(one)] == [("graphed dense", 1.7, True)]
    alone = {**one, "batch": 1, "shares": [{**_row(1.0, eager=1.1), "median_ms": 18.0}, _row(0.5, eager=2.0)]}
    path = {**alone, "size": "B", "gates": "path"}
    assert [(t["rival"], t["figure"], t["met"]) for t in routed.targets(path)] == [("all active", 1.8, True)]
    assert routed.targets({**one, "dtype": "float16"}) == [] == routed.targets({**one, "gates": "tokens"})
    assert {c.shares for c in default_cases("cpu", (0.5,))} == {(0.5,)}


def test_the_slowest_twentieth() -> None:
    assert routed.p95([float(i) for i in range(1, 102)]) == 96.0 and routed.p95([2.0, 2.0]) == 2.0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shares", "1", "1.5"], "shares are active fractions in [0, 1]"),
        (["--sizes", "tinny"], "unknown size 'tinny'.*Did you mean 'tiny'"),
        (["--dtype", "bf16"], "unknown dtype 'bf16'"),
        (["--gates", "exakt"], "unknown gates 'exakt'"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--gates", "path", "--batch", "4"], "batch must be 1, got 4"),
        (["--sizes", "llama", "--gates", "tokens"], "attends causally"),
        (["--keys", "some"], "keys must be all or active"),
        (["--budget", "0"], "budget must be a positive number"),
    ],
)
def test_options_that_cannot_be(arguments, message, capsys) -> None:
    assert cli.main(["bench", "routed", "--device", "cpu", *arguments]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(message if ".*" in message else re.escape(message), said)


def test_routed_comes_before_its_options(capsys) -> None:
    assert cli.main(["bench", "--device", "cpu", "routed"]) == 1
    assert "routed comes first" in capsys.readouterr().err


def test_files_and_documents_that_are_something_else(tmp_path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="no result of the routed benchmark"):
        routed_table.load(tmp_path / "x.json")
    with pytest.raises(ValueError, match="must contain .* once, found 0"):
        routed_table.update("nothing", [])
    with pytest.raises(TypeError, match="unknown options"):
        routed_run.run(size="S")
