"""Sets the threshold of a routed model for a FLOP or latency budget on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.nn.calibrate import Calibration, calibrate_flops
from xdfast.nn.gates import GateFunction
from xdfast.nn.latency_budget import LatencyCalibration, calibrate_latency
from xdfast.nn.routed import RoutedStack
from xdfast.nn.steps import fixed_gates, routed_stacks

__all__ = ["calibrate_model"]


def calibrate_model(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target_flops: float | None = None,
    budget_ms: float | None = None,
    scope: str = "global",
    call: Callable[[nn.Module, Any], Any] | None = None,
) -> Calibration | LatencyCalibration:
    """After training: how sure must the router be, so that the model keeps a budget on data like these?

    Runs the model over the batches without gradients, collects what the router thinks, finds the lowest threshold within the
    budget and sets it in the model (a buffer: saved with the weights).

    Args:
        model: with one routed stack (:func:`xdfast.nn.route`); left in the mode it was in.
        batches: calibration data: tensors, or whatever ``call`` takes. With ``budget_ms`` the first one is timed as it is:
            one sample for a robot's loop.
        target_flops: fraction of the routed layers' FLOPs, as of :func:`xdfast.nn.calibrate_flops`; or
        budget_ms: milliseconds of one call on this machine, as of :func:`xdfast.nn.calibrate_latency`.
        scope: ``"global"`` (one threshold) or ``"branch"`` (one per decision).
        call: (model, batch) → anything; default ``model(batch)``.

    Returns:
        :class:`xdfast.nn.Calibration`, or :class:`xdfast.nn.LatencyCalibration` of a latency budget.

    Raises:
        ValueError: no routed stack, several, or one without a router; both budgets or none; no batch; ``scope="sample"``,
            which has no threshold; a budget that no threshold keeps (both figures are named).

    Example:
        >>> import timm, torch, xdfast.nn
        >>> model = xdfast.nn.route(timm.create_model("test_vit").eval(), 0.6)
        >>> found = xdfast.nn.calibrate_model(model, [torch.randn(8, 3, 160, 160)], target_flops=0.6)
        >>> found.expected_flops <= 0.6
        True
    """
    stacks = routed_stacks(model)
    if len(stacks) != 1 or stacks[0].router is None:
        raise ValueError(
            f"calibrate_model needs a model with one routed stack and its router, this one has {len(stacks)}"
        )
    if (target_flops is None) == (budget_ms is None):
        raise ValueError("give target_flops or budget_ms, one of them")
    if scope == "sample":
        raise ValueError("scope='sample' has no threshold that could be set; see xdfast.nn.select_per_sample")
    stack, call = stacks[0], call or (lambda net, batch: net(batch))
    batches = list(batches)
    if not batches:
        raise ValueError("calibrate_model needs at least one batch of data like those the model will see, got none")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            probabilities, tokens = _probabilities(model, stack, batches, call)
            costs = stack.costs(tokens, probabilities.shape[2])
            if budget_ms is None:
                assert target_flops is not None
                found = calibrate_flops(probabilities, costs, target_flops, stack.always_on, scope=scope)
                stack.gate.set(threshold=found.threshold)
                return found
            before = stack.gate.threshold.clone()
            try:
                timed = calibrate_latency(
                    probabilities, costs, budget_ms, _stopwatch(model, stack, batches[0], call),
                    always_on=stack.always_on, scope=scope,
                )  # fmt: skip
            except BaseException:
                stack.gate.set(threshold=before)
                raise
            stack.gate.set(threshold=timed.calibration.threshold)
            return timed
    finally:
        model.train(training)


def _probabilities(
    model: nn.Module, stack: RoutedStack, batches: list[Any], call: Callable[[nn.Module, Any], Any]
) -> tuple[Tensor, int]:
    """(p [N, L, S] of all batches, tokens of a sample)."""
    found: list[Tensor] = []
    tokens = 0

    def see(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal tokens
        tokens = (arguments[0] if arguments else keywords["tokens"]).shape[1]

    assert stack.router is not None
    handle = stack.router.register_forward_pre_hook(see, with_kwargs=True)
    try:
        for batch in batches:
            stack.decision = None
            call(model, batch)
            decision: Any = stack.decision
            if decision is None or decision.probabilities is None:
                raise ValueError("the model did not ask its router: gates were given from outside")
            found.append(decision.probabilities.float().cpu())
    finally:
        handle.remove()
    return torch.cat(found), tokens


def _stopwatch(
    model: nn.Module, stack: RoutedStack, batch: Any, call: Callable[[nn.Module, Any], Any]
) -> Callable[[Calibration], float]:
    """Seconds of one call with a candidate's threshold, or with everything on."""
    device = next(model.parameters()).device
    gate: GateFunction = stack.gate

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed() -> float:
        wait()
        begin = time.perf_counter()
        call(model, batch)
        wait()
        return time.perf_counter() - begin

    def measure(candidate: Calibration) -> float:
        if len(candidate.always_on) < stack.num_layers:
            gate.set(threshold=candidate.threshold)
            return timed()
        assert stack.decision is not None
        with fixed_gates(model, torch.ones_like(stack.decision.gates)):
            return timed()

    return measure
