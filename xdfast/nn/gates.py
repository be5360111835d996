"""Gates of routed layers: a router's logits → numbers in [0, 1] that multiply residual branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xdfast.ops._checks import check_choice, check_number

__all__ = ["GATES", "GateFunction", "GateSchedule", "GateStage", "gumbel", "gumbel_st", "hard_st", "soft"]

#: Kinds of gate, see :class:`GateFunction`.
GATES = ("hard_st", "soft", "gumbel", "gumbel_st")


def soft(logits: Tensor, tau: float | Tensor = 1.0) -> Tensor:
    r"""Probabilities :math:`p = \sigma(z / \tau)`; float32 for half logits: a gate decides, and 8 bits decide badly.

    Raises:
        TypeError: logits that are not floating point.
        ValueError: a number τ that is not finite and > 0.

    Shape:
        any, output the same.
    """
    if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point:
        raise TypeError(
            f"logits must be a floating-point tensor, got {getattr(logits, 'dtype', type(logits).__name__)}"
        )
    if not isinstance(tau, Tensor):
        check_number("tau", tau, minimum=0, strict=True)
    return torch.sigmoid(_at_least_float32(logits) / tau)


def hard_st(logits: Tensor, tau: float | Tensor = 1.0, threshold: float | Tensor = 0.5) -> Tensor:
    r"""Straight-through gate: the value is the decision, the gradient that of the probability.

    .. math::
        g = 1[p > \theta] + (p - \mathrm{sg}(p)), \quad p = \sigma(z / \tau)

    The bracket is a number minus itself: g is **exactly** 0 or 1, as at inference. Without it, ``hard + p - p.detach()``
    adds first and rounds: a quarter of the ones come out as 1 − 6e-8. A NaN logit stays NaN instead of becoming "off".

    Raises:
        TypeError, ValueError: see :func:`soft`.

    Shape:
        any, output the same; ``threshold`` a number or a tensor that broadcasts against the logits.

    Reference:
        Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", arXiv 1308.3432.

    Example:
        >>> import torch
        >>> z = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> g = hard_st(z)
        >>> g.tolist()
        [0.0, 1.0]
        >>> g.sum().backward()
        >>> torch.equal(z.grad, torch.sigmoid(z) * (1 - torch.sigmoid(z)))
        True
    """
    return _straight_through(soft(logits, tau), threshold)


def gumbel(logits: Tensor, tau: float | Tensor = 1.0, generator: torch.Generator | None = None) -> Tensor:
    r"""A sample of the binary concrete distribution, :math:`\sigma((z + \log u - \log(1 - u)) / \tau)`, u uniform.

    At any τ the sample is above 1/2 with probability σ(z); the lower τ, the nearer to 0 and 1.

    Args:
        logits: z.
        tau: τ > 0.
        generator: of the logits' device; None is torch's own. The same seed gives the same sample.

    Raises:
        TypeError, ValueError: see :func:`soft`; a generator of another device.

    Shape:
        any, output the same.

    Reference:
        Maddison, Mnih, Teh, "The Concrete Distribution", arXiv 1611.00712; Jang, Gu, Poole, arXiv 1611.01144.
    """
    if not isinstance(logits, Tensor) or not logits.dtype.is_floating_point:
        return soft(logits, tau)  # raises
    if generator is not None and generator.device.type != logits.device.type:
        raise ValueError(
            f"generator must be on the logits' device, {logits.device}, got {generator.device}; "
            f"use torch.Generator({logits.device.type!r})"
        )
    logits = _at_least_float32(logits)
    if generator is None:
        uniform = torch.rand_like(logits)
    else:
        uniform = torch.rand(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
    # rand is in [0, 1): its 0 would be -inf, and an infinite sample has no gradient
    uniform = uniform.clamp(min=torch.finfo(logits.dtype).tiny)
    return soft(logits + torch.log(uniform) - torch.log1p(-uniform), tau)


def gumbel_st(
    logits: Tensor, tau: float | Tensor = 1.0, threshold: float | Tensor = 0.5, generator: torch.Generator | None = None
) -> Tensor:
    """:func:`gumbel`, rounded: exactly 0 or 1, with the gradient of the sample. Arguments as there and :func:`hard_st`."""
    return _straight_through(gumbel(logits, tau, generator), threshold)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def _straight_through(p: Tensor, threshold: float | Tensor) -> Tensor:
    return (p > threshold).to(p.dtype) + (p - p.detach())


class GateFunction(nn.Module):
    """Logits → gates, by one of four functions, the same decisions in training and at inference.

    =============  ==========================================  ========================
    ``kind``       in training                                 in evaluation
    =============  ==========================================  ========================
    ``hard_st``    0 or 1, gradient of p (:func:`hard_st`)     the same values
    ``soft``       p (:func:`soft`)                            the same values
    ``gumbel``     a noisy p (:func:`gumbel`)                  p
    ``gumbel_st``  a noisy 0 or 1 (:func:`gumbel_st`)          0 or 1, as ``hard_st``
    =============  ==========================================  ========================

    τ and the threshold are buffers: saved with the weights, for they are part of the decision, and changed without
    compiling anew. A student made with ``threshold=0.5`` loads the calibrated thresholds of another, whatever their shape.

    Args:
        kind: one of ``xdfast.nn.gates.GATES``.
        tau: τ > 0, temperature.
        threshold: of the decision p > threshold, in [0, 1]: one number, one per layer [L], or one per layer and branch
            [L, S]. :func:`xdfast.nn.calibrate_flops` finds it for a budget.
        generator: of the noise in training; None is torch's own.

    Attributes:
        tau: scalar buffer; :meth:`set` changes it.
        threshold: buffer [] or [L, 1] or [L, S].
        scale: ``"hard"`` if evaluation gives 0 or 1, ``"scaled"`` if it gives p: by what an active branch is multiplied
            at inference.

    Shape:
        logits [B, L, S] or [B, T, L, S] (any shape with one threshold), output the same; float32 for half logits.

    Raises:
        ValueError: unknown kind, τ ≤ 0, a threshold outside [0, 1] or of more than two dimensions.
        TypeError: logits that are not floating point.

    Example:
        >>> import torch, xdfast.nn
        >>> gate = xdfast.nn.GateFunction("gumbel_st", tau=2.0, generator=torch.Generator().manual_seed(0))
        >>> logits = torch.randn(4, 12, 1)
        >>> sorted(set(gate(logits).flatten().tolist()))
        [0.0, 1.0]
        >>> torch.equal(gate.eval()(logits), (logits > 0).float())
        True
    """

    tau: Tensor
    threshold: Tensor

    def __init__(
        self,
        kind: str = "hard_st",
        tau: float = 1.0,
        threshold: float | Sequence[float] | Tensor = 0.5,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.kind, self.generator = check_choice("kind", kind, GATES), generator
        self.register_buffer("tau", torch.tensor(check_number("tau", tau, minimum=0, strict=True)))
        self.register_buffer("threshold", _threshold(threshold))

    @property
    def scale(self) -> str:
        return "hard" if self.kind.endswith("_st") else "scaled"

    def set(
        self,
        kind: str | None = None,
        tau: float | None = None,
        threshold: float | Sequence[float] | Tensor | None = None,
    ) -> GateFunction:
        """Changes what is given, checked as by the constructor; returns self. Nothing is read back from a GPU."""
        if kind is not None:
            self.kind = check_choice("kind", kind, GATES)
        if tau is not None:
            self.tau.fill_(check_number("tau", tau, minimum=0, strict=True))
        if threshold is not None:
            new = _threshold(threshold)
            if new.shape == self.threshold.shape:
                self.threshold.copy_(new)  # in place, as tau: a compiled or captured model sees it
            else:
                self.threshold = new.to(self.threshold.device)
        return self

    def probabilities(self, logits: Tensor) -> Tensor:
        """p = σ(z / τ), without noise, whatever the kind: what a threshold is compared with, and losses of decisiveness."""
        return soft(logits, self.tau)

    def forward(self, logits: Tensor) -> Tensor:  # [B, L, S] → [B, L, S]
        if self.training and self.kind == "gumbel":
            return gumbel(logits, self.tau, self.generator)
        if self.training and self.kind == "gumbel_st":
            return gumbel_st(logits, self.tau, self.threshold, self.generator)
        if self.scale == "hard":
            return hard_st(logits, self.tau, self.threshold)
        return soft(logits, self.tau)

    def _apply(self, fn: Any, recurse: bool = True) -> GateFunction:
        exact = {name: getattr(self, name) for name in ("tau", "threshold")}
        super()._apply(fn, recurse)
        for name, value in exact.items():  # student.bfloat16() would round a calibrated threshold to 8 bits
            if getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(prefix + "threshold")
        if isinstance(saved, Tensor) and saved.dim() <= 2 and saved.shape != self.threshold.shape:
            self.threshold = torch.empty(saved.shape, dtype=self.threshold.dtype, device=self.threshold.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}"


def _threshold(value: float | Sequence[float] | Tensor) -> Tensor:
    threshold = torch.as_tensor(value, dtype=torch.float32, device="cpu").detach().clone()
    if threshold.dim() > 2:
        raise ValueError(f"threshold must be a number, [L] or [L, S], got shape {list(threshold.shape)}")
    if not bool(((threshold >= 0) & (threshold <= 1)).all()):
        raise ValueError(f"threshold must be in [0, 1], got {value!r}")
    return threshold[:, None] if threshold.dim() == 1 else threshold  # [L] is one for all branches of a layer


class GateStage(NamedTuple):
    """What a :class:`GateSchedule` says for one step: arguments of :meth:`GateFunction.set`."""

    kind: str
    tau: float


@dataclass(frozen=True)
class GateSchedule:
    r"""Soft gates first, decisions later; the temperature falls all the while.

    .. math::
        \tau_n = \tau_0 (\tau_1 / \tau_0)^{\min(n / N, 1)}, \quad
        \mathrm{kind}_n = \text{soft if } n < \text{warm-up, else } \mathrm{kind}

    In the warm-up every branch gets a gradient in proportion to its share; after it the student computes what it will
    compute at inference. τ does not jump at the change.

    Args:
        kind: after the warm-up, one of ``xdfast.nn.gates.GATES``.
        warmup_steps: of soft gates, ≥ 0.
        steps: N ≥ 1, of the whole training; later steps keep its end.
        tau: (τ₀, τ₁), both > 0.

    Raises:
        ValueError: unknown kind, counts out of range, a warm-up longer than the training, τ ≤ 0.

    Example:
        >>> schedule = GateSchedule("hard_st", warmup_steps=100, steps=1000)
        >>> schedule(0), schedule(500), schedule(1000)
        (GateStage(kind='soft', tau=2.0), GateStage(kind='hard_st', tau=1.0), GateStage(kind='hard_st', tau=0.5))
        >>> gate = GateFunction().set(*schedule(500))  # each step
    """

    kind: str = "hard_st"
    warmup_steps: int = 0
    steps: int = 1
    tau: tuple[float, float] = (2.0, 0.5)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, GATES)
        for value in self.tau:
            check_number("tau", value, minimum=0, strict=True)
        if len(self.tau) != 2:
            raise ValueError(f"tau must be a pair (first, last), got {self.tau!r}")
        if not 0 <= self.warmup_steps <= self.steps or self.steps < 1:
            raise ValueError(
                f"0 ≤ warmup_steps ≤ steps and steps ≥ 1 must hold, got warmup_steps={self.warmup_steps}, steps={self.steps}"
            )

    def __call__(self, step: int) -> GateStage:
        """The stage at ``step``, counted from 0."""
        first, last = self.tau
        share = min(max(step, 0) / self.steps, 1.0)
        return GateStage("soft" if step < self.warmup_steps else self.kind, first * (last / first) ** share)
