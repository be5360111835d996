"""``report``: from runs and evaluations to one page."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdfast.models import FeatureModel, create_model
from xdfast.pipeline.config import TrainConfig
from xdfast.pipeline.evaluate import EvaluateResult, load_evaluation
from xdfast.pipeline.folder import RunResult, load_run
from xdfast.pipeline.train_run import model_source

__all__ = ["report"]

log = logging.getLogger("xdfast")


def method_of(run: RunResult) -> str:
    """What a run is called in tables: its loss, or "from scratch"/"fine-tuned"."""
    if run.kind == "distill":
        return str(run.config["loss"]).upper() if run.config["loss"] != "mse" else "MSE"
    return "from scratch" if not run.config.get("student_pretrained") else "fine-tuned"
