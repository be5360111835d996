"""Which settings of a run leave its result alone: one list, for continuing runs and for putting them into one table."""

from __future__ import annotations

__all__ = ["FREE_SETTINGS"]

#: May differ when a run is continued, and between runs of one method.
FREE_SETTINGS = frozenset(
    {
        "out",
        "workers",
        "decoder",
        "overlap",
        "monitor",
        "device",
        "log_every",
        "checkpoint_seconds",
        "tensorboard",
        "progress",
        "overwrite",
        "stage1",  # where the heads are kept; how they are trained is told by settings of their own
        "parallel",  # these two: but for rounding, and the resume file is the same
        "channels_last",
    }
)
