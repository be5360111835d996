"""Graphs of tokens: neighbours and attention against their definition, padding, gradients, METHODS.md's third trap."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative

import xdfast.ops.graph as graph
from xdfast.ops.graph import edge_affinity, graph_attention, knn_graph
from xdfast.ops.graph.reference import graph_attention_reference, knn_graph_reference


def parts(samples=2, tokens=11, heads=3, width=4, k=5, dtype=torch.double):
    """(values, source scores, target scores, neighbours)"""
    values = torch.randn(samples, tokens, heads, width, dtype=dtype)
    source, target = torch.randn(2, samples, tokens, heads, dtype=dtype)
    queries, keys = torch.randn(2, samples, tokens, 3, dtype=torch.double)
    return values, source, target, knn_graph(queries, keys, k)


def test_examples_in_docstrings_run() -> None:
    failed, tried = doctest.testmod(graph)
    assert failed == 0 and tried > 5


# --- neighbours -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(1, 3), tokens=st.integers(1, 12), rank=st.integers(1, 4), k=st.integers(1, 15),
    padded=st.booleans(), self_loops=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_neighbours_are_those_of_the_definition(samples, tokens, rank, k, padded, self_loops, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, keys = torch.randn(2, samples, tokens, rank, dtype=torch.double, generator=generator)
    mask = torch.rand(samples, tokens, generator=generator) < 0.6 if padded else None
    found = knn_graph(queries, keys, k, mask, self_loops=self_loops)
    expected = knn_graph_reference(queries, keys, k, mask, self_loops)
    assert found.shape == (samples, tokens, k) and found.dtype == torch.int64
    real = torch.ones(samples, tokens, dtype=torch.bool) if mask is None else mask
    assert torch.equal(found[real], expected[real])
    # rows of padding mean nothing, but they list nobody that is not there
    listed = found[found >= 0]
    assert (listed < tokens).all()
    if mask is not None:
        samples_of = torch.arange(samples)[:, None, None].expand_as(found)[found >= 0]
        assert mask[samples_of, listed].all()


def test_a_padded_sample_has_the_graph_of_the_cropped_one() -> None:
    queries, keys = torch.randn(2, 3, 10, 4)
    lengths = torch.tensor([10, 6, 1])
    mask = torch.arange(10) < lengths[:, None]
    queries[~mask] = keys[~mask] = float("nan")
    found = knn_graph(queries, keys, 7, mask)
    for sample, length in enumerate(lengths.tolist()):
        cropped = knn_graph(queries[sample, None, :length], keys[sample, None, :length], 7)
        assert torch.equal(found[sample, :length], cropped[0])
    assert (found[1, :6] >= 0).sum(-1).tolist() == [5] * 6
    assert found[2, 0].tolist() == [0] + [-1] * 6  # alone: its own neighbour


def test_fewer_tokens_than_neighbours_leaves_places_to_nobody() -> None:
    x = torch.tensor([[[3.0], [2.0], [1.0]]])
    assert knn_graph(x, x, 4).tolist() == [[[1, 2, -1, -1], [0, 2, -1, -1], [0, 1, -1, -1]]]
    assert knn_graph(x, x, 4, self_loops=True).tolist() == [[[0, 1, 2, -1]] * 3]
    assert knn_graph(x, x, 2, torch.zeros(1, 3, dtype=torch.bool)).tolist() == [[[-1, -1]] * 3]  # all padding: no edges


def test_half_inputs_and_autocast_choose_by_float32_affinities() -> None:
    queries, keys = torch.randn(2, 2, 40, 16).bfloat16()
    expected = knn_graph(queries.double(), keys.double(), 8)
    assert torch.equal(knn_graph(queries, keys, 8), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(knn_graph(queries.float(), keys.float(), 8), expected)
        assert edge_affinity(queries, keys, expected).dtype == torch.float32


def test_affinities_of_edges_and_their_gradients() -> None:
    queries, keys = torch.randn(2, 2, 6, 3, dtype=torch.double, requires_grad=True).unbind()
    neighbours = knn_graph(queries, keys, 8)  # three places are nobody's
    assert not neighbours.requires_grad
    scores = edge_affinity(queries, keys, neighbours)
    for b, i, place in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(8)).tolist():
        j = int(neighbours[b, i, place])
        expected = queries[b, i] @ keys[b, j] if j >= 0 else torch.tensor(0.0, dtype=torch.double)
        torch.testing.assert_close(scores[b, i, place], expected)
    inputs = [x.detach().requires_grad_() for x in (queries, keys)]
    assert torch.autograd.gradcheck(lambda q, k: edge_affinity(q, k, neighbours), inputs)


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 14])  # 14: places of nobody
@pytest.mark.parametrize("with_edges", [False, True])
def test_attention_is_the_equation(k, with_edges) -> None:
    values, source, target, neighbours = parts(k=k)
    edges = torch.randn(neighbours.shape, dtype=torch.double) if with_edges else None
    actual = graph_attention(values, source, target, neighbours, 0.3, edges)
    expected = graph_attention_reference(values, source, target, neighbours, 0.3, edges)
    assert relative(actual, expected) < 1e-12  # rounding
    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1.5e-3)):  # as "routed"
        rounded = [x.to(dtype) for x in (values, source, target)]
        actual = graph_attention(*rounded, neighbours, 0.3, None if edges is None else edges.float())
        assert actual.dtype == dtype
        expected = graph_attention_reference(*(x.double() for x in rounded), neighbours, 0.3, edges)
        assert relative(actual, expected) < bound


def test_repeated_neighbours_count_as_often_as_they_are_listed() -> None:
    values, source, target, neighbours = parts()
    neighbours[:, :, 2] = neighbours[:, :, 0]
    edges = torch.randn(neighbours.shape, dtype=torch.double)
    for scores in (None, edges):
        actual = graph_attention(values, source, target, neighbours, edge_scores=scores)
        expected = graph_attention_reference(values, source, target, neighbours, edge_scores=scores)
        assert relative(actual, expected) < 1e-12


def test_gradients_of_attention() -> None:
    values, source, target, neighbours = parts(tokens=6, k=7)
    edges = torch.randn(neighbours.shape, dtype=torch.double)
    inputs = [x.requires_grad_() for x in (values, source, target, edges)]
    assert torch.autograd.gradcheck(lambda v, s, t, e: graph_attention(v, s, t, neighbours, 0.2, e), inputs)


def test_both_ways_of_summing_agree() -> None:
    # bags of rows on the CPU, a product elsewhere and for half
    values, source, target, neighbours = parts(k=14)
    results = []
    for way in (graph._sum_bags, graph._sum_dense):
        inputs = [x.detach().clone().requires_grad_() for x in (values, source, target)]
        weights, listed = graph._edge_weights(inputs[1], inputs[2], neighbours, 0.2, None)
        out = way(inputs[0], weights, listed)
        results.append((out, *torch.autograd.grad(out.sin().sum(), inputs)))
    for bags, dense in zip(*results):
        assert relative(bags, dense) < 1e-12


def test_views_and_one_sample_of_one_token() -> None:
    values, source, target, neighbours = parts()
    strided = graph_attention(
        values.transpose(1, 2).contiguous().transpose(1, 2), source.mT.contiguous().mT, target, neighbours
    )
    assert torch.equal(strided, graph_attention(values, source, target, neighbours))
    one = torch.randn(1, 1, 2, 3)
    scores = torch.randn(1, 1, 2)
    torch.testing.assert_close(graph_attention(one, scores, scores, knn_graph(scores, scores, 3)), one)


def test_compiles_into_one_graph() -> None:
    def layer(values, source, target, queries, keys):
        neighbours = knn_graph(queries, keys, 4)
        return graph_attention(values, source, target, neighbours, edge_scores=edge_affinity(queries, keys, neighbours))

    inputs = [x.float().requires_grad_() for x in parts()[:3]] + [
        torch.randn(2, 11, 3).requires_grad_() for _ in range(2)
    ]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*inputs), layer(*inputs)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(a, b)


def test_no_look_at_values_where_looking_waits() -> None:
    # a meta tensor has no values: any look would raise, as it would wait on a GPU
    x = torch.empty(2, 5, 3, device="meta")
    neighbours = knn_graph(x, x, 8, torch.empty(2, 5, dtype=torch.bool, device="meta"))
    assert neighbours.shape == (2, 5, 8) and edge_affinity(x, x, neighbours).shape == (2, 5, 8)
    values = torch.empty(2, 5, 3, 4, device="meta")
    assert graph_attention(values, x, x, neighbours).shape == values.shape


# --- METHODS.md, section 3, trap 3 ------------------------------------------------------------------------------------


def test_trap_3_exp_of_affinities_does_not_overflow() -> None:
    queries, keys = (torch.randn(2, 30, 8) * 100 for _ in range(2))
    neighbours = knn_graph(queries, keys, 8)
    edges = edge_affinity(queries, keys, neighbours)
    assert edges.max() > 1e4 and edges.exp().isinf().any()  # what the public code sums
    values = torch.randn(2, 30, 4, 5).requires_grad_()
    source, target = (torch.randn(2, 2, 30, 4) * 1e4).requires_grad_().unbind()
    for edge_scores in (None, edges):
        for way in (1, -1):
            out = graph_attention(values, way * source, way * target, neighbours, edge_scores=edge_scores)
            assert out.isfinite().all()
            # a mean of values, with weights of sum 1
            ones = graph_attention(torch.ones_like(values), source, target, neighbours, edge_scores=edge_scores)
            torch.testing.assert_close(ones, torch.ones_like(ones))
            assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (values, source, target)))
    # float16 ends at 65504
    half = graph_attention(values.half(), source.half(), target.half(), neighbours)
    assert half.isfinite().all()


def test_trap_3_no_token_is_without_messages() -> None:
    # Nine tokens that everybody is nearest to: with edges from a token to its nearest, the others would receive nothing.
    tokens = torch.randn(1, 576, 16) * 0.1 + 1
    tokens[0, :9] *= 5
    neighbours = knn_graph(tokens, tokens, 8)
    receives_if_reversed = torch.zeros(576, dtype=torch.bool)
    receives_if_reversed[neighbours.flatten()] = True
    assert (~receives_if_reversed).sum() > 480
    assert (neighbours >= 0).all() and (neighbours != torch.arange(576)[:, None]).all()  # degree 8, not itself
    out = graph_attention(torch.ones(1, 576, 2, 3), torch.randn(1, 576, 2), torch.randn(1, 576, 2), neighbours)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_trap_3_a_token_gathers_from_those_it_lists() -> None:
    values, source, target, _ = parts(samples=1, tokens=4)
    neighbours = torch.tensor([[[1], [2], [3], [1]]])  # nobody lists token 0; 0 and 3 list 1
    before = graph_attention(values, source, target, neighbours)
    torch.testing.assert_close(before, values[:, [1, 2, 3, 1]])
    values[0, 1] += 1
    changed = (graph_attention(values, source, target, neighbours) != before).flatten(2).any(-1)
    assert changed.tolist() == [[True, False, False, True]]
    # the sender's score is that of the neighbour: raising it draws weight to it, raising the receiver's does not
    neighbours = torch.tensor([[[1, 2], [2, 3], [3, 1], [1, 2]]])
    raised = source.clone()
    raised[0, 2] = 1e4
    out = graph_attention(values, raised, target, neighbours)
    torch.testing.assert_close(out[:, [0, 1, 3]], values[:, [2, 2, 2]])


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be a positive integer .* got 0"),
        ({"k": 2.0}, ValueError, "k must be a positive integer .* got 2.0"),
        (
            {"queries": torch.zeros(2, 5)},
            ValueError,
            r"queries must have shape \[B, T, R\] and not be empty, got \[2, 5\]",
        ),
        ({"keys": torch.zeros(2, 0, 3)}, ValueError, r"keys must have shape .* got \[2, 0, 3\]"),
        (
            {"keys": torch.zeros(2, 5, 4)},
            ValueError,
            r"same shape, got \[2, 5, 3\] and \[2, 5, 4\]; both are projections",
        ),
        (
            {"queries": torch.zeros(2, 5, 3, dtype=torch.int)},
            TypeError,
            "queries must be a floating-point .* got torch.int32",
        ),
        ({"queries": [1.0]}, TypeError, "queries must be a floating-point .* got list"),
        ({"mask": torch.ones(2, 5)}, TypeError, r"mask must be a bool tensor .* got torch.float32; use mask.bool\(\)"),
        (
            {"mask": torch.ones(5, 2, dtype=torch.bool)},
            ValueError,
            r"mask must have shape \[B, T\] = \[2, 5\], got \[5, 2\]",
        ),
        ({"queries": torch.full((2, 5, 3), float("nan"))}, ValueError, "queries must be finite: 10 tokens hold NaN"),
    ],
)
def test_a_graph_that_cannot_be_is_told(change, error, message) -> None:
    with pytest.raises(error, match=message):
        knn_graph(**{"queries": torch.zeros(2, 5, 3), "keys": torch.zeros(2, 5, 3), "k": 2, **change})


def test_the_first_bad_token_is_named() -> None:
    keys = torch.zeros(2, 5, 3)
    keys[1, 3, 0] = float("inf")
    with pytest.raises(ValueError, match="keys must be finite: 1 tokens hold .* token 3 of sample 1; .* mask padding"):
        knn_graph(torch.zeros(2, 5, 3), keys, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"values": torch.zeros(2, 5, 3)}, ValueError, r"values must have shape \[B, T, H, C\] .* got \[2, 5, 3\]"),
        (
            {"source_scores": torch.zeros(2, 5, 4)},
            ValueError,
            r"source_scores must have shape \[B, T, H\] = \[2, 5, 3\]",
        ),
        ({"target_scores": torch.zeros(2, 3, 5)}, ValueError, r"target_scores must .* got \[2, 3, 5\]"),
        ({"neighbours": torch.zeros(2, 5, 2)}, TypeError, "neighbours must be an int64 tensor .* got torch.float32"),
        ({"neighbours": torch.zeros(2, 4, 2).long()}, ValueError, r"with B=2, T=5 and k ≥ 1, got \[2, 4, 2\]"),
        ({"neighbours": torch.full((2, 5, 2), 5)}, ValueError, "tokens 0 to 4, or -1 for nobody, got 5 to 5"),
        ({"neighbours": torch.full((2, 5, 2), -2)}, ValueError, "got -2 to -2"),
        ({"slope": -0.1}, ValueError, "slope must be finite and ≥ 0"),
        ({"edge_scores": torch.zeros(2, 5, 3)}, ValueError, r"shape of the neighbours, \[2, 5, 2\], got \[2, 5, 3\]"),
        ({"target_scores": torch.zeros(2, 5, 3, device="meta")}, ValueError, "target_scores must be on cpu"),
    ],
)
def test_attention_that_cannot_be_is_told(change, error, message) -> None:
    good = {
        "values": torch.zeros(2, 5, 3, 4), "source_scores": torch.zeros(2, 5, 3), "target_scores": torch.zeros(2, 5, 3),
        "neighbours": torch.zeros(2, 5, 2, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        graph_attention(**{**good, **change})
