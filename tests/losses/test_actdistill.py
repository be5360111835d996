"""ActDistill's loss: its equation by plain loops, weights, what carries a gradient, masks, precision, bad input."""

from __future__ import annotations

import doctest
import math

import pytest
import torch

import xdfast.losses.actdistill as module
from xdfast.losses import ActDistillLoss, stage1_loss

L, B, S, H, A = 4, 5, 6, 7, 3


def inputs(dtype=torch.double, layers=L, samples=B) -> list[torch.Tensor]:
    """semantics, actions, the teacher's, target"""
    semantics, teacher_semantics = torch.randn(2, layers, samples, S, dtype=dtype)
    actions, teacher_actions = torch.randn(2, layers, samples, H, A, dtype=dtype)
    return [semantics, actions, teacher_semantics, teacher_actions, torch.randn(samples, H, A, dtype=dtype)]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def by_hand(values, gamma, alpha, beta, eta, mask=None) -> tuple[list[float], list[float]]:
    """(w_l, L_l) by loops over Python numbers."""
    semantics, actions, teacher_semantics, teacher_actions, target = (x.double().tolist() for x in values)
    layers, samples = len(semantics), len(target)
    raw = [(layer / (layers - 1)) ** gamma for layer in range(layers)] if layers > 1 else [1.0]
    weights = [w * layers / sum(raw) for w in raw]
    real = [(b, h) for b in range(samples) for h in range(H) if mask is None or mask[b][h]]

    def mse(one, other) -> float:
        squares = [(one[b][h][a] - other[b][h][a]) ** 2 for b, h in real for a in range(A)]
        return sum(squares) / len(squares)

    losses = []
    for layer in range(layers):
        s, t = semantics[layer], teacher_semantics[layer]
        aligned = sum(1 - cosine(s[b], t[b]) for b in range(samples)) / samples
        related = 0.0
        for b in range(samples):
            for c in range(samples):
                related += (cosine(s[b], s[c]) - cosine(t[b], t[c])) ** 2 / samples**2
        acted = mse(actions[layer], target) + mse(actions[layer], teacher_actions[layer])
        if layer > 0:
            acted += mse(actions[layer], actions[layer - 1])
        losses.append(alpha * (aligned + eta * related) + beta * acted)
    return weights, losses


def test_examples_in_docstrings_run() -> None:
    failed, tried = doctest.testmod(module)
    assert failed == 0 and tried > 5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("gamma", "alpha", "beta", "eta"), [(2.0, 1.0, 1.0, 0.5), (0.0, 0.3, 2.0, 1.5), (1.5, 0.0, 1.0, 0.5), (1, 1, 0, 0)]
)
def test_loss_is_the_equation(gamma, alpha, beta, eta, masked) -> None:
    values = inputs()
    mask = torch.rand(B, H) < 0.7 if masked else None
    weights, losses = by_hand(values, gamma, alpha, beta, eta, None if mask is None else mask.tolist())
    weighted = [w * loss for w, loss in zip(weights, losses)]
    for reduction, expected in (("mean", sum(weighted) / L), ("sum", sum(weighted)), ("none", weighted)):
        actual = ActDistillLoss(L, gamma, alpha, beta, eta, reduction)(*values, mask=mask)
        expected = torch.tensor(expected, dtype=torch.double)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)  # the weights are float32


def test_weights_grow_with_depth_and_have_mean_1() -> None:
    weights = ActDistillLoss(6).weights
    expected = torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0, 25.0]) / 25
    torch.testing.assert_close(weights, expected / expected.mean())
    assert weights.mean().item() == pytest.approx(1)
    assert ActDistillLoss(6, gamma=0).weights.tolist() == [1.0] * 6
    assert ActDistillLoss(1).weights.tolist() == [1.0]
    assert ActDistillLoss(2).weights.tolist() == [0.0, 2.0]
    assert ActDistillLoss(6).state_dict() == {}


def test_a_single_layer_and_a_single_sample() -> None:
    values = inputs(layers=1, samples=1)
    parts = ActDistillLoss(1, return_components=True)(*values)
    assert parts.previous == 0 and parts.relation < 1e-24
    _, (expected,) = by_hand(values, 2.0, 1.0, 1.0, 0.5)
    assert parts.loss.item() == pytest.approx(expected)


def test_a_student_that_is_its_teacher_has_only_the_action_terms_left() -> None:
    semantics, actions, _, _, target = inputs()
    parts = ActDistillLoss(L, return_components=True)(semantics, actions, semantics, actions, target)
    assert parts.cosine.abs() < 1e-12 and parts.relation < 1e-24 and parts.teacher == 0
    torch.testing.assert_close(parts.loss, parts.target + parts.previous)


