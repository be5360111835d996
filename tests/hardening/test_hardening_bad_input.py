"""Every tensor of every public loss and op made wrong in every way: an error of ours that names it, or no number at all."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hardening_bad import WRONG, outcome
from hardening_losses import LOSSES
from hardening_ops import OPS
from hardening_tally import LONG, count, examples
from hypothesis import given

SUBJECTS = {**LOSSES, **OPS}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.timeout(3600)
@examples(1, 3)
@given(data=st.data())
def test_bad_input(name, data) -> None:
    case = SUBJECTS[name](data.draw)
    tensors = list(case.tensors) if LONG else [data.draw(st.sampled_from(list(case.tensors)))]
    for tensor in tensors:
        for what in WRONG if LONG else (data.draw(st.sampled_from(list(WRONG))),):
            found = outcome(name, case, tensor, what)
            if found is not None:
                count("bad input", what, found)
