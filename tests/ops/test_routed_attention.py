"""Attention inside samples: every backend against softmax(q kᵀ) v in float64, values and gradients; bad shapes are told."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_parts import routed_backends
from tolerances import TOLERANCES, relative

import xdfast
from xdfast.ops import routed_attention
from xdfast.ops.routed.reference import attention_reference

backends = pytest.mark.parametrize("backend", routed_backends())


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 5, 17, 130]), min_size=1, max_size=4), kv=st.integers(1, 2),
    groups=st.integers(1, 3), width=st.sampled_from([2, 8, 16, 18]), causal=st.booleans(), packed=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_attention_equals_the_equation(backend, dtype, lengths, kv, groups, width, causal, packed, seed) -> None:
    torch.manual_seed(seed)
    rows, heads = sum(lengths), kv * groups
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    room = rows + 3  # rows that no offset reaches
    qkv = torch.randn(room, heads + 2 * kv, width).to(dtype)
    q, k, v = (t if packed else t.contiguous() for t in qkv.split((heads, kv, kv), 1))
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    with xdfast.backend(backend):
        out = routed_attention(q, k, v, offsets, scale=0.3, causal=causal)
        direction = torch.randn_like(out)
        direction[rows:] = 0
        gradients = torch.autograd.grad(out, (q, k, v), direction)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = attention_reference(*exact, offsets, offsets, 0.3, causal)
    assert out.shape == q.shape and out.is_contiguous() and out.dtype == dtype
    promise = TOLERANCES["routed", dtype]
    assert relative(out[:rows], expected[:rows]) < promise
    wanted = torch.autograd.grad(expected, exact, direction.double())
    scale = max(float(g.norm()) for g in wanted)
    for mine, true in zip(gradients, wanted, strict=True):
        assert float((mine.double() - true).norm()) <= 4 * promise * max(float(true.norm()), 0.2 * scale)
        assert (mine[rows:] == 0).all()


@backends
def test_queries_of_some_rows_see_the_keys_of_all(backend) -> None:
    offsets_q, offsets_k = torch.tensor([0, 2, 2, 5], dtype=torch.int32), torch.tensor([0, 4, 8, 12], dtype=torch.int32)
    q, k, v = torch.randn(5, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    with xdfast.backend(backend):
        out = routed_attention(q, k, v, offsets_q, offsets_k)
    exact = attention_reference(q.double(), k.double(), v.double(), offsets_q, offsets_k, 8**-0.5, False)
    assert relative(out, exact) < TOLERANCES["routed", torch.float32]


@backends
def test_large_scores_do_not_overflow_and_nan_stays_with_its_sample(backend) -> None:
    offsets = torch.tensor([0, 3, 6], dtype=torch.int32)
    q, k, v = torch.randn(6, 1, 8) * 1e3, torch.randn(6, 1, 8) * 1e3, torch.randn(6, 1, 8)
    q[4, 0, 0] = float("nan")
    with xdfast.backend(backend):
        out = routed_attention(q, k, v, offsets)
    assert out[:4].isfinite().all() and out[5].isfinite().all()
    if backend == "cpp":  # torch's own kernel turns such a row into zeros
        assert out[4].isnan().all()
    assert (
        relative(out[:3], attention_reference(q.double(), k.double(), v.double(), offsets, offsets, 8**-0.5, False)[:3])
        < 1e-4
    )


def test_gradients_by_finite_differences_and_torchs_rules() -> None:
    offsets = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    q, k, v = (torch.randn(5, h, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    for causal in (False, True):
        torch.autograd.gradcheck(lambda *t, c=causal: routed_attention(*t, offsets, causal=c), (q, k, v))
    single = tuple(t.detach().float().requires_grad_() for t in (q, k, v))
    torch.library.opcheck(torch.ops.xdfast.routed_attention.default, (*single, offsets, offsets, 0.5, False))
    compiled = torch.compile(lambda *t: routed_attention(*t, offsets), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*single), routed_attention(*single, offsets))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((6, 8), (6, 1, 8), (6, 1, 8)), {}, r"q must be \[rows, heads, width\], got \[6, 8\]"),
        (((6, 3, 8), (6, 2, 8), (6, 2, 8)), {}, "must divide that of q"),
        (((6, 2, 8), (6, 2, 4), (6, 2, 4)), {}, "do not fit"),
        (((6, 2, 8), (6, 2, 8), (5, 2, 8)), {}, "k and v alike"),
    ],
)
def test_what_does_not_fit_is_told(shapes, options, message) -> None:
    offsets = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        routed_attention(*(torch.randn(shape) for shape in shapes), offsets, **options)


def test_causal_attention_to_other_keys_is_refused() -> None:
    q, offsets = torch.randn(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="same rows as queries and keys"):
        routed_attention(q, q, q, offsets, offsets.clone(), causal=True)
    with pytest.raises((ValueError, IndexError, RuntimeError), match="offsets|out of range|exceed|invalid|size"):
        routed_attention(q, q, q, torch.tensor([0, 9], dtype=torch.int32))


@backends
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [[1.0]]}, TypeError, "q must be a floating-point tensor, got list"),
        ({"k": torch.ones(6, 2, 8, device="meta")}, ValueError, "k must be on cpu, got meta"),
        ({"v": torch.ones(6, 2, 8).half()}, TypeError, "must have one dtype, got torch.float32 and torch.float16 of v"),
        (
            {"offsets_q": torch.tensor([0, 6])},
            TypeError,
            r"offsets_q must be an int32 tensor \[B \+ 1\], got torch.int64",
        ),
        ({"offsets_q": torch.zeros(2, dtype=torch.int32, device="meta")}, ValueError, r"on cpu, got \[2\] on meta"),
        ({"offsets_q": torch.tensor([0, 4, 2], dtype=torch.int32)}, ValueError, "must rise from 0 to at most 6 rows"),
        ({"offsets_q": torch.tensor([0, 7], dtype=torch.int32)}, ValueError, "must rise from 0 to at most 6 rows"),
    ],
)
def test_what_belongs_to_another_batch_is_told(backend, change, error, message) -> None:
    """Found by tests/hardening: what was told of them came from torch, and not of what is wrong."""
    good = {name: torch.ones(6, 2, 8) for name in "qkv"} | {"offsets_q": torch.tensor([0, 6], dtype=torch.int32)}
    with xdfast.backend(backend), pytest.raises(error, match=message):
        routed_attention(**{**good, **change})


@backends
def test_no_rows_of_any_strides(backend) -> None:
    """Found by tests/hardening: contiguous() does nothing to a tensor without elements."""
    with xdfast.backend(backend):
        q = torch.ones(0, 2, 16)[..., ::2].requires_grad_()
        out = routed_attention(q, q, q, torch.zeros(3, dtype=torch.int32))
        out.sum().backward()
    assert out.shape == (0, 2, 8) and q.grad.shape == (0, 2, 8)
