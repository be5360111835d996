"""A small teacher store, and what goes into it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from xdfast.data.store import TeacherStore

FACTS = {"teacher": {"weights": "sha256:ab12", "size": (224, 224)}, "precision": "bf16", "views": None}
OUTPUTS = {"features": 6, "logits": 3}
SAMPLES, VIEWS = 50, 2


def make(folder: Path, facts=FACTS, **changes) -> TeacherStore:
    settings = {"samples": SAMPLES, "views": VIEWS, "outputs": OUTPUTS, "dtype": "float32"} | changes
    return TeacherStore.open(folder, facts, **settings)


def outputs(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(count, width, generator=generator) for name, width in OUTPUTS.items()}


def everything() -> tuple[np.ndarray, np.ndarray]:
    row = np.random.default_rng(0).permutation(SAMPLES * VIEWS)
    return row % SAMPLES, row // SAMPLES


def fill(store: TeacherStore) -> tuple[np.ndarray, np.ndarray, dict[str, torch.Tensor]]:
    ids, views = everything()
    given = outputs(len(ids))
    store.write(ids, views, ids, given)
    return ids, views, given
