"""``demo-robot``: X-Distill in miniature: distil, fine-tune on ten demonstrations, close the loop; against from scratch.

1. Scripted experts solve the task and a few others; every frame is kept.
2. Teacher: a small ViT. DINOv2 or any other by name or path; without one, a ViT is trained here to tell the scenes and
   stages of those episodes (and photographs) apart.
3. Stage 1: a ResNet-18 imitates the teacher's features on all those frames and on photographs, without labels.
4. Stage 2: encoder and diffusion policy learn together from ten demonstrations: once from the distilled encoder, once from
   scratch, with the same architecture, steps and seeds.
5. Both act in episodes they have not seen; the report has success rates with intervals, videos, saliency and latency.

Where all that would take longer than ``minutes``, stage 1 has fewer epochs and both policies have fewer updates.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xdfast import distributed
from xdfast.pipeline.config import _Config
from xdfast.pipeline.demo_robot_plan import measure_costs, planned
from xdfast.pipeline.distill import distill
from xdfast.pipeline.evaluate import evaluate
from xdfast.pipeline.finetune import finetune
from xdfast.pipeline.folder import RunResult
from xdfast.pipeline.report import report
from xdfast.progress import clock
from xdfast.robot.sim.names import suite, task_spec

if TYPE_CHECKING:
    from xdfast.pipeline.evaluate_policy import PolicyEvaluation
    from xdfast.reporting import Report

__all__ = ["DemoRobotConfig", "DemoRobotResult", "demo_robot"]

log = logging.getLogger("xdfast")

# A ViT of 2.7 M parameters that sees pictures of 84 px as 6 × 6 patches of 14, as DINOv2 does.
_TEACHER = {
    "model": "vit_tiny_patch16_224",
    "student_options": {"patch_size": 14, "embed_dim": 192, "depth": 6, "num_heads": 3},
}
_STUDENT_OPTIONS = {"norm_layer": "groupnorm"}  # goes into a policy as it is; see METHODS, BatchNorm and EMA
_STAGES = ("early", "middle", "late")
_BATCH, _VAL_FRACTION = 64, 0.1  # of stage 1


@dataclass(kw_only=True)
class DemoRobotConfig(_Config):
    """A distilled encoder and one from scratch, in a diffusion policy, in closed loop."""

    task: str = "metaworld/drawer-open-v3"
    """A task with a scripted expert."""
    out: str = "demo-robot"
    """Output folder. Run the same command again to continue."""
    teacher: str | None = None
    """timm name (its published weights are used), NAME@/path/to/weights, or a folder that distill or finetune wrote.
    Default: a small ViT trained on the spot."""
    images: str | None = None
    """Folder of pictures of yours to distil on, besides the rendered ones (JPEG, PNG; any sub-folders). Default:
    crops of the two photographs that come with scikit-learn."""
    demos: int = 10
    """Demonstrations a policy learns from."""
    other_tasks: int = 6
    """Further tasks whose frames teacher and student see in stage 1."""
    other_episodes: int = 4
    """Episodes of each of them."""
    seeds: int = 1
    """Policies of each encoder."""
    teacher_epochs: int = 4
    distill_epochs: int = 4
    """Passes over the frames in stage 1."""
    steps: int = 500
    """Updates of each policy."""
    minutes: float = 11.0
    """A CPU that cannot do all that in so many minutes makes fewer passes and fewer updates, as many for both encoders, and the
    report says so; 0: everything, however long. With a teacher of yours, whose cost is not known, everything is done."""
    episodes: int = 20
    """Closed-loop episodes of each policy."""
    size: int = 96
    """Pictures in pixels; 7/8 of it enters the encoder."""
    device: str = "auto"
    workers: int | str = "auto"
    progress: bool = True

    def validate(self) -> None:
        """Checks every value before any work."""
        self._positive(
            "demos", "seeds", "teacher_epochs", "distill_epochs", "steps", "episodes", "size", "other_episodes"
        )
        self._not_negative("other_tasks", "minutes")
        if self.size % 16:
            raise ValueError(f"size must be a multiple of 16 (7/8 of it is cut into patches of 14), got {self.size}")
        if not task_spec(self.task).has_expert:
            raise ValueError(f"{self.task} has no scripted expert; the demo needs a MetaWorld task")


@dataclass
class DemoRobotResult:
    """Attributes:
    runs: encoder → one finished policy per seed.
    results: their evaluations, in the same order.
    report: page and JSON.
    verdict: what the figures say, in sentences.
    """

    runs: dict[str, list[RunResult]]
    results: dict[str, list[PolicyEvaluation]]
    report: Report
    verdict: list[str]


def demo_robot(config: DemoRobotConfig | None = None, **settings: Any) -> DemoRobotResult:
    """Runs the whole pipeline on a laptop; see the module's text.

    Args:
        config: all settings; or give them as keyword arguments, see :class:`DemoRobotConfig`.

    Returns:
        :class:`DemoRobotResult`; the verdict is printed as well. A second call continues or returns at once.

    Raises:
        ValueError: a bad setting, or an output folder of other settings.
        ImportError: the robot extra is missing.
        NoRendererError: nothing can render; the message says what to install.
        ConnectionError: the teacher's published weights could not be fetched.
    """
    from xdfast.robot.sim.gl import renderer

    config = DemoRobotConfig.from_dict(settings, source="demo_robot()") if config is None else config
    config.validate()
    log.info("rendering with %s (%s)", *renderer())
    out = Path(config.out).expanduser()
    shown = _Stages(4 + 2 * config.seeds, config.progress)
    with shown("scripted experts"):
        frames = _frames(config, out)
    asked = config
    config = _fitted(config, out, frames, shown.elapsed)
    with shown("the teacher"):
        teacher = _teacher(config, out, frames)
    with shown("stage 1: the student imitates the teacher"):
        student = _distill(config, out, frames, teacher)
    runs: dict[str, list[RunResult]] = {"from scratch": [], "distilled": []}
    results: dict[str, list[PolicyEvaluation]] = {"from scratch": [], "distilled": []}
    for seed in range(config.seeds):  # seed by seed: whatever else this machine does falls on both alike
        for name, model in (("from scratch", "resnet18"), ("distilled", str(student.path))):
            with shown(f"stage 2: policy, encoder {name}, seed {seed}"):
                run = _policy(config, out, name, model, seed)
                runs[name].append(run)
                found: Any = evaluate(run, episodes=config.episodes, videos=2, progress=config.progress)
                results[name].append(found)
    with shown("the report"):
        verdict = _verdict(results)
        notes = [_teacher_note(config, teacher), _budget_note(config, student), *_fitted_note(asked, config), *verdict]
        page = report(
            [run for listed in runs.values() for run in listed],
            out=out / "report.html",
            title=f"xdfast robot demo: {config.task}",
            notes=notes,
            measure_speed=False,
        )
    for line in [*verdict, f"report: {page.path}"]:
        shown.say(line)
    return DemoRobotResult(runs, results, page, verdict)


def _size(config: DemoRobotConfig) -> int:
    return config.size * 7 // 8


def _frames(config: DemoRobotConfig, out: Path) -> Path:
    """A folder of class folders: frames by task and third of the episode, and photographs."""
    from PIL import Image

    from xdfast.pipeline.finetune_policy import expert_folder
    from xdfast.robot.demos.collect import collect
    from xdfast.robot.demos.open import open_demos

    mine = task_spec(config.task).name
    others = [name for name in suite("metaworld-easy") if name != mine][: config.other_tasks]
    folder, mark = out / "frames", out / "frames" / ".complete"
    if mark.is_file():
        return folder
    for name, count in [(mine, config.demos), *((other, config.other_episodes) for other in others)]:
        spec = task_spec(name)
        demos = expert_folder(out / "any", spec.env, config.size, spec.cameras[:1], 0)  # where stage 2 looks for them
        collect(name, count, demos, image_size=config.size, workers=config.workers, progress=config.progress)  # type: ignore[arg-type]
        for number, episode in enumerate(open_demos(demos, limit=count)):
            pictures = episode.images[spec.cameras[0]]
            for t, pixels in enumerate(pictures):
                kind = folder / f"{spec.env}-{_STAGES[min(3 * t // len(pictures), 2)]}"
                kind.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(kind / f"{number:03d}-{t:03d}.png", compress_level=1)
    (folder / "photograph").mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(_photographs(config)):
        picture.save(folder / "photograph" / f"{number:05d}.png", compress_level=1)
    mark.touch()
    return folder


def _photographs(config: DemoRobotConfig) -> Iterator[Any]:
    """Pictures of the user's, or 300 crops of scikit-learn's two photographs, all ``size`` × ``size``."""
    from PIL import Image

    size = config.size
    if config.images is not None:
        from xdfast.data.folder import UnlabelledSource

        source = UnlabelledSource(config.images)
        for number in range(len(source)):
            yield source.load(number).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        return
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for number in range(300):
        picture = Image.fromarray(load_sample_images().images[number % 2])
        side = int(rng.integers(size, min(picture.size)))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in picture.size)
        yield picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)


def _fitted(config: DemoRobotConfig, out: Path, frames: Path, gone: float) -> DemoRobotConfig:
    """The settings with as many epochs and updates as this machine makes in time; said if they are fewer."""
    if config.teacher is not None:
        return config
    device = distributed.device_for_rank(config.device)
    pictures = sum(1 for _ in frames.glob("*/*.png"))
    batches = max(1, int(pictures * (1 - _VAL_FRACTION)) // _BATCH)
    plan = planned(
        config, out, batches, gone, device,
        lambda: measure_costs(config.size, _size(config), _TEACHER, _STUDENT_OPTIONS, device),
    )  # fmt: skip
    fitted = replace(config, teacher_epochs=plan.teacher_epochs, distill_epochs=plan.distill_epochs, steps=plan.steps)
    for note in _fitted_note(config, fitted):
        log.warning("%s", note)
    return fitted


def _fitted_note(asked: DemoRobotConfig, fitted: DemoRobotConfig) -> list[str]:
    """What was left out for want of time, in one sentence; nothing if nothing was."""
    left_out = [
        f"{now} instead of {before} {what}"
        for before, now, what in (
            (asked.teacher_epochs, fitted.teacher_epochs, "passes of the teacher"),
            (asked.distill_epochs, fitted.distill_epochs, "passes of stage 1"),
            (asked.steps, fitted.steps, "updates of each policy"),
        )
        if now < before
    ]
    if not left_out:
        return []
    return [f"To end within {asked.minutes:g} minutes on this machine: {', '.join(left_out)} (--minutes 0 makes all)."]


def _shared(config: DemoRobotConfig, frames: Path) -> dict[str, Any]:
    return {
        "data": str(frames),
        "val_fraction": _VAL_FRACTION,
        "image_size": _size(config),
        "student_size": _size(config),
        "augment": "imagenet-feature",
        "optimizer": "adamw",
        "weight_decay": 0.05,
        "batch_size": _BATCH,
        "label_smoothing": 0.0,
        "amp": "bf16",
        "channels_last": True,
        "device": config.device,
        "workers": config.workers,
        "progress": config.progress,
    }


def _teacher(config: DemoRobotConfig, out: Path, frames: Path) -> str:
    if config.teacher is not None:
        return config.teacher
    folder = out / "teacher"
    epochs = config.teacher_epochs
    finetune(**_TEACHER, **_shared(config, frames), epochs=epochs, lr=1e-3, eval_every=epochs, out=str(folder))  # type: ignore[arg-type]
    return str(folder)


def _distill(config: DemoRobotConfig, out: Path, frames: Path, teacher: str) -> RunResult:
    return distill(
        teacher=teacher,
        student="resnet18",
        student_options=_STUDENT_OPTIONS,
        loss="mse",
        ce_weight=0.0,
        aad_expansion=0.0,
        epochs=config.distill_epochs,
        lr=1e-3,
        eval_every=config.distill_epochs,
        monitor=200,
        out=str(out / "stage1"),
        **_shared(config, frames),
    )


def _policy(config: DemoRobotConfig, out: Path, name: str, model: str, seed: int) -> RunResult:
    short = name.replace("from ", "")
    return finetune(
        model,
        task=config.task,
        demos=config.demos,
        image_size=config.size,
        model_options=_STUDENT_OPTIONS if name == "from scratch" else {},
        steps=config.steps,
        episodes=0,  # evaluated afterwards, with videos
        amp="bf16",
        seed=seed,
        device=config.device,
        workers=config.workers,
        progress=config.progress,
        out=str(out / f"{short}-seed{seed}"),
    )


def _verdict(results: dict[str, list[PolicyEvaluation]]) -> list[str]:
    """What the figures say; no claim where the intervals overlap."""
    from xdfast.reporting.intervals import wilson_interval

    lines, ends = [], {}
    for name, found in results.items():
        solved = int(sum(r.metrics["solved"] for r in found))
        episodes = int(sum(r.metrics["episodes"] for r in found))
        ends[name] = wilson_interval(solved, episodes)
        low, high = (100 * end for end in ends[name])
        lines.append(
            f"Encoder {name}: {solved} of {episodes} episodes solved ({100 * solved / episodes:.0f} %, 95 % interval "
            f"{low:.0f} to {high:.0f} %); {found[0].metrics['latency_ms']:.0f} ms per decision."
        )
    (low_s, high_s), (low_d, high_d) = ends["from scratch"], ends["distilled"]
    if low_d > high_s:
        lines.append("The distilled encoder is better.")
    elif low_s > high_d:
        lines.append("The encoder from scratch is better.")
    else:
        lines.append("The intervals overlap: so few episodes show no clear difference.")
    return lines


def _teacher_note(config: DemoRobotConfig, teacher: str) -> str:
    if config.teacher is not None:
        return f"Teacher: {teacher}."
    return (
        "Teacher: a ViT of 2.7 M parameters trained here in a minute to tell scenes and thirds of episodes apart. It is no "
        "DINOv2: with TEACHER=vit_small_patch14_dinov2.lvd142m the published one is used."
    )


def _budget_note(config: DemoRobotConfig, student: RunResult) -> str:
    return (
        f"Both policies: {config.demos} demonstrations, {config.steps} updates, the same architecture and seeds. The distilled "
        f"encoder had {student.metrics['seconds']:.0f} s of stage 1 before, without labels."
    )


class _Stages:
    """Says which stage begins and how long it has been going."""

    def __init__(self, total: int, enabled: bool) -> None:
        import time

        self._total, self._enabled, self._number = total, enabled, 0
        self._clock = time.monotonic
        self._began = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._number += 1
        self.say(f"[{self._number}/{self._total}] {name} ({clock(self.elapsed)} so far)")
        yield

    def say(self, text: str) -> None:
        if self._enabled:
            log.info("%s", text)
