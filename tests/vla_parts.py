"""Small VLAs and demonstrations that only the instruction tells apart; no simulator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import xdfast.nn
from xdfast.robot import build_encoder
from xdfast.robot.demos.episode import Episode
from xdfast.robot.demos.format import DemoWriter
from xdfast.robot.demos.open import open_demos
from xdfast.robot.vla import CompactVLA, MultiTaskWindows, Tokenizer, VLASpec

SIZE = 24
TASKS = ("metaworld/drawer-open-v3", "metaworld/drawer-close-v3")


def write_task(folder: Path, task: str, action: float, *, episodes: int = 2, steps: int = 6, cameras=("dp3",), **sizes):
    """Episodes with the same pictures and states whatever the task; every action is (a, −a, a, −a)."""
    sizes = {"action_dim": 4, "state_dim": 9, **sizes}
    writer = DemoWriter(folder, task=task, cameras={name: (SIZE, SIZE) for name in cameras}, fps=80, **sizes)
    rng = np.random.default_rng(0)
    for index in range(episodes):
        images = {name: rng.integers(0, 256, (steps, SIZE, SIZE, 3), dtype=np.uint8) for name in cameras}
        state = rng.normal(size=(steps, sizes["state_dim"])).astype(np.float32)
        actions = np.tile(action * (-1.0) ** np.arange(sizes["action_dim"]), (steps, 1)).astype(np.float32)
        writer.write(Episode(images, state, actions, np.arange(steps) == steps - 1, seed=index), index=index)
    return open_demos(folder)


def task_folders(folder: Path) -> str:
    """Demonstrations of drawer-open and drawer-close as ``finetune(demos=…)`` finds them: a folder per task."""
    write_task(folder / "drawer-open-v3", TASKS[0], 0.5)
    write_task(folder / "drawer-close", TASKS[1], -0.5)
    return str(folder)


def two_tasks(folder: Path, *, cameras=("dp3",), **options) -> MultiTaskWindows:
    """Drawer-open, whose actions are (0.5, -0.5, …), and drawer-close with the opposite; of different lengths."""
    demos = [
        write_task(folder / "open", TASKS[0], 0.5, cameras=cameras),
        write_task(folder / "close", TASKS[1], -0.5, episodes=3, steps=7, cameras=cameras),
    ]
    return MultiTaskWindows(demos, cameras, **{"horizon": 8, **options})


def make_vla(*, encoder="test_resnet", sentences=("Open the drawer", "Close the drawer"), cameras=("dp3",), **spec):
    """With a ResNet of 0.1 M parameters, 2 layers of width 32."""
    net, facts = build_encoder(encoder, image_size=spec.pop("model_size", 20))
    sizes = {"image_size": (SIZE, SIZE), "crop": 20, "width": 32, "layers": 2, "heads": 2, "text_length": 8} | spec
    return CompactVLA(
        VLASpec(4, 9, cameras, encoder=facts, vocabulary=Tokenizer.of(sentences).vocabulary, **sizes), net
    ).eval()


def observation(vla: CompactVLA, rows: int = 3):
    """(images, state, instruction) of the right shapes."""
    spec = vla.spec
    images = torch.randint(0, 256, (rows, len(spec.cameras), 1, *spec.image_size, 3), dtype=torch.uint8)
    told = vla.tokenizer.encode_all(["Open the drawer"] * rows, spec.text_length)
    return images, torch.randn(rows, 1, spec.state_dim), told


def routed_vla(vla: CompactVLA, **options) -> CompactVLA:
    """Its student, with a router of random weights; the first layer is always on."""
    groups = list(vla.groups.values())
    options = {"target_flops": 0.7, "always_on": (0,), "router": {"groups": groups, "hidden": 16}, **options}
    student = xdfast.nn.route(vla, blocks="layers", tokens=vla.num_tokens, **options)
    with torch.no_grad():
        student.layers.router.head.weight.normal_()
    return student


@torch.no_grad()
def split_decisions(vla: CompactVLA, seen) -> None:
    """Moves the router's bias so that each of its layers runs for some of these observations and not for others, as far from the
    threshold as it can be."""
    router = vla.layers.router
    logits = router(vla.embed(seen)).flatten(1).sort(0).values  # [B, L · S]
    if len(logits) == 1:
        return
    gap = logits.diff(dim=0).argmax(0)
    below, above = (logits.gather(0, (gap + i)[None])[0] for i in (0, 1))
    router.head.bias -= (below + above) / 2
