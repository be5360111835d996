"""Graph encapsulation: its equation, torch-geometric's GATConv, masks, all layers at once, size, that it learns."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch.nn import functional as F

import xdfast.nn.graph_encapsulation as module
from xdfast.nn import GATLayer, GraphEncapsulation
from xdfast.ops.graph import knn_graph
from xdfast.ops.graph.reference import graph_attention_reference


def small(**options) -> GraphEncapsulation:
    sizes = {"semantic_dim": 10, "hidden": 8, "rank": 3, "k": 4, "heads": 2}
    encapsulation = GraphEncapsulation(12, num_layers=3, chunk=5, action_dim=2, **{**sizes, **options}).double()
    for parameter in encapsulation.parameters():  # nothing at its neutral start
        torch.nn.init.normal_(parameter, std=0.3)
    return encapsulation


def test_examples_in_docstrings_run() -> None:
    failed, tried = doctest.testmod(module)
    assert failed == 0 and tried > 5


# --- one attention layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concat", [False, True])
def test_a_layer_is_that_of_torch_geometric(concat) -> None:
    rival = pytest.importorskip("torch_geometric.nn")
    dim, samples, tokens, k = 32, 3, 20, 8
    ours = GATLayer(dim, heads=4, concat=concat)
    torch.nn.init.normal_(ours.bias)
    theirs = rival.GATConv(dim, dim // 4 if concat else dim, heads=4, concat=concat, add_self_loops=False)
    state = ours.state_dict()
    theirs.load_state_dict({"lin.weight": state.pop("weight"), **state})
    x = torch.randn(samples, tokens, dim, requires_grad=True)
    neighbours = knn_graph(x, x, k)
    senders = (neighbours + tokens * torch.arange(samples)[:, None, None]).flatten()
    receivers = torch.arange(samples * tokens).repeat_interleave(k)
    expected = theirs(x.flatten(0, 1), torch.stack((senders, receivers))).view_as(x)
    actual = ours(x, neighbours)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    names = dict(theirs.named_parameters())
    for a, b in zip(
        torch.autograd.grad(actual.sin().sum(), [x, ours.weight, ours.att_src, ours.att_dst, ours.bias]),
        torch.autograd.grad(
            expected.sin().sum(), [x, names["lin.weight"], *(names[n] for n in ("att_src", "att_dst", "bias"))]
        ),
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums of 480 edges in another order


# --- the whole --------------------------------------------------------------------------------------------------------


def by_hand(m: GraphEncapsulation, hidden: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The class's equations for one layer, token pair by token pair where the class has lists."""
    extractor = m.extractors[0 if m.layers_shared else layer]
    x = F.layer_norm(hidden, (m.dim,)) * m.scale[layer] + m.shift[layer]
    x = x @ extractor.down.weight.T + extractor.down.bias + m.embedding[layer]
    affinity = (x @ extractor.asks.weight.T) @ (x @ extractor.asked.weight.T).mT / extractor.asks.out_features**0.5
    tokens = x.shape[1]
    near = affinity.masked_fill(torch.eye(tokens, dtype=torch.bool), -float("inf")).sort(-1, descending=True)
    neighbours, scores = near.indices[..., : extractor.k], near.values[..., : extractor.k]
    for norm, gat in zip(extractor.norms, extractor.graph):
        values = (norm(x) @ gat.weight.T).unflatten(-1, (gat.heads, -1))
        source, target = (values * gat.att_src).sum(-1), (values * gat.att_dst).sum(-1)
        gathered = graph_attention_reference(values, source, target, neighbours, 0.2, scores)
        x = x + F.elu(gathered.mean(2) + gat.bias)
    y = extractor.norm(x)
    weights = (y @ m.query[layer] / m.hidden**0.5).softmax(-1)
    semantics = extractor.mlp(torch.einsum("bt,btd->bd", weights, y))
    head = m.head
    inner = F.gelu(semantics @ head.weight_in[layer] + head.bias_in[layer])
    actions = inner @ head.weight_out[layer] + head.bias_out[layer]
    return semantics, actions.reshape(-1, m.chunk, m.action_dim)


@pytest.mark.parametrize("layers_shared", [True, False])
def test_forward_is_the_equation_for_one_layer_and_for_all_at_once(layers_shared) -> None:
    encapsulation = small(layers_shared=layers_shared)
    hidden = torch.randn(3, 2, 9, 12, dtype=torch.double)
    semantics, actions = encapsulation(hidden)
    assert semantics.shape == (3, 2, 10) and actions.shape == (3, 2, 5, 2)
    for layer in range(3):
        expected = by_hand(encapsulation, hidden[layer], layer)
        one = encapsulation(hidden[layer], layer)
        last = encapsulation(hidden[layer], layer - 3)
        for got in ((semantics[layer], actions[layer]), one, last):
            torch.testing.assert_close(got[0], expected[0])
            torch.testing.assert_close(got[1], expected[1])


