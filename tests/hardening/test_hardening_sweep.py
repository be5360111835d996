"""Every public loss and op against its equation in float64, over drawn shapes, dtypes, strides and options.

Each case: value and gradients are finite and those of the equation; what the maths promises to leave alone is left alone;
expanded tensors are read as their copies; a teacher gets no gradient and its asking for one changes nothing; finite
differences on small ones; poor but finite input has finite results.
"""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hardening_cases import (
    DEGENERATE,
    DTYPES,
    LAYOUTS,
    check_degenerate,
    check_detached,
    check_expanded,
    check_gradcheck,
    check_same,
    check_truth,
)
from hardening_losses import LOSSES
from hardening_ops import OPS
from hardening_tally import count, examples
from hypothesis import given, note

import xdfast

pytestmark = pytest.mark.usefixtures("one_thread")


def _sweep(part: str, name: str, subject, data: st.DataObject) -> None:
    case = subject(data.draw)
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS))
    poor, poor_dtype = data.draw(st.sampled_from(DEGENERATE)), data.draw(st.sampled_from(DTYPES[:2]))
    note(f"{name}: { {n: list(t.shape) for n, t in case.tensors.items()} }, {dtype}, {layout}")
    check_truth(case, dtype, layout)
    looked = check_same(case)
    check_expanded(case)
    check_detached(case)
    differences = check_gradcheck(case)
    check_degenerate(case, poor, poor_dtype)
    count(part, name, f"{str(dtype).removeprefix('torch.')}")
    for what in looked:
        count(f"{part}: promises", what)
    if differences:
        count(f"{part}: promises", "finite differences")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.timeout(3600)
@examples(2, 50)
@given(data=st.data())
def test_losses(name, data) -> None:
    _sweep("losses", name, LOSSES[name], data)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.timeout(3600)
@examples(2, 50)
@given(data=st.data())
def test_ops(name, data) -> None:
    _sweep("ops", name, OPS[name], data)


def test_no_public_loss_or_op_is_left_out() -> None:
    assert set(xdfast.list_losses()) <= set(LOSSES)
    public = {name for name in xdfast.ops.__all__ if callable(getattr(xdfast.ops, name))}
    no_ops = {"RouteList", "RoutePlan", "backend", "explain"}
    assert {name.partition(",")[0] for name in OPS} >= public - no_ops
    registered = {
        name.split("::")[1].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("xdfast::")
    }
    from hardening_ops import REGISTERED

    assert registered <= set(REGISTERED), f"no case of torch.ops.xdfast.{registered - set(REGISTERED)}"
