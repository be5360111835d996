"""What each page of README and docs/ assumes to be there, and what stands in for what a test cannot have.

``PAGES[page](slow)`` is called in an empty folder, which becomes the page's working directory. It puts data and models there and
returns the names that the page's code uses without making them, and the page's :class:`doc_blocks.StandIns`. Networks are small and
have random weights; pictures are noise around a colour of their class.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from doc_blocks import ROOT, StandIns
from PIL import Image
from torch import nn

import xdfast

DINOV2 = "vit_small_patch14_dinov2.lvd142m"
Setup = Callable[[bool], tuple[dict[str, Any], StandIns]]

#: A few steps on small pictures, in this process.
SHORT = {
    "student_size": 32, "epochs": 1, "batch_size": 4, "workers": 0, "decoder": "pillow", "device": "cpu", "progress": False,
}  # fmt: skip
SHORT_OPTIONS = [
    "--student-size", "32", "--epochs", "1", "--batch-size", "4", "--workers", "0", "--decoder", "pillow", "--device", "cpu",
    "--no-progress",
]  # fmt: skip
EVALUATE = {"knn": 3, "workers": 0, "decoder": "pillow", "device": "cpu", "progress": False}
POLICY = {
    "feature_dim": 8, "unet_widths": (16, 32), "train_steps": 20, "inference_steps": 4, "noise_draws": 2, "batch_size": 8,
    "steps": 6, "warmup_steps": 1, "log_every": 2, "progress": False, "device": "cpu", "episodes": 0,
}  # fmt: skip
EPISODES = {"episodes": 2, "max_steps": 20, "progress": False, "device": "cpu"}


def write_photos(folder: str, *, images: int = 10) -> None:
    """cat/, dog/ and fox/ with JPEGs of 48 × 48 pixels."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog", "fox")):
        (Path(folder) / name).mkdir(parents=True)
        for i in range(1, images + 1):
            pixels = rng.integers(0, 120, (48, 48, 3))
            pixels[..., number] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(Path(folder) / name / f"{i:04d}.jpg")


def write_vit(folder: str = "models/vit") -> None:
    """A ViT of 6 layers for pictures of 32 pixels, as xdfast and timm save models."""
    options = {"patch_size": 8, "embed_dim": 64, "depth": 6, "num_heads": 4}
    model = xdfast.create_model("vit_tiny_patch16_224", num_classes=3, image_size=32, pretrained=False, options=options)
    xdfast.models.save_student(model, folder, classes=["cat", "dog", "fox"])


def write_student(run: str) -> None:
    """What `distill` leaves of its student."""
    model = xdfast.create_model("test_resnet", num_classes=3, image_size=32, pretrained=False)
    xdfast.models.save_student(model, f"{run}/student")


class MyCNN(nn.Module):
    """Features [N, 512] and logits [N, 10] of pictures [N, 3, 32, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 512, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(512, 10)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(images)
        return features, self.head(features)


class MyViT(nn.Module):
    """Features [N, 768]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(3, 768, 16, 16), nn.Flatten(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.embed(images).mean(-1)


def own_loop() -> dict[str, Any]:
    loader = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(2)]
    return {"MyCNN": MyCNN, "MyViT": MyViT, "loader": loader}


def readme(slow: bool) -> tuple[dict[str, Any], StandIns]:
    write_photos("photos")
    write_vit()
    write_student("runs/xdistill")
    images = torch.rand(4, 3, 32, 32)
    words = {DINOV2: "local-dir:models/vit", "resnet18": "test_resnet", "/data/flowers": "photos"}
    tune = {**SHORT, "labels_per_class": 4}
    settings = {
        "xd.distill": SHORT,
        "xd.finetune": tune,
        "xd.evaluate": EVALUATE,
        "xd.report": {"measure_speed": False},
    }
    return own_loop() | {"images": images, "batches": [images, images]}, StandIns(words, settings)


def index(slow: bool) -> tuple[dict[str, Any], StandIns]:
    write_photos("photos")
    write_vit()
    words = {DINOV2: "models/vit", "resnet18": "test_resnet"}
    return {}, StandIns(words, {"xd.distill": SHORT, "xd.evaluate": EVALUATE, "xd.report": {"measure_speed": False}})


