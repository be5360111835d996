"""``finetune`` for robots: encoder and diffusion policy learn together from demonstrations (stage 2 of X-Distill)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xdfast import distributed
from xdfast.pipeline.alone import alone_in
from xdfast.pipeline.folder import RunResult, finish, model_source, open_folder
from xdfast.pipeline.loop import train
from xdfast.pipeline.policy_config import PolicyConfig
from xdfast.pipeline.policy_task import PolicyTask
from xdfast.pipeline.precision import autocast
from xdfast.pipeline.task import millions, seed_everything
from xdfast.progress import ProgressLine
from xdfast.robot.demos.open import Demonstrations, open_demos
from xdfast.robot.diffusion import DiffusionSettings
from xdfast.robot.encoder import build_encoder
from xdfast.robot.pictures import crop
from xdfast.robot.policy import DiffusionPolicy, PolicySpec
from xdfast.robot.policy_files import save_policy
from xdfast.robot.rollout import check_task, rollout
from xdfast.robot.sim.names import nearest_tasks, task_names, task_spec
from xdfast.robot.windows import WindowLoader, Windows

__all__ = ["finetune_policy"]

log = logging.getLogger("xdfast")

_DEFAULT_SIZE = 96


def finetune_policy(config: PolicyConfig, model: Any = None) -> RunResult:
    """Trains a diffusion policy; see :func:`xdfast.finetune`.

    Args:
        config: settings.
        model: a module, where the encoder is not given by a name.
    """
    config.validate()
    simulated = _is_simulated(config.task)
    distributed.init()
    out, finished = open_folder(config, "policy")
    if finished is not None:
        log.info("%s is finished; returning its result", out)
        return finished
    if simulated and config.episodes:
        _check_renderer()  # now, not after hours of training
    demos = open_demonstrations(config, out)
    cameras = config.cameras or (demos.cameras[:1] if config.demos.isdigit() else demos.cameras)
    windows = Windows(
        demos,
        cameras,
        n_obs=config.n_obs,
        horizon=config.horizon,
        image_size=None if config.image_size is None else (config.image_size, config.image_size),
        scratch=out,
    )
    policy = build_policy(config, windows, cameras, demos, model)
    if simulated and config.episodes:
        check_task(policy, config.task)
    log.info(
        "%d demonstrations, %d samples; encoder %.1f M parameters, denoiser %.2f M",
        len(demos), len(windows), millions(policy.encoders), millions(policy.diffusion),
    )  # fmt: skip
    device = distributed.device_for_rank(config.device)
    frozen = config.encoder == "frozen"
    features = crop_features(policy, windows, config, device) if frozen and cameras else None
    task = PolicyTask(policy, config.noise_draws, frozen)
    loader = WindowLoader(
        windows,
        config.batch_size,
        config.epoch_steps,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        features=features,
    )
    best = _Best(out, config)

    def validate(net: nn.Module) -> dict[str, float]:
        assert isinstance(net, DiffusionPolicy)
        if not (simulated and config.episodes):
            return {}
        return best.measure(net, device)

    identity = {"demos": demos.fingerprint(), "cameras": list(cameras), "samples": len(windows)}
    distributed.all_equal(identity, "the run's demonstrations")
    with alone_in(out):
        result = train(task, loader, config, out, device=device, validate=validate, identity=identity, title=out.name)
    facts = {"kind": "policy", "config": config.to_dict(), "metrics": result.metrics}
    if distributed.is_main():
        save_policy(result.module, out / "policy", extra=facts)
    metrics = {
        **result.metrics,
        **best.reached(),
        "seconds": result.seconds,
        "steps": result.step,
        "samples_per_s": result.step * loader.rows(0) / max(result.seconds, 1e-9),
        "demos": len(demos),
    }
    return finish(out, "policy", config, metrics, {})


def open_demonstrations(config: PolicyConfig, out: Path) -> Demonstrations:
    """Those of a path, or of the task's expert: collected once, beside the runs that use them.

    Raises:
        ValueError: the task has no expert, or the demonstrations are of another task.
        DemoError: of the files.
    """
    if not config.demos.isdigit():
        demos = open_demos(config.demos, limit=config.demo_limit, cameras=config.cameras or None)
        if _is_simulated(config.task):
            wanted = task_spec(config.task).name
            if demos.format == "xdfast" and demos.task and demos.task != wanted:
                raise ValueError(f"{config.demos} holds demonstrations of {demos.task}, not of {wanted}")
        else:
            _check_own_name(config, demos)
        return demos
    if not _is_simulated(config.task):
        task_spec(config.task)  # an expert needs a simulator: this tells the nearest names
    from xdfast.robot.demos.collect import collect

    spec = task_spec(config.task)
    size = config.image_size or _DEFAULT_SIZE
    cameras = config.cameras or spec.cameras[:1]
    folder = expert_folder(out, spec.env, size, cameras, config.demo_seed, config.demo_noise)
    if distributed.is_main() and _episodes_in(folder) < int(config.demos):
        collect(
            spec.name,
            int(config.demos),
            folder,
            image_size=size,
            cameras=cameras,
            seed=config.demo_seed,
            noise=config.demo_noise,
            workers=config.workers,
            progress=config.progress,
        )
    distributed.barrier()
    return open_demos(folder, limit=int(config.demos))


def _check_own_name(config: PolicyConfig, demos: Demonstrations) -> None:
    """A task by a name of one's own is not simulated, which is said.

    Raises:
        ValueError: the name is almost that of the simulated task of the demonstrations.
    """
    told = str(demos.task)
    if told in task_names() and get_close_matches(
        config.task, [told, task_spec(told).env, task_spec(told).env.removesuffix("-v3")]
    ):
        raise ValueError(f"unknown task {config.task!r}; {config.demos} holds demonstrations of {told}: task={told!r}")
    log.warning(
        "task %r is none of those simulated here: nothing is evaluated.%s", config.task, nearest_tasks(config.task)
    )


def expert_folder(out: Path, env: str, size: int, cameras: Sequence[str], seed: int, noise: float = 0.0) -> Path:
    """Where the expert's demonstrations for the run in ``out`` lie: named by everything that determines them, so that runs
    of other encoders and seeds beside it find them, too."""
    noisy = f"-noise{noise}" if noise else ""
    return out.parent / "demos" / f"{env}-{size}px-{'-'.join(cameras)}-seed{seed}{noisy}"


def build_policy(
    config: PolicyConfig, windows: Windows, cameras: tuple[str, ...], demos: Demonstrations, model: Any = None
) -> DiffusionPolicy:
    """An untrained policy whose normalisation is fitted to the demonstrations; seeded, so that every rank starts equal."""
    seed_everything(config.seed, 1)
    height, width = windows.image_size
    size = config.crop or max(1, round(min(height, width) * 7 / 8))
    encoder, facts = build_encoder(
        model_source(config.model if model is None else model),
        norm=config.norm,
        image_size=config.model_size or size,
        pretrained=config.model_pretrained,
        options=config.model_options,
    )
    spec = PolicySpec(
        action_dim=demos.action_dim,
        state_dim=demos.state_dim,
        cameras=tuple(cameras),
        image_size=(height, width),
        crop=size,
        encoder=facts,
        n_obs=config.n_obs,
        horizon=config.horizon,
        n_action=config.n_action,
        feature_dim=config.feature_dim,
        unet_widths=tuple(config.unet_widths),
        kernel_size=config.kernel_size,
        share_encoder=config.share_encoder,
        diffusion=DiffusionSettings(config.scheduler, config.prediction, config.train_steps, config.inference_steps),
        task=task_spec(config.task).name if _is_simulated(config.task) else config.task,
        fps=int(demos.fps or 0),
    )
    policy = DiffusionPolicy(spec, encoder)
    policy.action_norm.fit(windows.actions.amin(0), windows.actions.amax(0))
    policy.state_norm.fit(windows.state.amin(0), windows.state.amax(0))
    return policy


@torch.no_grad()
def crop_features(policy: DiffusionPolicy, windows: Windows, config: PolicyConfig, device: torch.device) -> Tensor:
    """A frozen encoder's features of J fixed crops of every frame, ``[J, N, K, D]``; the first crop is the middle."""
    policy.to(device).eval()
    seed_everything(config.seed, 2)
    frames, cameras = len(windows), windows.images.shape[1]
    line = ProgressLine("features of the frozen encoder", config.feature_crops * frames, enabled=config.progress)
    parts = []
    for number in range(config.feature_crops):
        rows = []
        for start in range(0, frames, 128):
            images = windows.images[start : start + 128, :, None]  # [n, K, 1, H, W, 3]
            images = crop(images.flatten(0, 1), policy.spec.crop, at_random=number > 0).unflatten(0, (-1, cameras))
            with autocast(config, device):
                rows.append(policy.encode(images.to(device)).float().cpu()[:, :, 0])
            line.update(number * frames + min(start + 128, frames), f"crop {number + 1} of {config.feature_crops}")
        parts.append(torch.cat(rows))
    line.close()
    return torch.stack(parts)


