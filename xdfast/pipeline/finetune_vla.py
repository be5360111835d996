"""``finetune`` for several tasks: one policy, told by a sentence what to do, learns from demonstrations of all."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from xdfast import distributed
from xdfast.pipeline.alone import alone_in
from xdfast.pipeline.folder import RunResult, finish, model_source, open_folder
from xdfast.pipeline.loop import train
from xdfast.pipeline.task import millions, seed_everything
from xdfast.pipeline.vla_config import VLAConfig
from xdfast.pipeline.vla_task import VLATask
from xdfast.pipeline.vla_tasks import evaluate_tasks, task_demonstrations
from xdfast.robot.demos.open import Demonstrations
from xdfast.robot.diffusion import DiffusionSettings
from xdfast.robot.encoder import build_encoder
from xdfast.robot.rollout import check_task
from xdfast.robot.sim.names import task_spec
from xdfast.robot.vla import CompactVLA, MultiTaskLoader, MultiTaskWindows, VLASpec, save_vla

__all__ = ["finetune_vla"]

log = logging.getLogger("xdfast")


def finetune_vla(config: VLAConfig, model: Any = None) -> RunResult:
    """Trains a compact VLA on several tasks; see :func:`xdfast.finetune`.

    Args:
        config: settings.
        model: a module, where the encoder is not given by a name.

    Raises:
        ValueError: bad settings, an unknown task or one twice, demonstrations that do not fit together.
        DemoError: of the demonstrations' files.
    """
    config.validate()
    names = [task_spec(task).name for task in config.tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"tasks names {twice} twice")
    distributed.init()
    out, finished = open_folder(config, "vla")
    if finished is not None:
        log.info("%s is finished; returning its result", out)
        return finished
    cameras = config.cameras or task_spec(names[0]).cameras[:1]
    demos = [
        task_demonstrations(
            config.demos, name, cameras, out, demo_seed=config.demo_seed, demo_noise=config.demo_noise,
            image_size=config.image_size, workers=config.workers, progress=config.progress,
        )
        for name in names
    ]  # fmt: skip
    size = None if config.image_size is None else (config.image_size, config.image_size)
    data = MultiTaskWindows(demos, cameras, horizon=config.horizon, image_size=size, tasks=names, scratch=out)
    vla = _build(config, data, cameras, demos, model)
    if config.episodes:
        for name in names:
            check_task(vla.for_task(name), name)  # now, not after hours of training
    log.info(
        "%d tasks, %d samples; encoder %.1f M parameters, %d layers %.2f M, %d tokens",
        len(names), len(data), millions(vla.encoder), config.layers, millions(vla.layers), vla.num_tokens,
    )  # fmt: skip
    device = distributed.device_for_rank(config.device)
    loader = MultiTaskLoader(
        data, vla.tokenizer, config.text_length, config.batch_size, config.epoch_steps, seed=config.seed,
        rank=distributed.rank(), world_size=distributed.world_size(),
    )  # fmt: skip
    identity = {"demos": [d.fingerprint() for d in demos], "cameras": list(cameras), "samples": len(data)}
    distributed.all_equal(identity, "the run's demonstrations")

    def validate(net: nn.Module) -> dict[str, float]:
        assert isinstance(net, CompactVLA)
        return evaluate_tasks(net, names, config, device) if config.episodes else {}

    with alone_in(out):
        task = VLATask(vla, config.noise_draws)
        result = train(task, loader, config, out, device=device, validate=validate, identity=identity, title=out.name)
    if distributed.is_main():
        facts = {"kind": "vla", "config": config.to_dict(), "metrics": result.metrics}
        save_vla(result.module, out / "vla", extra=facts)
    metrics = {
        **result.metrics,
        "seconds": result.seconds,
        "steps": result.step,
        "samples_per_s": result.step * loader.rows(0) / max(result.seconds, 1e-9),
        "tasks": float(len(names)),
    }
    return finish(out, "vla", config, metrics, {})


def _build(
    config: VLAConfig, data: MultiTaskWindows, cameras: tuple[str, ...], demos: list[Demonstrations], model: Any
) -> CompactVLA:
    """An untrained VLA whose normalisation is fitted to the demonstrations; seeded, so that every rank starts equal."""
    seed_everything(config.seed, 1)
    height, width = data.image_size
    size = config.crop or max(1, round(min(height, width) * 7 / 8))
    encoder, facts = build_encoder(
        model_source(config.model if model is None else model),
        norm=config.norm,
        image_size=size,
        pretrained=config.model_pretrained,
        options=config.model_options,
    )
    spec = VLASpec(
        action_dim=demos[0].action_dim,
        state_dim=demos[0].state_dim,
        cameras=tuple(cameras),
        image_size=(height, width),
        crop=size,
        encoder=facts,
        vocabulary=data.tokenizer().vocabulary,
        tasks=data.tasks,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        horizon=config.horizon,
        n_action=config.n_action,
        text_length=config.text_length,
        level=config.level,
        objective=config.objective,
        fps=int(demos[0].fps or 0),
        diffusion=_diffusion(config),
        denoiser_width=config.denoiser_width,
        denoiser_depth=config.denoiser_depth,
    )
    vla = CompactVLA(spec, encoder)
    data.fit(vla)
    return vla


def _diffusion(config: VLAConfig) -> DiffusionSettings | None:
    if config.objective != "diffusion":
        return None
    return DiffusionSettings(config.scheduler, config.prediction, config.train_steps, config.inference_steps)