def test_a_padded_sample_is_the_cropped_one_and_padding_is_read_by_nobody() -> None:
    encapsulation = small()
    hidden = torch.randn(3, 3, 9, 12, dtype=torch.double)
    lengths = torch.tensor([9, 4, 1])  # 4: fewer than k others; 1: nobody else
    mask = torch.arange(9) < lengths[:, None]
    padded = hidden.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    semantics, actions = encapsulation(padded, mask=mask)
    for sample, length in enumerate(lengths.tolist()):
        expected = encapsulation(hidden[:, sample, None, :length])
        torch.testing.assert_close(semantics[:, sample], expected[0][:, 0])
        torch.testing.assert_close(actions[:, sample], expected[1][:, 0])
    (semantics.sum() + actions.sum()).backward()
    assert (padded.grad[:, ~mask] == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in encapsulation.parameters())
    nothing = encapsulation(hidden, mask=torch.zeros(3, 9, dtype=torch.bool))
    assert nothing[0].isfinite().all() and nothing[1].isfinite().all()


def test_order_of_tokens_does_not_matter() -> None:
    encapsulation = small()
    hidden, order = torch.randn(3, 2, 9, 12, dtype=torch.double), torch.randperm(9)
    for a, b in zip(encapsulation(hidden), encapsulation(hidden[:, :, order])):
        torch.testing.assert_close(a, b)


def test_every_parameter_and_every_token_has_a_gradient() -> None:
    # the two maps that choose the neighbours as well: choosing has no gradient, their scores have
    encapsulation = GraphEncapsulation(12, num_layers=3, chunk=5, action_dim=2, hidden=8, rank=3, k=4)
    hidden = torch.randn(3, 2, 9, 12, requires_grad=True)
    semantics, actions = encapsulation(hidden)
    (actions.square().sum() + semantics.square().sum()).backward()
    for name, parameter in encapsulation.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    assert (hidden.grad.abs().amax(-1) > 0).all()


def test_gradients() -> None:
    encapsulation = small(semantic_dim=4, hidden=4)
    hidden = torch.randn(2, 5, 12, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: encapsulation(h, 1), (hidden,))


def test_training_and_eval_mode_are_the_same_function() -> None:
    encapsulation, hidden = small(), torch.randn(3, 2, 9, 12, dtype=torch.double)
    for a, b in zip(encapsulation.train()(hidden), encapsulation.eval()(hidden)):
        assert torch.equal(a, b)


def test_half_hidden_states_and_half_parameters() -> None:
    encapsulation = small().float()
    hidden = torch.randn(3, 2, 9, 12).bfloat16()
    expected = encapsulation(hidden.float())
    for a, b in zip(encapsulation(hidden), expected):  # a bfloat16 teacher, heads in float32
        assert torch.equal(a, b) and a.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = encapsulation(hidden)
    for results in (autocast, encapsulation.bfloat16()(hidden * 1e4)):
        # the graph itself may differ where two affinities are within rounding of each other
        assert all(x.isfinite().all() and x.dtype == torch.bfloat16 for x in results)
    # float16 has nothing beyond 65504: hidden states are normalised before they are converted
    assert all(x.isfinite().all() for x in encapsulation.half()(hidden.float() * 1e6))


def test_compiles_into_one_graph() -> None:
    encapsulation = small().float()
    hidden, mask = torch.randn(3, 2, 9, 12), torch.rand(2, 9) < 0.8
    compiled = torch.compile(encapsulation, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(hidden, mask=mask), encapsulation(hidden, mask=mask)):
        torch.testing.assert_close(a, b)
    (compiled(hidden, mask=mask)[1].sum()).backward()
    assert encapsulation.scale.grad.abs().max() > 0