def _episodes_in(folder: Path) -> int:
    return len(open_demos(folder)) if (folder / "manifest.json").is_file() and any(folder.glob("episodes/*")) else 0


class _Best:
    """Evaluates during training and keeps the policy that did best, over interruptions, too."""

    def __init__(self, out: Path, config: PolicyConfig) -> None:
        self._folder, self._config = out / "policy-best", config
        self.success = -1.0
        file = self._folder / "success.txt"
        if file.is_file():
            self.success = float(file.read_text(encoding="utf-8"))

    def measure(self, policy: DiffusionPolicy, device: torch.device) -> dict[str, float]:
        """Runs the episodes (on rank 0; all ranks get the rate)."""
        config = self._config
        rate = 0.0
        if distributed.is_main():
            seeds = range(config.eval_seed, config.eval_seed + config.episodes)
            line = ProgressLine(f"evaluation on {config.task}", len(seeds), enabled=config.progress)
            done: list[bool] = []

            def tell(result: Any) -> None:
                done.append(result.success)
                line.update(len(done), f"{sum(done)} solved")

            results = rollout(
                policy, config.task, seeds, envs=config.envs, max_steps=config.max_steps, device=device, on_episode=tell
            )
            rate = sum(result.success for result in results) / len(results)
            line.close(f"{sum(done)} of {len(done)} episodes solved")
            if rate > self.success:
                self.success = rate
                save_policy(policy, self._folder, extra={"kind": "policy", "success": rate})
                (self._folder / "success.txt").write_text(str(rate), encoding="utf-8")
        rate = distributed.sum_over_ranks([rate], device)[0]
        return {"success": rate}

    def reached(self) -> dict[str, float]:
        """The best rate, where more than one evaluation was made."""
        return {"best_success": self.success} if self._config.evaluate_every and self.success >= 0 else {}


def _check_renderer() -> None:
    from xdfast.robot.sim.gl import NoRendererError, renderer

    try:
        renderer()
    except NoRendererError as error:
        raise NoRendererError(f"{error}; or train without evaluations in simulation: episodes=0") from error


def _is_simulated(task: str) -> bool:
    """Whether a task's name is meant for a simulator; one without a simulator's name in front and no such task is not."""
    try:
        task_spec(task)
    except ValueError:
        if task.partition("/")[0] in ("metaworld", "adroit"):
            raise
        return False
    return True