def test_components_add_up_and_carry_no_gradient() -> None:
    values = [x.requires_grad_() for x in inputs()]
    criterion = ActDistillLoss(L, alpha=0.3, beta=2, eta=0.7, return_components=True)
    parts = criterion(*values)
    total = 0.3 * (parts.cosine + 0.7 * parts.relation) + 2 * (parts.target + parts.teacher + parts.previous)
    torch.testing.assert_close(parts.loss, total)
    torch.testing.assert_close(parts.loss, (parts.layers * criterion.weights).mean())
    assert parts.loss.requires_grad and not any(part.requires_grad for part in parts[1:])


def test_teacher_and_target_get_no_gradient() -> None:
    values = [x.requires_grad_() for x in inputs()]
    ActDistillLoss(L)(*values).backward()
    assert all(x.grad is not None for x in values[:2]) and all(x.grad is None for x in values[2:])


def test_a_layer_follows_the_one_before_it_and_not_the_reverse() -> None:
    values = inputs()
    actions = values[1].requires_grad_()
    criterion = ActDistillLoss(L, gamma=0, alpha=0, reduction="none")
    per_layer = criterion(*values)
    for layer in range(L):
        (grad,) = torch.autograd.grad(per_layer[layer], actions, retain_graph=True)
        assert (grad.flatten(1).abs().amax(1) > 0).nonzero().flatten().tolist() == [layer]


def test_gradients() -> None:
    values = inputs()
    mask = torch.rand(B, H) < 0.7
    semantics, actions = (x.requires_grad_() for x in values[:2])
    # the layer before is a constant: numerically it is not, so it is taken out
    previous = actions.detach().clone()

    def loss(semantics: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        return sum(
            ActDistillLoss(L, reduction="none")(
                semantics, torch.cat((previous[:layer], actions[layer:])), *values[2:], mask=mask
            )[layer]
            for layer in range(L)
        )

    assert torch.autograd.gradcheck(loss, (semantics, actions))
    expected = torch.autograd.grad(loss(semantics, actions), (semantics, actions))
    actual = torch.autograd.grad(ActDistillLoss(L, reduction="sum")(*values, mask=mask), (semantics, actions))
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b)


def test_a_semantic_vector_of_zeros_has_a_finite_gradient() -> None:
    values = inputs(torch.float32)
    values[0] = torch.zeros_like(values[0]).requires_grad_()
    loss = ActDistillLoss(L)(*values)
    loss.backward()
    assert loss.isfinite() and values[0].grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(dtype) -> None:
    values = [x.to(dtype) for x in inputs(torch.float32)]
    values[0], values[1] = values[0].requires_grad_(), values[1].requires_grad_()
    weights, losses = by_hand([x.detach() for x in values], 2.0, 1.0, 1.0, 0.5)
    expected = sum(w * loss for w, loss in zip(weights, losses)) / L
    plain = ActDistillLoss(L)(*values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = ActDistillLoss(L)(*values)
    for loss in (plain, autocast):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-6)
    plain.backward()
    assert values[1].grad.dtype == dtype


def test_padded_steps_may_hold_anything() -> None:
    values = inputs()
    mask = torch.arange(H) < torch.tensor([7, 3, 1, 5, 0])[:, None]
    expected = ActDistillLoss(L)(*values, mask=mask)
    for x in (values[1], values[3]):
        x.masked_fill_(~mask[..., None], float("nan"))
    values[4].masked_fill_(~mask[..., None], float("nan"))
    actions = values[1].requires_grad_()
    actual = ActDistillLoss(L)(*values, mask=mask)
    torch.testing.assert_close(actual, expected)
    actual.backward()
    assert (actions.grad[:, ~mask] == 0).all() and actions.grad.isfinite().all()
    # no step at all: nothing to learn, and no NaN
    assert stage1_loss(actions, values[4], torch.zeros(B, H, dtype=torch.bool)) == 0


def test_stage_1_is_the_mean_squared_error_of_all_layers_alike() -> None:
    _, actions, _, _, target = inputs()
    each = torch.stack([(a - target).square().mean() for a in actions])
    torch.testing.assert_close(stage1_loss(actions, target), each.mean())
    torch.testing.assert_close(stage1_loss(actions, target, reduction="sum"), each.sum())
    torch.testing.assert_close(stage1_loss(actions, target, reduction="none"), each)
    mask = torch.rand(B, H) < 0.6
    torch.testing.assert_close(stage1_loss(actions, target, mask), (actions - target)[:, mask].square().mean())
    assert stage1_loss(actions.bfloat16(), target.float()).dtype == torch.float32
    assert torch.autograd.gradcheck(lambda a: stage1_loss(a, target, mask), (actions.requires_grad_(),))