def test_heads_learn_an_action_that_is_in_the_tokens() -> None:
    make = torch.Generator().manual_seed(0)
    encapsulation = GraphEncapsulation(16, num_layers=2, chunk=4, action_dim=2, semantic_dim=32, hidden=32, rank=8)
    optimizer = torch.optim.Adam(encapsulation.parameters(), lr=3e-3)
    to_action = torch.randn(16, 8, generator=make)
    losses = []
    for _ in range(150):
        scene = torch.randn(32, 16, generator=make)  # what all tokens of a sample know a part of
        hidden = torch.randn(2, 32, 12, 16, generator=make) + scene[:, None]
        target = (scene @ to_action / 4).unflatten(1, (4, 2))
        loss = (encapsulation(hidden)[1] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


# --- METHODS.md, section 3, traps -------------------------------------------------------------------------------------


def test_trap_3_large_hidden_states_give_finite_outputs_and_gradients() -> None:
    encapsulation = small().float()
    torch.nn.init.normal_(encapsulation.extractors[0].asks.weight, std=1e3)  # affinities of thousands
    hidden = (torch.randn(3, 2, 40, 12) * 1e4).requires_grad_()
    semantics, actions = encapsulation(hidden)
    assert semantics.isfinite().all() and actions.isfinite().all()
    (semantics.sum() + actions.sum()).backward()
    assert hidden.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in encapsulation.parameters())


def test_trap_5_the_extractor_of_a_7b_model_has_less_than_100_million_parameters() -> None:
    with torch.device("meta"):
        shared = GraphEncapsulation(4096, num_layers=32, chunk=16, action_dim=7)
        apart = GraphEncapsulation(4096, num_layers=32, chunk=16, action_dim=7, layers_shared=False)
    count = sum(parameter.numel() for parameter in shared.parameters())
    assert count == 7_408_384  # 7.4 M in the docstring; the published extractors have 5670 M
    assert count < sum(parameter.numel() for parameter in apart.parameters()) < 100e6
    # what a further layer costs: its scale, shift, embedding, query and action head
    with torch.device("meta"):
        longer = GraphEncapsulation(4096, num_layers=33, chunk=16, action_dim=7)
    own = 2 * 4096 + 2 * 256 + (512 + 1) * 256 + (256 + 1) * 16 * 7
    assert sum(parameter.numel() for parameter in longer.parameters()) - count == own


def test_trap_7_the_whole_chunk_is_predicted_by_every_layer() -> None:
    encapsulation = small()
    hidden = torch.randn(3, 2, 9, 12, dtype=torch.double)
    _, actions = encapsulation(hidden)
    for layer in range(3):
        for step in range(5):
            (grad,) = torch.autograd.grad(
                actions[layer, :, step].sum(), encapsulation.head.weight_out, retain_graph=True
            )
            used = grad.unflatten(-1, (5, 2)).abs().sum((1, 3)) > 0  # [L, H]
            assert used.nonzero().tolist() == [[layer, step]]


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input() -> None:
    for name in ("dim", "num_layers", "chunk", "action_dim", "semantic_dim", "hidden", "rank", "k", "heads"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
            GraphEncapsulation(**{"dim": 8, "num_layers": 2, "chunk": 3, "action_dim": 2, name: 0})
    with pytest.raises(ValueError, match="heads must divide dim to lie side by side, got heads=4 and dim=6"):
        GATLayer(6, 4, concat=True)
    with pytest.raises(ValueError, match=r"tokens of shape \[B, T, 6\], got \[2, 5, 7\]"):
        GATLayer(6)(torch.zeros(2, 5, 7), torch.zeros(2, 5, 2, dtype=torch.int64))
    encapsulation = small().float()
    for shape in ((2, 5, 11), (5, 12), (3, 2, 0, 12)):
        with pytest.raises(ValueError, match=r"hidden must have shape \[B, T, 12\] \(one layer\) or \[3, B, T, 12\]"):
            encapsulation(torch.zeros(shape), 0)
    with pytest.raises(TypeError, match="hidden must be a floating-point tensor, got torch.int64"):
        encapsulation(torch.zeros(2, 5, 12).long(), 0)
    with pytest.raises(ValueError, match=r"expected the hidden states of 3 layers, got \[2, 2, 5, 12\]"):
        encapsulation(torch.zeros(2, 2, 5, 12))
    with pytest.raises(ValueError, match="hidden states of all layers take no layer, got layer=0"):
        encapsulation(torch.zeros(3, 2, 5, 12), 0)
    for layer in (None, 3, -4, 0.5):
        with pytest.raises(ValueError, match=f"need layer in 0 to 2, got layer={layer}"):
            encapsulation(torch.zeros(2, 5, 12), layer)
    with pytest.raises(TypeError, match=r"mask must be bool .* torch.float32; use mask.bool\(\)"):
        encapsulation(torch.zeros(2, 5, 12), 0, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"mask must have shape \[B, T\] = \[2, 5\], got \[5, 2\]"):
        encapsulation(torch.zeros(2, 5, 12), 0, torch.ones(5, 2, dtype=torch.bool))
    hidden = torch.zeros(3, 2, 5, 12)
    hidden[2, 1, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="hidden states of layer 2 hold NaN or infinity"):
        encapsulation(hidden)
