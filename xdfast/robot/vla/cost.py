"""What a decision of a routed VLA costs beside its teacher's: counted in FLOPs, and measured with both in turns."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xdfast.nn.routed import RoutedStack
from xdfast.reporting.adapt import eval_mode
from xdfast.reporting.flops import count_flops
from xdfast.reporting.speed import ratio_interval
from xdfast.robot.runner import fixed_size
from xdfast.robot.vla.compact import CompactVLA
from xdfast.robot.vla.interface import Observation, Observed
from xdfast.robot.vla.paths import routed_stack

__all__ = ["count_vla", "drawn_observations", "measure_vla"]

#: Observations where none are given: enough for a router that decides by sample to show more than one path.
_DRAWN = 64


def measure_vla(
    dense: CompactVLA,
    routed: CompactVLA,
    batches: Sequence[int] = (1, 16),
    *,
    observations: Observed | None = None,
    others: Mapping[str, CompactVLA] | None = None,
    device: torch.device | str = "cpu",
    seconds: float = 20.0,
    rounds: tuple[int, int] = (20, 400),
) -> dict[str, Any]:
    """FLOPs and milliseconds of a routed VLA and its teacher, one after the other in every round, on the same observations.

    The teacher is plain PyTorch, eager, as it stands; the routed stack decides by its router and runs by the executor that the
    closed loop uses. A decision is ``act``: pictures in main memory to actions in main memory. Batches follow each other through
    the observations, so that the figures are those of the paths that occur there.

    Args:
        dense: the teacher, or any other VLA without routing that takes the same observations.
        routed: the student.
        batches: samples of a pass.
        observations: real ones (of the demonstrations, of episodes). None: drawn at random, on which a router may decide
            otherwise than in its task.
        others: name → further VLAs to time beside them, as they stand.
        device: where all are measured; they come back to where they were.
        seconds: for all rounds of each batch size; half for the stack, half for the decision.
        rounds: at least and at most so many, whatever ``seconds`` says.

    Returns:
        JSON-able: ``baseline`` and ``observations`` (words), ``samples``, ``tokens``, ``layers``, ``device``, ``machine``,
        ``threads``, ``load`` (others' work at the start, in processors), ``flops`` (:func:`count_vla`), and ``batches``: one entry
        per size with ``batch``, ``executor`` and ``why``, ``rounds``, ``stack`` and ``decision``. Each of these two has
        ``dense``, ``routed`` and the others' names with ``p50`` and ``p95`` in ms, and ``speedup``, ``speedup_low``,
        ``speedup_high``: median of dense / median of routed and its 95 % bootstrap interval over rounds. ``stack`` also has
        ``ideal``: dense FLOPs / nominal FLOPs.

    Raises:
        ValueError: a dense "routed" VLA or the reverse, models for other observations, batches < 1, no observations.
    """
    models = {"dense": dense, "routed": routed, **(others or {})}
    stack = _check(models, batches)
    seen = drawn_observations(dense, _DRAWN) if observations is None else observations
    if not len(seen.images):
        raise ValueError("measure_vla needs at least one observation, got none")
    place = torch.device(device)
    told = (
        f"{len(seen.images)} drawn at random; the router may decide otherwise in its tasks"
        if observations is None
        else f"{len(seen.images)} given"
    )
    from xdfast.bench.harness import interleave, machine

    result: dict[str, Any] = {
        "baseline": "the teacher as plain PyTorch, eager",
        "observations": told,
        "samples": len(seen.images),
        "tokens": routed.num_tokens,
        "layers": routed.num_layers,
        "device": str(place),
        "machine": machine(place.type),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "batches": [],
    }
    with _placed(models, place), torch.no_grad():
        result["flops"] = count_vla(dense, routed, seen)
        for batch in batches:
            parts = _batches(seen, batch)
            with fixed_size(routed, batch, place):
                tokens = {name: [_tokens(model, part, place) for part in parts] for name, model in models.items()}
                executor, why = stack.choose(tokens["routed"][0])
                stacks = {name: _turns(model.layers, tokens[name]) for name, model in models.items()}
                acts = {name: _turns(_act(model, place), parts) for name, model in models.items()}
                entry: dict[str, Any] = {"batch": batch, "executor": executor, "why": why}
                for what, candidates in (("stack", stacks), ("decision", acts)):
                    times = interleave(candidates, budget=seconds / 2, rounds=rounds, device=place.type)
                    entry[what] = _figures(times)
                    entry["rounds"] = min(entry.get("rounds", len(times["dense"])), len(times["dense"]))
                flops = result["flops"]["stack"]
                entry["stack"]["ideal"] = flops["dense"] / flops["nominal"] if flops["nominal"] else None
                result["batches"].append(entry)
    return result


def count_vla(dense: CompactVLA, routed: CompactVLA, observations: Observed) -> dict[str, Any]:
    """FLOPs of a decision for one sample, 2 per multiply-add of products and convolutions, mean over the observations.

    Returns:
        ``encoder`` (all pictures), ``embed`` (from its features to tokens), ``head`` (of a policy that learned by diffusion, all
        of its steps), ``router``; ``stack`` and ``decision``, each with ``dense`` (the teacher's), ``nominal`` (what the gates ask
        for, with the router) and ``executed`` (what the executor computes, with the router); ``fraction`` and
        ``decision_fraction``: executed / dense.

    Raises:
        ValueError: as :func:`measure_vla`.
    """
    stack = _check({"dense": dense, "routed": routed}, (1,))
    device = next(routed.parameters()).device
    asked = ran = router = 0
    with torch.no_grad(), eval_mode(routed), eval_mode(dense):
        (one, *_) = _batches(observations, 1)
        parts = {name: _parts(model, one, device) for name, model in (("dense", dense), ("routed", routed))}
        for part in _batches(observations, 16, whole=False):
            routed.layers(_tokens(routed, part, device))
            found = stack.flops(routed.num_tokens)
            asked, ran, router = asked + found.nominal, ran + found.executed, router + found.router
    samples = len(observations.images)
    teacher = parts["dense"]
    mine = {name: flops for name, flops in parts["routed"].items() if name != "stack"}
    around = sum(mine.values())
    flops: dict[str, Any] = {**mine, "router": router // samples}
    flops["stack"] = {"dense": teacher["stack"], "nominal": asked / samples, "executed": ran / samples}
    flops["decision"] = {
        "dense": sum(teacher.values()),
        "nominal": around + asked / samples,
        "executed": around + ran / samples,
    }
    for name, key in (("stack", "fraction"), ("decision", "decision_fraction")):
        flops[key] = flops[name]["executed"] / flops[name]["dense"]
    return flops


def drawn_observations(vla: CompactVLA, count: int, seed: int = 0) -> Observation:
    """Pictures of noise, normal states, and the usual instructions of the policy's tasks in turn (without tasks, words of its
    vocabulary)."""
    spec, generator = vla.spec, torch.Generator().manual_seed(seed)
    shape = (count, len(spec.cameras), spec.n_obs, *spec.image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    state = torch.randn(count, spec.n_obs, spec.state_dim, generator=generator)
    known = [vla.for_task(task).instruction[0].cpu() for task in spec.tasks]
    if not known:
        known = [torch.randint(1, len(spec.vocabulary), (spec.text_length,), generator=generator)]
    told = [ids for ids, _ in zip(cycle(known), range(count))]
    return Observation(images, state, torch.stack(told))


class _Part(nn.Module):
    """A method of a VLA as a module, so that it can be counted."""

    def __init__(self, vla: CompactVLA, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.vla, self.call = vla, call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)


def _parts(vla: CompactVLA, one: Observation, device: torch.device) -> dict[str, int]:
    """FLOPs of the parts of a decision for one sample; ``stack`` is 0 for a routed one, which counts itself."""
    images, state, told = (x.to(device) for x in (one.images, one.state, one.instruction))
    features = vla.features(images)
    tokens = vla.tokens(features, state, told)
    calls: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "encoder": (vla.features, (images,)),
        "embed": (getattr(vla, "prompt", vla.tokens), (features, state, told)),  # before action tokens are generated
        "stack": (vla.layers, (tokens,)),
        "head": (vla.decode, (tokens,)),
    }
    if routed_stack(vla) is not None:
        del calls["stack"]
    return {name: count_flops(_Part(vla, call), inputs=given).torch_flops for name, (call, given) in calls.items()}


def _tokens(vla: CompactVLA, part: Observation, device: torch.device) -> Tensor:
    return vla.embed(Observation(*(x.to(device) for x in (part.images, part.state, part.instruction))))


def _act(vla: CompactVLA, device: torch.device) -> Callable[[Observation], Tensor]:
    def act(part: Observation) -> Tensor:
        return vla.act(part.images.to(device), part.state.to(device), part.instruction.to(device)).cpu()

    return act


def _turns(call: Callable[[Any], Any], given: Sequence[Any]) -> Callable[[], Any]:
    """``call`` on the next of the inputs each time, around and around."""
    inputs = cycle(given)
    return lambda: call(next(inputs))


def _batches(seen: Observed, batch: int, whole: bool = True) -> list[Observation]:
    """The observations in batches; ``whole`` fills up the last one from the start."""
    total = len(seen.images)
    starts = range(0, total, batch)
    rows = [torch.arange(s, s + batch if whole else min(s + batch, total)) % total for s in starts]
    return [Observation(seen.images[i], seen.state[i], seen.instruction[i]) for i in rows]


def _figures(times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, samples in times.items():
        p50, p95 = (1e3 * float(x) for x in np.percentile(samples, (50, 95)))
        found[name] = {"p50": p50, "p95": p95}
    speedup, low, high = ratio_interval(times["dense"], times["routed"])
    return {**found, "speedup": speedup, "speedup_low": low, "speedup_high": high}


@contextmanager
def _placed(models: Mapping[str, CompactVLA], device: torch.device) -> Iterator[None]:
    """All on the device, in eval mode, convolutions channels last as in the closed loop."""
    homes = [(model, next(model.parameters()).device, model.training) for model in models.values()]
    for model, _, _ in homes:
        model.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    try:
        yield
    finally:
        for model, home, training in homes:
            model.to(home).train(training)


def _check(models: Mapping[str, CompactVLA], batches: Sequence[int]) -> RoutedStack:
    """The routed one's stack."""
    dense, stack = models["dense"], routed_stack(models["routed"])
    if routed_stack(dense) is not None:
        raise ValueError("the first VLA must be dense (the teacher), its layers are routed")
    if stack is None:
        raise ValueError("the second VLA has no routed layers; xdfast.route(vla, …, blocks='layers') makes them")
    if not batches or any(not isinstance(b, int) or b < 1 for b in batches):
        raise ValueError(f"batches must be positive whole numbers, got {tuple(batches)!r}")
    for name, model in models.items():
        for what in ("cameras", "image_size", "state_dim", "text_length", "vocabulary"):
            mine, wanted = getattr(model.spec, what), getattr(dense.spec, what)
            if mine != wanted:
                raise ValueError(
                    f"the VLAs do not take the same observations: {what} of {name} is {mine}, not {wanted}"
                )
    return stack
