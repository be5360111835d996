"""A robot's policy as graphs: one decision from pictures to actions, or its parts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from xdfast.deploy.graph import BATCH, Graph, Port
from xdfast.deploy.skipping import skip_layers
from xdfast.nn import routed_stacks

__all__ = ["policy_graphs", "vla_graph"]

_NOISE = "standard normal numbers, drawn anew for every decision (float32)"


class _Decision(nn.Module):
    """Pictures, state and noise → actions to execute."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, images: Tensor, state: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return (self.policy.decide(images, state, noise),)


class _BlindDecision(_Decision):
    """The same without cameras."""

    def forward(self, state: Tensor, noise: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.policy.decide(None, state, noise),)


class _Encode(nn.Module):
    """What is done once a decision: pictures and state → the condition's part of every block of the denoiser."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, images: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        condition = self.policy.condition(self.policy.features(images), state)
        return (self.policy.diffusion.unet.condition_part(condition),)


class _BlindEncode(_Encode):
    """The same without cameras."""

    def forward(self, state: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self.policy.diffusion.unet.condition_part(self.policy.condition(None, state)),)


class _Step(nn.Module):
    """One denoising step, whichever, by its index."""

    def __init__(self, diffusion: Any) -> None:
        super().__init__()
        self.diffusion = diffusion

    def forward(self, sample: Tensor, film: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        return (self._step(sample, film, index, None),)

    def _step(self, sample: Tensor, film: Tensor, index: Tensor, noise: Tensor | None) -> Tensor:
        diffusion = self.diffusion
        time = diffusion.unet.time_part(diffusion.steps[index])  # [1, F]
        return diffusion.step(sample, film + time, diffusion.table[index][0], noise)


class _NoisyStep(_Step):
    """The same of ddpm, which adds noise."""

    def forward(self, sample: Tensor, film: Tensor, index: Tensor, added_noise: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self._step(sample, film, index, added_noise),)


class _Told(nn.Module):
    """A VLA's decision by regression: pictures, state and instruction → actions to execute."""

    def __init__(self, vla: Any) -> None:
        super().__init__()
        self.vla = vla

    def forward(self, images: Tensor, state: Tensor, instruction: Tensor) -> tuple[Tensor, ...]:
        return (self._decide(images, state, instruction, None),)

    def _decide(self, images: Tensor, state: Tensor, instruction: Tensor, noise: Tensor | None) -> Tensor:
        tokens = self.vla.layers(self.vla.tokens(self.vla.features(images), state, instruction))
        return self.vla.unnormalised(self.vla.decode(tokens, noise))


