"""ActDistill's dual-stream loss: every layer's semantics and predicted actions, student against teacher."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xdfast.ops._checks import check_choice, check_number
from xdfast.ops._precision import wide, without_autocast

__all__ = ["ActDistillComponents", "ActDistillLoss", "stage1_loss"]

#: Norms below it count as it in cosines: the gradient of a semantic vector near zero stays finite.
_TINY = 1e-6


class ActDistillComponents(NamedTuple):
    """The loss and its parts; only ``loss`` carries a gradient. Parts are without α, β, η, reduced as the loss is.

    Attributes:
        loss: what to minimise.
        cosine: 1 − cos(S_l, S_l^T).
        relation: squared distance of the two matrices of cosines between samples.
        target: squared distance of the actions to the demonstrated ones.
        teacher: squared distance of the actions to the teacher's of the same layer.
        previous: squared distance of the actions to those of the layer before.
        layers: the loss of each layer before its weight w_l, [L].
    """

    loss: Tensor
    cosine: Tensor
    relation: Tensor
    target: Tensor
    teacher: Tensor
    previous: Tensor
    layers: Tensor


class ActDistillLoss(nn.Module):
    r"""Semantic and action distillation of all layers of a routed policy from its teacher.

    .. math::
        L_l &= \alpha \big[ 1 - \overline{\cos}(S_l, S_l^T) + \eta \, \mathrm{MSE}(C(S_l), C(S_l^T)) \big]
             + \beta \big[ \mathrm{MSE}(a_l, a) + \mathrm{MSE}(a_l, a_l^T) + \mathrm{MSE}(a_l, \mathrm{sg}(a_{l-1})) \big] \\
        L &= \frac{1}{L} \sum_l w_l L_l, \quad w_l = \frac{(l / (L-1))^\gamma}{\frac{1}{L} \sum_m (m / (L-1))^\gamma}

    The bar is a mean over samples; :math:`C(S)_{bc} = \cos(S^{(b)}, S^{(c)})` are the cosines between the samples of
    this process's batch (0 distance for one sample); sg stops the gradient. MSE is over samples, **all steps of the
    chunk** and all action dimensions. Layer 0 has no layer before it: its last term is absent. With γ > 0 its weight is 0
    as well. A single layer (L = 1) has weight 1.

    The teacher's tensors and the target get no gradient. Half inputs are computed in float32, under autocast too.

    Args:
        num_layers: L.
        gamma: γ ≥ 0; 0 weights all layers alike.
        alpha: α ≥ 0, the semantic stream.
        beta: β ≥ 0, the action stream.
        eta: η ≥ 0.
        reduction: over layers: ``"mean"`` (above), ``"sum"``, or ``"none"`` for w_l L_l.
        return_components: return :class:`ActDistillComponents` instead of the loss alone.

    Shape:
        semantics, teacher_semantics [L, B, S]; actions, teacher_actions [L, B, H, A]; target [B, H, A]; mask [B, H] bool
        (False: a step that pads the chunk, which no action term counts and which may hold NaN) or None. Output: scalar,
        or [L] for ``"none"``; float32 (float64 if an input is).

    Raises:
        TypeError: tensors that are not floating point, a mask that is not bool.
        ValueError: L < 1, negative weights, unknown reduction; shapes or devices that do not fit; on the CPU also NaN
            (looking would make a GPU wait), with the tensor's name and the layer.

    Reference:
        "ActDistill", arXiv 2511.18082. Its public code takes the target from the last step of the chunk alone.

    Example:
        >>> import torch
        >>> criterion = ActDistillLoss(6)
        >>> semantics, actions = torch.randn(6, 8, 512, requires_grad=True), torch.randn(6, 8, 16, 4, requires_grad=True)
        >>> teacher_semantics, teacher_actions, target = torch.randn(6, 8, 512), torch.randn(6, 8, 16, 4), torch.randn(8, 16, 4)
        >>> criterion(semantics, actions, teacher_semantics, teacher_actions, target).backward()
        >>> [round(w, 2) for w in criterion.weights.tolist()]
        [0.0, 0.11, 0.44, 0.98, 1.75, 2.73]
    """

    weights: Tensor

    def __init__(
        self,
        num_layers: int,
        gamma: float = 2.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        eta: float = 0.5,
        reduction: str = "mean",
        *,
        return_components: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(num_layers, int) or isinstance(num_layers, bool) or num_layers < 1:
            raise ValueError(f"num_layers must be a positive integer, got {num_layers!r}")
        self.num_layers = num_layers
        self.gamma = check_number("gamma", gamma, minimum=0)
        self.alpha = check_number("alpha", alpha, minimum=0)
        self.beta = check_number("beta", beta, minimum=0)
        self.eta = check_number("eta", eta, minimum=0)
        self.reduction = check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.return_components = return_components
        depth = torch.arange(num_layers, dtype=torch.float64) / max(num_layers - 1, 1)
        weights = depth**self.gamma if num_layers > 1 else torch.ones(1, dtype=torch.float64)
        # [L], of mean 1; not saved: it follows from the options
        self.register_buffer("weights", (weights / weights.mean()).float(), persistent=False)

    def forward(
        self,
        semantics: Tensor,
        actions: Tensor,
        teacher_semantics: Tensor,
        teacher_actions: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor | ActDistillComponents:
        if isinstance(actions, Tensor) and actions.dim() == 4 and actions.shape[0] != self.num_layers:
            raise ValueError(f"actions must be those of {self.num_layers} layers, got {list(actions.shape)}")
        _check_actions(actions, target, mask)
        _check_like("teacher_actions", teacher_actions, "actions", actions)
        _check_floating("semantics", semantics, "[L, B, S]", 3)
        if semantics.shape[:2] != actions.shape[:2]:
            raise ValueError(
                f"semantics must have shape [L, B, S] with L={actions.shape[0]} and B={actions.shape[1]} as the actions, got "
                f"{list(semantics.shape)}"
            )
        _check_like("teacher_semantics", teacher_semantics, "semantics", semantics)
        _check_numbers("semantics", semantics, None)
        _check_numbers("teacher_semantics", teacher_semantics, None)
        for name, x in {"actions": actions, "teacher_actions": teacher_actions, "target": target}.items():
            _check_numbers(name, x, mask)

        semantics, teacher_semantics = wide(semantics, teacher_semantics.detach())
        actions, teacher_actions, target = wide(actions, teacher_actions.detach(), target.detach())
        with without_autocast(actions.device):  # cosines between samples are a product
            student, teacher = (F.normalize(x, dim=-1, eps=_TINY) for x in (semantics, teacher_semantics))
            cosine = 1 - (student * teacher).sum(-1).mean(-1)  # [L]
            between = student @ student.transpose(1, 2) - teacher @ teacher.transpose(1, 2)  # [L, B, B]
            relation = between.square().mean((1, 2))
            to_target = _distance(actions, target, mask)
            to_teacher = _distance(actions, teacher_actions, mask)
            to_previous = F.pad(_distance(actions[1:], actions[:-1].detach(), mask), (1, 0))
        parts = (cosine, relation, to_target, to_teacher, to_previous)
        layers = self.alpha * (cosine + self.eta * relation) + self.beta * (to_target + to_teacher + to_previous)
        loss = self._reduce(layers)
        if not self.return_components:
            return loss
        details = [*(self._reduce(part.detach()) for part in parts), layers.detach()]
        return ActDistillComponents(loss, *details)

    def _reduce(self, per_layer: Tensor) -> Tensor:
        weighted = per_layer * self.weights.to(per_layer)
        if self.reduction == "none":
            return weighted
        return weighted.mean() if self.reduction == "mean" else weighted.sum()

    def extra_repr(self) -> str:
        return (
            f"num_layers={self.num_layers}, gamma={self.gamma:g}, alpha={self.alpha:g}, beta={self.beta:g}, "
            f"eta={self.eta:g}, reduction={self.reduction!r}"
        )


def stage1_loss(actions: Tensor, target: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    r"""The first stage, on the frozen teacher: every layer's head predicts the demonstrated chunk.

    .. math::
        L = \frac{1}{L} \sum_l \mathrm{MSE}(a_l, a)

    over samples, all steps of the chunk and action dimensions. All layers count alike: the targets of the second stage
    come from early heads too.

    Args:
        actions: a_l of all layers.
        target: a, demonstrated.
        mask: False for steps that pad the chunk.
        reduction: over layers: ``"mean"``, ``"sum"``, or ``"none"`` for one number per layer.

    Shape:
        actions [L, B, H, A], target [B, H, A], mask [B, H] bool or None. Output: scalar, or [L]; float32 (float64 if an
        input is).

    Raises:
        TypeError, ValueError: as :class:`ActDistillLoss`.

    Reference:
        "ActDistill", arXiv 2511.18082, stage 1.

    Example:
        >>> import torch
        >>> stage1_loss(torch.ones(6, 8, 16, 4), torch.zeros(8, 16, 4)).item()
        1.0
    """
    check_choice("reduction", reduction, ("mean", "sum", "none"))
    _check_actions(actions, target, mask)
    _check_numbers("actions", actions, mask)
    _check_numbers("target", target, mask)
    actions, target = wide(actions, target.detach())
    per_layer = _distance(actions, target, mask)
    if reduction == "none":
        return per_layer
    return per_layer.mean() if reduction == "mean" else per_layer.sum()


def _distance(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared difference of each layer, [L, B, H, A] and the same or [B, H, A] → [L]; 0 if no step is real."""
    difference = a - b
    if mask is None:
        return difference.square().mean((1, 2, 3))
    # before squaring: what lies in padding may be NaN, and its gradient would be
    difference = difference.masked_fill(~mask[..., None], 0)
    return difference.square().sum((1, 2, 3)) / (mask.sum() * a.shape[-1]).clamp(min=1)