def start(slow: bool) -> tuple[dict[str, Any], StandIns]:
    short = {"epochs": 1, "workers": 0, "device": "cpu", "progress": False}
    return {}, StandIns(
        settings={
            "xd.finetune": short, "xd.distill": short, "xd.evaluate": {"progress": False}, "xd.report": {"measure_speed": False},
        }
    )  # fmt: skip


def own_pair(slow: bool) -> tuple[dict[str, Any], StandIns]:
    write_photos("photos")
    write_photos("heap")
    write_vit()
    if not slow:  # what the blocks that are left out would have made
        write_student("runs/heap")
    small = [
        *SHORT_OPTIONS, "--teacher-size", "32", "--teacher-precision", "float32", "--amp", "none", "--image-size", "32",
        "--warmup-epochs", "0", "--no-student-pretrained",
    ]  # fmt: skip
    options = {
        "distill": small,
        "distill --recipe": ["--teacher", "models/vit", "--student", "test_resnet"],
        "finetune": [*SHORT_OPTIONS, "--no-student-pretrained"],
        "evaluate": ["--knn", "3", "--workers", "0", "--decoder", "pillow", "--device", "cpu", "--no-progress"],
        "report": ["--no-measure-speed"],
        "data": ["--no-progress", "--workers", "0"],
    }
    return {}, StandIns({DINOV2: "models/vit", "resnet18": "test_resnet"}, options=options)


def drop_in(slow: bool) -> tuple[dict[str, Any], StandIns]:
    names = {
        "student_features": (32, 512),
        "teacher_features": (32, 768),
        "student_logits": (32, 10),
        "teacher_logits": (32, 10),
    }
    tensors = {name: torch.randn(*shape, requires_grad=name.startswith("student")) for name, shape in names.items()}
    return own_loop() | tensors, StandIns()


def architecture(slow: bool) -> tuple[dict[str, Any], StandIns]:
    return {"student": torch.randn(8, 16), "teacher": torch.randn(8, 16)}, StandIns()


def data(slow: bool) -> tuple[dict[str, Any], StandIns]:
    write_photos("imagenet")
    small = {"batch_size": 4, "image_size": 32, "workers": 0}
    return {}, StandIns({"/data/imagenet": "imagenet"}, {"ImageLoader": small, "loader.epoch": {"start": 2}})


def demonstrations(slow: bool) -> tuple[dict[str, Any], StandIns]:
    from xdfast.robot.demos.episode import Episode

    shutil.copytree(ROOT / "tests/robot/fixtures/pusht_like.zarr", "pusht_cchi_v7_replay.zarr")  # three episodes
    rng = np.random.default_rng(0)
    images = {"top": rng.integers(0, 255, (4, 96, 96, 3), dtype=np.uint8)}
    state, actions = (rng.normal(size=(4, size)).astype(np.float32) for size in (8, 7))
    names = {"my_episodes": [Episode(images, state, actions) for _ in range(2)]}
    return names, StandIns(settings={"open_demos": {"limit": 3}})


def robot(slow: bool) -> tuple[dict[str, Any], StandIns]:
    from policy_parts import SIZE, make_policy, write_demos

    from xdfast.robot import save_policy

    write_student("runs/xdistill")
    own = write_demos(Path("demos/own"), task="my-robot")  # not simulated: the report does not have to evaluate it
    write_demos(Path("runs/demos/drawer-open-v3-96px-dp3-seed0"))
    for seed in range(2):
        for name, model in {"scratch": "test_resnet", "distilled": "runs/xdistill"}.items():
            out = f"runs/{name}-s{seed}"
            xdfast.finetune(model, task="my-robot", demos=str(own), seed=seed, out=out, **{**POLICY, "crop": 20})
    if not slow:
        save_policy(make_policy(), "runs/x-drawer/policy")
    size = 96 if slow else SIZE  # of the expert's demonstrations, of the policy above
    names = {
        "images": torch.zeros(1, 1, 1, size, size, 3, dtype=torch.uint8),
        "states": torch.zeros(1, 1, 9),
        "picture": np.zeros((size, size, 3), np.uint8),
        "state": np.zeros(9, np.float32),
    }
    settings: dict[str, dict[str, Any]] = {"rollout": {"max_steps": 20}, "film": {"max_steps": 20}}
    settings |= {"xd.finetune": POLICY, "xd.evaluate": EPISODES}
    return names, StandIns({"cuda": "cpu"}, settings)