class _ToldNoise(_Told):
    """The same by diffusion."""

    def forward(self, images: Tensor, state: Tensor, instruction: Tensor, noise: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return (self._decide(images, state, instruction, noise),)


def policy_graphs(policy: Any, *, parts: bool = False) -> list[Graph]:
    r"""One decision of a diffusion policy: encoder, denoising loop (unrolled) and both normalisations in one graph.

    With ``parts`` two graphs instead, for schedules of many steps and for robots that encode and denoise at different times:
    ``encode`` once, then ``step`` S times with index 0 … S − 1, then the actions from the last sample x:

    .. math:: a = (x - \mathrm{offset}) / \mathrm{scale}

    with the numbers in the record (``actions``).

    Args:
        policy: a :class:`xdfast.robot.DiffusionPolicy`; copied, float32.
        parts: see above.
    """
    spec = policy.spec
    mine = copy.deepcopy(policy).cpu().float().eval().requires_grad_(False)
    count = mine.diffusion.noise_count
    pictures = _pictures(spec)
    state = Port("state", (BATCH, spec.n_obs, spec.state_dim), "float32", "proprioception, raw, oldest first")
    chunk = (BATCH, spec.horizon, spec.action_dim)
    facts = {
        "kind": "policy",
        "model": f"diffusion policy, {spec.encoder.architecture or spec.encoder.source}",
        **_robot_facts(spec),
        "noise": {"shape": [count, *chunk], "distribution": _NOISE},
        "diffusion": spec.diffusion.to_dict(),
    }

    def seen(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        told = torch.randn(batch, spec.n_obs, spec.state_dim, generator=generator)
        return (*_example_pictures(spec, batch, generator), told)

    if not parts:
        noise = Port("noise", (count, *chunk), "float32", _NOISE)
        whole = Graph(
            name="policy",
            module=(_Decision if pictures else _BlindDecision)(mine).eval(),
            example=lambda batch, generator: (*seen(batch, generator), mine.noise(batch, generator)),
            inputs=(*pictures, state, noise),
            outputs=(_actions(spec),),
            facts=facts,
        )
        return [whole]
    width = mine.diffusion.unet.film_condition.out_features
    film = Port("film", (BATCH, width), "float32", "the condition's part of every block of the denoiser")
    first = spec.n_obs - 1
    facts["actions"] |= {
        "rows": [first, first + spec.n_action],
        "scale": mine.action_norm.scale.tolist(),
        "offset": mine.action_norm.offset.tolist(),
        "from": "the last sample's rows, minus offset, over scale",
    }

    noisy = spec.diffusion.scheduler == "ddpm"

    def step_example(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        sample = torch.randn(batch, *chunk[1:], generator=generator)
        added = (torch.randn(batch, *chunk[1:], generator=generator),) if noisy else ()
        index = torch.randint(0, spec.diffusion.inference_steps, (1,), generator=generator)
        return (sample, torch.randn(batch, width, generator=generator), index, *added)

    added = Port("added_noise", chunk, "float32", "the step's part of noise, noise[1 + index]")
    encode = Graph(
        name="encode",
        module=(_Encode if pictures else _BlindEncode)(mine).eval(),
        example=seen,
        inputs=(*pictures, state),
        outputs=(film,),
        facts=facts,
    )
    step = Graph(
        name="step",
        module=(_NoisyStep if noisy else _Step)(mine.diffusion).eval(),
        example=step_example,
        inputs=(
            Port("sample", chunk, "float32", "noise[0] at the start, then what the step before gave"),
            film,
            Port("index", (1,), "int64", f"number of the step, 0 to {spec.diffusion.inference_steps - 1}"),
            *((added,) if noisy else ()),
        ),
        outputs=(Port("next_sample", chunk, "float32", "normalised actions after the last step"),),
        facts=facts,
    )
    return [encode, step]


def vla_graph(vla: Any, *, skip: bool = True) -> Graph:
    """One decision of a :class:`xdfast.robot.vla.CompactVLA`, dense or routed: pictures, state and instruction to actions.

    Args:
        vla: copied, float32.
        skip: routed layers under conditions (batch 1), or all computed and multiplied by their gates (any batch).

    Raises:
        ValueError: a VLA of another kind, or layers that cannot be skipped.
    """
    from xdfast.robot.vla import CompactVLA

    if not isinstance(vla, CompactVLA):
        raise ValueError(
            f"only a CompactVLA can be exported, got {type(vla).__name__}: a decoder that writes action tokens one by one is a "
            "loop with a cache, which transformers and optimum export"
        )
    spec = vla.spec
    mine = copy.deepcopy(vla).cpu().float().eval().requires_grad_(False)
    noisy = spec.diffusion is not None
    module: nn.Module = (_ToldNoise if noisy else _Told)(mine).eval()
    routed = bool(routed_stacks(mine))
    batch: int | str = 1 if routed and skip else BATCH
    words = len(mine.tokenizer)

    def example(count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        state = torch.randn(count, 1, spec.state_dim, generator=generator)
        told = torch.randint(0, words, (count, spec.text_length), generator=generator)
        noise = (mine.noise(count, generator),) if noisy else ()
        return (*_example_pictures(spec, count, generator), state, told, *noise)

    ports = [
        *_pictures(spec),
        Port("state", (BATCH, 1, spec.state_dim), "float32", "proprioception, raw"),
        Port("instruction", (BATCH, spec.text_length), "int64", "numbers of the words, see instruction"),
    ]
    facts: dict[str, Any] = {
        "kind": "vla",
        "model": f"VLA of {spec.layers} layers, {spec.encoder.architecture or spec.encoder.source}",
        **_robot_facts(spec),
        "instruction": {
            "vocabulary": list(spec.vocabulary),
            "length": spec.text_length,
            "rule": "lower case, split into words (letters and digits); a word's number is its place in the vocabulary, "
            "<unk> where it has none; filled up with <pad>",
        },
    }
    if noisy:
        shape = (mine.noise(1).shape[0], BATCH, spec.horizon, spec.action_dim)
        ports.append(Port("noise", shape, "float32", _NOISE))
        facts["noise"] = {"shape": list(shape), "distribution": _NOISE}
    eager = None
    if routed:
        eager, module = module, copy.deepcopy(module)
        facts["routing"] = skip_layers(module, skip=skip)
    return Graph(
        name="vla",
        module=module,
        eager=eager,
        example=example,
        inputs=tuple(_with_batch(port, batch) for port in ports),
        outputs=(_with_batch(_actions(spec), batch),),
        facts=facts,
    )


def _with_batch(port: Port, batch: int | str) -> Port:
    return Port(port.name, tuple(batch if n == BATCH else n for n in port.shape), port.dtype, port.about)


def _pictures(spec: Any) -> tuple[Port, ...]:
    if not spec.cameras:
        return ()
    shape = (BATCH, len(spec.cameras), spec.n_obs, *spec.image_size, 3)
    about = f"RGB from 0 to 255 of cameras {', '.join(spec.cameras)}; crop, mean and std are inside"
    return (Port("images", shape, "uint8", about),)


def _example_pictures(spec: Any, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    if not spec.cameras:
        return ()
    shape = (batch, len(spec.cameras), spec.n_obs, *spec.image_size, 3)
    return (torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),)


def _actions(spec: Any) -> Port:
    about = "the next actions, in the units of the demonstrations"
    return Port("actions", (BATCH, spec.n_action, spec.action_dim), "float32", about)


def _robot_facts(spec: Any) -> dict[str, Any]:
    return {
        "task": spec.task,
        "fps": spec.fps,
        "cameras": list(spec.cameras),
        "preprocessing": {
            "picture": [*spec.image_size, 3],
            "crop": spec.crop,
            "encoder_size": spec.encoder.image_size,
            "mean": list(spec.encoder.mean),
            "std": list(spec.encoder.std),
            "normalisation": "inside, of pictures, states and actions",
        },
        "actions": {"executed": spec.n_action, "horizon": spec.horizon, "dim": spec.action_dim},
    }