def _check_floating(name: str, x: Tensor, layout: str, dims: int) -> None:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating-point tensor {layout}, got {kind}")
    if x.dim() != dims or x.numel() == 0:
        raise ValueError(f"{name} must have shape {layout} and not be empty, got {list(x.shape)}")


def _check_actions(actions: Tensor, target: Tensor, mask: Tensor | None) -> None:
    _check_floating("actions", actions, "[L, B, H, A]", 4)
    _check_floating("target", target, "[B, H, A]", 3)
    if target.shape != actions.shape[1:]:
        raise ValueError(
            f"target must be the whole chunk, [B, H, A] = {list(actions.shape[1:])}, got {list(target.shape)}"
        )
    _check_device("target", target, actions)
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True: a step, False: padding), got {kind}; use mask.bool()")
    if mask.shape != target.shape[:2]:
        raise ValueError(f"mask must have shape [B, H] = {list(target.shape[:2])}, got {list(mask.shape)}")
    _check_device("mask", mask, actions)


def _check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    _check_floating(name, x, f"of the shape of the {other_name}", other.dim())
    if x.shape != other.shape:
        raise ValueError(f"{name} must have the shape of the {other_name}, {list(other.shape)}, got {list(x.shape)}")
    _check_device(name, x, other)


def _check_device(name: str, x: Tensor, other: Tensor) -> None:
    if x.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, as the actions are, got {x.device}")


def _check_numbers(name: str, x: Tensor, mask: Tensor | None) -> None:
    """No NaN or infinity, where looking is free; padding of actions is not looked at."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = ~x.detach().isfinite()
    if mask is not None:
        bad = bad & mask[..., None]
    if bool(bad.any()):
        where = "" if name == "target" else f", first in layer {int(bad.flatten(1).any(1).nonzero()[0])}"
        raise ValueError(f"{name} must be finite: {int(bad.sum())} of {x.numel()} numbers are NaN or infinite{where}")