def test_trap_7_every_step_of_the_chunk_is_supervised_in_every_layer() -> None:
    # The public code takes the last step as the target of all heads.
    values = inputs()
    actions = values[1].requires_grad_()
    (stage_1,) = torch.autograd.grad(stage1_loss(actions, values[4]), actions)
    (stage_2,) = torch.autograd.grad(ActDistillLoss(L, gamma=0, alpha=0)(*values), actions)
    assert (stage_1 != 0).all() and (stage_2 != 0).all()
    for step in range(H):
        target = values[4].clone()
        target[:, step] += 1
        assert stage1_loss(actions, target) != stage1_loss(actions, values[4])
        assert ActDistillLoss(L)(*values[:4], target) != ActDistillLoss(L)(*values)
    with pytest.raises(ValueError, match=r"target must be the whole chunk, \[B, H, A\] = \[5, 7, 3\], got \[5, 1, 3\]"):
        ActDistillLoss(L)(*values[:4], values[4][:, -1:])


def test_compiles_into_one_graph() -> None:
    values = inputs(torch.float32)
    criterion = ActDistillLoss(L)
    mask = torch.rand(B, H) < 0.7
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*values, mask=mask), criterion(*values, mask=mask))


def test_no_look_at_values_where_looking_waits() -> None:
    # a meta tensor has no values: any look would raise, as it would wait on a GPU
    values = [x.to("meta") for x in inputs()]
    mask = torch.empty(B, H, dtype=torch.bool, device="meta")
    assert ActDistillLoss(L).to("meta")(*values, mask=mask).shape == ()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_layers": 0}, ValueError, "num_layers must be a positive integer, got 0"),
        ({"gamma": -1}, ValueError, "gamma must be finite and ≥ 0"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite and ≥ 0"),
        ({"beta": "1"}, TypeError, "beta must be a number, got str"),
        ({"eta": float("inf")}, ValueError, "eta must be finite"),
        ({"reduction": "men"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'men'"),
    ],
)
def test_bad_options(options, error, message) -> None:
    with pytest.raises(error, match=message):
        ActDistillLoss(**{"num_layers": L, **options})


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda x: x[0], ValueError, r"semantics must have shape \[L, B, S\]"),
        (0, lambda x: x[:, 1:], ValueError, r"with L=4 and B=5 as the actions, got \[4, 4, 6\]"),
        (1, lambda x: x[1:], ValueError, r"actions must be those of 4 layers, got \[3, 5, 7, 3\]"),
        (1, lambda x: x.long(), TypeError, r"actions must be a floating-point tensor .* got torch.int64"),
        (1, lambda x: x[:, :0], ValueError, "actions must have shape .* not be empty"),
        (2, lambda x: x[..., 1:], ValueError, r"teacher_semantics must have the shape of the semantics, \[4, 5, 6\]"),
        (3, lambda x: x[:, :, -1:], ValueError, "teacher_actions must have the shape of the actions"),
        (3, lambda x: None, TypeError, "teacher_actions must be a floating-point tensor .* got NoneType"),
        (3, lambda x: x.to("meta"), ValueError, "teacher_actions must be on cpu"),
        (4, lambda x: x[:, -1], ValueError, r"target must have shape \[B, H, A\] .* got \[5, 3\]"),
        (
            0,
            lambda x: x.index_fill(0, torch.tensor(2), float("nan")),
            ValueError,
            "semantics must be .* 30 of 120 .* layer 2",
        ),
        (1, lambda x: x.index_fill(0, torch.tensor(3), float("inf")), ValueError, "actions must be finite.* layer 3"),
        (3, lambda x: x * float("nan"), ValueError, "teacher_actions must be finite: 420 of 420"),
        (4, lambda x: x * float("nan"), ValueError, "target must be finite: 105 of 105 numbers are NaN or infinite$"),
    ],
)
def test_bad_tensors(place, change, error, message) -> None:
    values = inputs()
    values[place] = change(values[place])
    with pytest.raises(error, match=message):
        ActDistillLoss(L)(*values)


def test_bad_masks() -> None:
    values = inputs()
    with pytest.raises(TypeError, match=r"mask must be a bool tensor .* got torch.float32; use mask.bool\(\)"):
        ActDistillLoss(L)(*values, mask=torch.ones(B, H))
    with pytest.raises(ValueError, match=r"mask must have shape \[B, H\] = \[5, 7\], got \[7, 5\]"):
        stage1_loss(values[1], values[4], torch.ones(H, B, dtype=torch.bool))
    with pytest.raises(ValueError, match="reduction must be one of"):
        stage1_loss(values[1], values[4], reduction="max")
