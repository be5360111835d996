"""A policy made ready to decide: on its device, its loop compiled or captured, inputs checked before they get there."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from xdfast.nn import routed_stacks
from xdfast.nn.convert_hf import RoutedDecoder
from xdfast.robot.packed_unet import packed_sampling

if TYPE_CHECKING:
    from xdfast.robot.policy import DiffusionPolicy
    from xdfast.robot.vla.acting import InstructedVLA

__all__ = ["Latency", "PolicyRunner", "fixed_size", "measure_latency"]

log = logging.getLogger("xdfast")


class PolicyRunner:
    """Decides for a fixed number of robots at once; smaller batches are filled up, so that shapes never change.

    On a GPU the whole decision (encoding, all denoising steps) is captured in one CUDA graph and replayed: one launch
    instead of hundreds (written for it, not yet run on a device). On a CPU the denoiser of a diffusion policy runs in fused
    layers (:class:`xdfast.robot.packed_unet.PackedUnet`) where the compiled extension is there. :attr:`reason` says what is used.

    Of a policy with routed layers the host reads which layers run, so that what is skipped costs nothing: on a GPU it is not
    captured as a whole, but one robot's layers are one graph each (:func:`fixed_size`). With ``executor="list"``, whose counts stay
    on the device, it is captured like any other.

    Args:
        policy: moved to ``device``, in eval mode; a VLA with its instruction, :class:`xdfast.robot.vla.InstructedVLA`.
        batch: robots.
        device: where it runs.
        graph: capture a CUDA graph; default: on CUDA devices.
        compile: torch.compile of what follows the encoder, instead of the fused layers (up to a minute at the start; needs a C++
            compiler on a CPU).
        packed: whether to run the fused layers; default: where they can be.

    Raises:
        ValueError: ``graph=True`` or ``packed=True`` where that cannot be.
    """

    def __init__(
        self,
        policy: DiffusionPolicy | InstructedVLA,
        batch: int = 1,
        *,
        device: torch.device | str = "cpu",
        graph: bool | None = None,
        compile: bool = False,
        packed: bool | None = None,
    ) -> None:
        self.device = torch.device(device)
        # on a CPU convolutions of a single picture, and of one robot's actions, are fastest channels last
        self.policy = policy.to(self.device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.batch = batch
        self._sample: Any = policy.core
        if compile:
            self._sample = torch.compile(self._sample, dynamic=False)
        read = any(stack.executor != "list" for stack in routed_stacks(self.policy))
        wanted = (self.device.type == "cuda" and not read) if graph is None else graph
        if wanted and self.device.type != "cuda":
            raise ValueError(f"graph=True captures CUDA work; the policy is on {self.device}")
        if wanted and read:
            raise ValueError(
                "graph=True cannot capture routed layers whose lists the host reads; leave graph out, or give the stack "
                "executor='list'"
            )
        self.reason = "captured in a CUDA graph" if wanted else f"eager on {self.device.type}"
        if compile and packed:
            raise ValueError("packed=True runs the fused layers, compile=True compiles the modules: choose one")
        if compile:
            self.reason += ", denoising loop compiled"
        else:
            sample, why = packed_sampling(self.policy, self.device)
            if packed and sample is None:
                raise ValueError(f"packed=True cannot be: {why or 'only a diffusion policy on a CPU has fused layers'}")
            if packed is not False:
                self._sample = sample or self._sample
                self.reason += f", {why}" if why else ""
        self._graph: Any = None
        if wanted:
            self._capture()

    @torch.no_grad()
    def act(self, images: np.ndarray | Tensor | None, state: np.ndarray | Tensor, noise: Tensor) -> np.ndarray:
        """Actions float32 ``[n, n_action, A]`` for n ≤ batch robots.

        Args:
            images: uint8 ``[n, K, T, H, W, 3]``; None without cameras.
            state: ``[n, T, P]``.
            noise: ``[S, n, H, A]``, see :meth:`DiffusionPolicy.noise`.

        Raises:
            ValueError: a state that is not finite, more rows than ``batch``, wrong shapes.
        """
        state = torch.as_tensor(state)
        rows = len(state)
        if not 1 <= rows <= self.batch:
            raise ValueError(f"expected 1 to {self.batch} rows, got {rows}")
        if not state.isfinite().all():
            raise ValueError("the state is not finite (NaN or infinity)")
        images = None if images is None else torch.as_tensor(images)
        if rows < self.batch:
            state = _filled(state, self.batch, 0)
            images = None if images is None else _filled(images, self.batch, 0)
            noise = _filled(noise, self.batch, 1)
        if self._graph is not None:
            return self._replay(images, state, noise)[:rows].cpu().numpy()
        images = None if images is None else images.to(self.device)
        with fixed_size(self.policy, self.batch, self.device):
            actions = self.policy.decide(images, state.to(self.device), noise.to(self.device), self._sample)
        return actions[:rows].cpu().numpy()

    def _capture(self) -> None:
        images, state, noise = (None if x is None else x.to(self.device) for x in example(self.policy, self.batch))
        assert state is not None and noise is not None
        self._inputs = (images, state, noise)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):  # lazily made workspaces must exist before the capture
                self.policy.decide(images, state, noise, self._sample)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._output = self.policy.decide(images, state, noise, self._sample)

    def _replay(self, images: Tensor | None, state: Tensor, noise: Tensor) -> Tensor:
        for static, given in zip(self._inputs, (images, state, noise)):
            if static is not None and given is not None:
                if static.shape != given.shape:
                    raise ValueError(f"expected {list(static.shape)}, got {list(given.shape)}")
                static.copy_(given)
        self._graph.replay()
        return self._output


@contextlib.contextmanager
def fixed_size(policy: nn.Module, batch: int, device: torch.device) -> Iterator[None]:
    """Within the block the policy's routed stacks know that shapes stay: one sample on a GPU then runs by ``executor="graph"``.

    ``"auto"`` does not choose that by itself, as it captures anew whenever the number of tokens changes. Stacks with an executor
    of their own keep it, decoders of transformers (whose layers take caches and masks) ``"auto"``, and so does everything on a CPU.
    """
    stacks = routed_stacks(policy) if device.type == "cuda" and batch == 1 else []
    stacks = [stack for stack in stacks if stack.executor == "auto" and not isinstance(stack, RoutedDecoder)]
    for stack in stacks:
        stack.executor = "graph"
    try:
        yield
    finally:
        for stack in stacks:
            stack.executor = "auto"


@dataclass
class Latency:
    """Milliseconds per decision of ``batch`` robots, over ``runs`` of them.

    Attributes:
        p50, p95: the whole decision, images in main memory to actions in main memory.
        encode: pictures to condition (median).
        denoise: condition to actions (median); of a VLA, its transformer and head.
        steps: denoising steps; 1 for a VLA that learned by regression.
        how: device and mode.
    """

    batch: int
    runs: int
    p50: float
    p95: float
    encode: float
    denoise: float
    steps: int
    how: str


def measure_latency(
    policy: DiffusionPolicy | InstructedVLA,
    *,
    batch: int = 1,
    runs: int = 50,
    device: torch.device | str = "cpu",
    compile: bool = False,
) -> Latency:
    """Times decisions on synthetic observations, and their two parts apart (those always without a graph)."""
    runner = PolicyRunner(policy, batch, device=device, compile=compile)
    images, state, noise = example(policy, batch)
    whole, encode, denoise = [], [], []
    on_device = [None if x is None else x.to(runner.device) for x in (images, state, noise)]

    def finish() -> None:
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)

    with torch.no_grad():
        for run in range(-5, runs):
            began = time.perf_counter()
            runner.act(images, state, noise)
            finish()
            done = time.perf_counter()
            features = None if on_device[0] is None else policy.features(on_device[0])
            condition = policy.condition(features, on_device[1])  # type: ignore[arg-type]
            finish()
            encoded = time.perf_counter()
            with fixed_size(policy, batch, runner.device):
                runner._sample(condition, on_device[2])
            finish()
            if run >= 0:  # the first ones warm up
                whole.append(done - began)
                encode.append(encoded - done)
                denoise.append(time.perf_counter() - encoded)
    ms, diffusion = 1e3, getattr(policy.spec, "diffusion", None)
    return Latency(
        batch,
        runs,
        ms * float(np.median(whole)),
        ms * float(np.quantile(whole, 0.95)),
        ms * float(np.median(encode)),
        ms * float(np.median(denoise)),
        diffusion.inference_steps if diffusion else 1,
        runner.reason,
    )


def example(policy: DiffusionPolicy | InstructedVLA, batch: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """(images, state, noise) of the right shapes, from a fixed seed."""
    spec, generator = policy.spec, torch.Generator().manual_seed(0)
    shape = (batch, len(spec.cameras), spec.n_obs, *spec.image_size, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) if spec.cameras else None
    state = torch.randn(batch, spec.n_obs, spec.state_dim, generator=generator)
    return images, state, policy.noise(batch, generator)


def _filled(x: Tensor, size: int, dim: int) -> Tensor:
    """The first row repeated until there are ``size``."""
    missing = size - x.shape[dim]
    return torch.cat([x, x.narrow(dim, 0, 1).expand(*(missing if i == dim else s for i, s in enumerate(x.shape)))], dim)