def deploy(slow: bool) -> tuple[dict[str, Any], StandIns]:
    from policy_parts import make_policy

    from xdfast.robot import save_policy

    write_photos("flowers", images=1)
    model = xdfast.create_model("test_resnet", num_classes=3, image_size=32, pretrained=False)
    xdfast.models.save_student(model, "runs/flowers/student", classes=["cat", "dog", "fox"])
    save_policy(make_policy(), "runs/drawer/policy")
    return {}, StandIns(settings={"xd.export": {"progress": False, "latency_seconds": 0.1, "batches": (1,)}})


def routed(slow: bool) -> tuple[dict[str, Any], StandIns]:
    images, tokens, width = torch.rand(4, 3, 160, 160), 101, 64  # of test_vit, which can be made again from its name
    names = {
        "images": images,
        "batches": [images, images],
        "targets": torch.randn(4, tokens, width),
        "gates": (torch.rand(4, 4) > 0.5).float(),
        "tokens": tokens,
        "x": torch.randn(4 * tokens, width),
        "ln": nn.LayerNorm(width),
        "fc1": nn.Linear(width, 4 * width),
        "fc2": nn.Linear(4 * width, width),
    }
    settings = {"timm.create_model": {"pretrained": False}, "stack.flops": {"tokens": tokens}}
    return names, StandIns({DINOV2: "test_vit"}, settings)


def vla(slow: bool) -> tuple[dict[str, Any], StandIns]:
    import vla_parts
    from vla_parts import make_vla, write_task

    settings = {"MultiTaskLoader": {"steps": 2, "batch_size": 4}, "rollout": {"max_steps": 20}}
    if slow:
        with _size(vla_parts, 96):
            for number, task in enumerate(("drawer-open-v3", "button-press-topdown-v3")):
                write_task(Path("demos") / task, f"metaworld/{task}", 0.5 - number, steps=20)
    return {"vla": make_vla(layers=6)}, StandIns({"resnet18": "test_resnet"}, settings)


class _size:
    """Demonstrations of another picture size than the other tests'."""

    def __init__(self, module: Any, size: int) -> None:
        self.module, self.size = module, size

    def __enter__(self) -> None:
        self.before, self.module.SIZE = self.module.SIZE, self.size

    def __exit__(self, *_: Any) -> None:
        self.module.SIZE = self.before


def actdistill(slow: bool) -> tuple[dict[str, Any], StandIns]:
    import vla_runs
    from vla_parts import make_vla, observation

    from xdfast.nn import GraphEncapsulation
    from xdfast.robot.vla import Observation, hidden_states

    teacher = make_vla(layers=6)
    batch = Observation(*observation(teacher))
    with torch.no_grad():
        heads = GraphEncapsulation(teacher.dim, teacher.num_layers, teacher.chunk, teacher.action_dim)
        semantics, actions = heads(torch.stack(hidden_states(teacher.layers, teacher.embed(batch))[1:]))
    if slow:
        vla_runs.write_student(Path("runs/half"), vla_runs.write_teacher(Path("runs/vla")))
    names = {"teacher": teacher, "batch": batch, "teacher_semantics": semantics, "teacher_actions": actions}
    return names | {"target": torch.rand_like(actions[0])}, StandIns(
        settings={"xd.evaluate": {**EPISODES, "videos": 0}}
    )


PAGES: dict[str, Setup] = {
    "README.md": readme,
    "docs/actdistill.md": actdistill,
    "docs/architecture.md": architecture,
    "docs/data.md": data,
    "docs/demonstrations.md": demonstrations,
    "docs/deploy.md": deploy,
    "docs/drop-in.md": drop_in,
    "docs/index.md": index,
    "docs/own-pair.md": own_pair,
    "docs/robot.md": robot,
    "docs/routed.md": routed,
    "docs/start.md": start,
    "docs/vla.md": vla,
}
