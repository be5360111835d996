"""Stages of a task: which frame of a demonstration belongs to which, and how well an encoder's features tell them apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from xdfast.models import FeatureModel
from xdfast.robot.demos.episode import Episode
from xdfast.robot.pictures import crop
from xdfast.robot.policy import DiffusionPolicy

__all__ = ["PROGRESS_STAGES", "TIME_STAGES", "frame_stages", "stage_separation"]

#: Of demonstrations from MetaWorld.
PROGRESS_STAGES = ("approach", "at the object", "moving it", "done")
#: Of others.
TIME_STAGES = ("early", "middle", "late")

#: The simulator's measure of progress, 0 to 1. It moves in each of the 50 tasks; obj_to_target is 0 all along in five of
#: them, near_object is a flag in some, a distance or a reward in others, and grasp_success is 1 from the start in half.
_PROGRESS = "in_place_reward"
_REST = 0.1  # quantile that stands for "not yet moved": the very first values are off in some tasks (hammer)
_BEGUN = 0.1  # of the way from there to its largest value
_NEAR = 0.05  # metres; MetaWorld itself calls 3 to 5 cm "near"
_BATCH = 32


def frame_stages(episode: Episode) -> tuple[np.ndarray, tuple[str, ...]]:
    """The stage of each frame.

    Demonstrations from MetaWorld tell ``in_place_reward`` r (how far the object is on its way) and success. With a the first
    frame that shows success, and r_0 and r_1 the 10 % quantile and the largest r before it:

    * ``done``: from a on;
    * ``moving it``: before that, since r was last below r_0 + 0.1 (r_1 - r_0);
    * ``at the object``: before that, since the hand was last more than 5 cm from where it is when the moving begins (the hand's
      position in metres is the first three numbers of MetaWorld's proprioception);
    * ``approach``: before that.

    So stages follow each other, and one may be missing. What the simulator tells after an action belongs to the next frame.
    Demonstrations without these scalars, of other simulators or of a real robot, are cut into three parts of equal time.

    Args:
        episode: T steps.

    Returns:
        (int64 ``[T]`` numbers of stages, their names: :data:`PROGRESS_STAGES` or :data:`TIME_STAGES`).
    """
    steps = len(episode)
    progress = episode.info.get(_PROGRESS)
    solvable = episode.success is not None and episode.state.shape[1] >= 3 and steps > 1
    if progress is None or not solvable or not np.isfinite(progress).all():
        return np.arange(steps) * len(TIME_STAGES) // max(steps, 1), TIME_STAGES
    assert episode.success is not None
    before = np.concatenate([progress[:1], progress[:-1]])
    solved = np.concatenate([[False], episode.success[:-1]])
    done = max(1, int(np.argmax(solved))) if solved.any() else steps
    low, high = float(np.quantile(before[:done], _REST)), float(before[:done].max())
    below = np.flatnonzero(before[:done] < low + _BEGUN * (high - low))
    moving = int(below[-1]) + 1 if len(below) else 0
    hand = episode.state[:, :3]
    far = np.flatnonzero(np.linalg.norm(hand[:moving] - hand[min(moving, steps - 1)], axis=1) > _NEAR)
    there = int(far[-1]) + 1 if len(far) else 0
    frames = np.arange(steps)
    return (frames >= there).astype(np.int64) + (frames >= moving) + (frames >= done), PROGRESS_STAGES


def stage_separation(
    model: DiffusionPolicy | FeatureModel,
    demos: Any,
    *,
    frames: int = 400,
    cameras: tuple[str, ...] | None = None,
    crop_size: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """How far apart an encoder puts the stages of a task: silhouette score of its features, and their t-SNE.

    X-Distill (arXiv 2601.11269, section V-C) reports 0.472 for its encoder and names no metric; here it is the Euclidean distance,
    scikit-learn's default. The score compares encoders on the same frames; between tasks, or with other frames, it says little.

    Args:
        model: a policy (its encoder, cameras and crop), or an encoder alone.
        demos: :class:`xdfast.robot.demos.Demonstrations`, or another sequence of :class:`Episode` with ``cameras``.
        frames: how many are taken, evenly over all demonstrations.
        cameras: default: the policy's; of an encoder alone the demonstrations' first. Features of several are joined.
        crop_size: side of the middle square that is shown to it; default: the policy's crop; of an encoder alone all.
        seed: of t-SNE.

    Returns:
        ``silhouette`` in [-1, 1] (None where fewer than two stages occur), ``metric``, ``stages`` (names), ``counts`` (frames of
        each), ``labels`` ``[n]``, ``points`` ``[n, 2]`` of t-SNE, ``perplexity``, ``frames`` (n), ``rule`` ("progress" or "time").

    Raises:
        ValueError: a camera the demonstrations do not have, fewer than 8 frames, features that are not finite or all the same.
    """
    from sklearn.metrics import silhouette_score

    from xdfast.reporting.embedding import project

    spec = model.spec if isinstance(model, DiffusionPolicy) else None
    chosen: tuple[str, ...] = cameras or tuple(spec.cameras if spec is not None else demos.cameras[:1])
    if not chosen:
        raise ValueError("no camera: the policy does not look at pictures")
    missing = [camera for camera in chosen if camera not in demos.cameras]
    if missing:
        raise ValueError(f"the demonstrations have no camera {missing[0]!r}; they have: {', '.join(demos.cameras)}")
    if frames < 8:
        raise ValueError(f"frames must be ≥ 8, got {frames}")
    size = crop_size or (spec.crop if spec is not None else None)
    told = [(episode, *frame_stages(episode)) for episode in (demos.episode(i) for i in range(len(demos)))]
    if any(names is TIME_STAGES for _, _, names in told):  # one rule for all
        told = [(e, np.arange(len(e)) * len(TIME_STAGES) // max(len(e), 1), TIME_STAGES) for e, _, _ in told]
    names = told[0][2]
    total = sum(len(episode) for episode, _, _ in told)
    keep = np.unique(np.linspace(0, total - 1, min(frames, total)).round().astype(int))
    features, labels, start = [], [], 0
    for episode, stages, _ in told:
        rows = keep[(keep >= start) & (keep < start + len(episode))] - start
        start += len(episode)
        labels.append(stages[rows])
        features.append(_features(model, episode, rows, chosen, size))
    x, y = np.concatenate(features), np.concatenate(labels)
    if not np.ptp(x, axis=0).any():
        raise ValueError("the encoder gives the same features for every frame: there is nothing to tell apart")
    points, perplexity = project(x, seed)
    present = len(np.unique(y))
    score = float(silhouette_score(x, y, metric="euclidean")) if 2 <= present < len(y) else None
    return {
        "silhouette": score,
        "metric": "Euclidean",
        "stages": list(names),
        "counts": [int((y == k).sum()) for k in range(len(names))],
        "labels": y.tolist(),
        "points": points.astype(float).round(3).tolist(),
        "perplexity": float(perplexity),
        "frames": len(y),
        "rule": "progress" if names is PROGRESS_STAGES else "time",
    }


@torch.no_grad()
def _features(
    model: DiffusionPolicy | FeatureModel,
    episode: Episode,
    rows: np.ndarray,
    cameras: tuple[str, ...],
    size: int | None,
) -> np.ndarray:
    """float32 ``[n, K·D]`` of the frames ``rows``; the mode of the model is left as it was."""
    encoders = _encoders(model, cameras)
    parts = []
    for camera, encoder in zip(cameras, encoders, strict=True):
        modes = [(part, part.training) for part in encoder.modules()]
        encoder.eval()
        device = next(encoder.parameters()).device
        try:
            found = []
            for start in range(0, len(rows), _BATCH):
                pictures = _pictures(model, episode.images[camera][rows[start : start + _BATCH]])
                if size is not None:
                    pictures = crop(pictures[:, None], min(size, *pictures.shape[1:3]), at_random=False)[:, 0]
                pixels = pictures.to(device).permute(0, 3, 1, 2).float().div_(255)
                found.append(encoder(pixels).features.float().cpu())
        finally:
            for part, training in modes:
                part.training = training
        parts.append(torch.cat(found) if found else torch.empty(0, encoder.num_features))
    return torch.cat(parts, dim=1).numpy()


def _pictures(model: DiffusionPolicy | FeatureModel, images: np.ndarray) -> Tensor:
    """uint8 ``[n, H, W, 3]``, of the policy's size."""
    from xdfast.robot.windows import _resized

    pictures = torch.from_numpy(np.array(images))
    return _resized(pictures, model.spec.image_size) if isinstance(model, DiffusionPolicy) else pictures


def _encoders(model: DiffusionPolicy | FeatureModel, cameras: tuple[str, ...]) -> list[Any]:
    if not isinstance(model, DiffusionPolicy):
        return [model] * len(cameras)
    unknown = [camera for camera in cameras if camera not in model.spec.cameras]
    if unknown:
        raise ValueError(f"the policy has no camera {unknown[0]!r}; it has {', '.join(model.spec.cameras)}")
    if model.spec.share_encoder:
        return [model.encoders[0]] * len(cameras)
    return [model.encoders[model.spec.cameras.index(camera)] for camera in cameras]
