"""Runs that differ only in their seed are one method; everything else that differs makes another."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xdfast.reporting.records import RunRecord
from xdfast.settings import FREE_SETTINGS

__all__ = ["Group", "group_runs"]

#: What does not make another method of a run: settings that leave its result alone, how often it was looked at, its seed.
_IGNORED = FREE_SETTINGS | {"seed", "kind", "eval_every"} | {"evaluate_every", "episodes", "eval_seed", "envs"}


@dataclass
class Group:
    """One method with one student and one set of settings.

    Attributes:
        label: for tables and legends; unique in the report.
        method, model_name: of all its runs.
        runs: one per seed.
    """

    label: str
    method: str
    model_name: str
    runs: list[RunRecord]

    @property
    def is_scratch(self) -> bool:
        """Whether it is the baseline that was trained from scratch."""
        return self.method == "from scratch"

    @property
    def best(self) -> RunRecord:
        """The run with the highest top-1; the first if none has one."""
        return max(self.runs, key=lambda run: _number(run.metrics.get("top1"), -1.0))

    def values(self, metric: str) -> list[float]:
        """The metric of each run that has it."""
        return [v for run in self.runs if (v := finite(run.metrics.get(metric))) is not None]

    def by_seed(self, metric: str) -> dict[int, float]:
        """Seed → metric, for runs that have both."""
        return {
            run.seed: v
            for run in self.runs
            if run.seed is not None and (v := finite(run.metrics.get(metric))) is not None
        }


def group_runs(records: Sequence[RunRecord]) -> tuple[list[Group], list[str]]:
    """(groups in order of first appearance, notes about runs that were left out).

    A second run with the same settings and the same seed is no repetition: it is left out of its group.

    Raises:
        ValueError: no records.
    """
    if not records:
        raise ValueError("a report needs at least one run record")
    found: dict[str, list[RunRecord]] = {}
    notes: list[str] = []
    for record in records:
        runs = found.setdefault(_key(record), [])
        twin = next((run for run in runs if run.seed is not None and run.seed == record.seed), None)
        if twin is not None:
            notes.append(
                f"{record.name} has the settings and the seed of {twin.name}, so it is not an independent repetition; "
                "it is left out of the tables."
            )
        else:
            runs.append(record)
    groups = [Group(runs[0].method, runs[0].method, runs[0].model_name, runs) for runs in found.values()]
    if len({group.model_name for group in groups}) > 1:
        for group in groups:
            group.label = f"{group.method} · {group.model_name}"
    _tell_apart(groups)
    return groups, notes


def finite(value: Any) -> float | None:
    """The number, or None if it is missing, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if value == value and abs(value) != float("inf") else None


def _number(value: Any, default: float) -> float:
    found = finite(value)
    return default if found is None else found


def _settings(record: RunRecord) -> dict[str, str]:
    return {
        key: _without_seed(json.dumps(value, sort_keys=True, default=str), record.seed)
        for key, value in record.config.items()
        if key not in _IGNORED
    }


def _without_seed(text: str, seed: int | None) -> str:
    """``runs/kd-s3`` and ``runs/kd-s4``, the starting points of runs with seeds 3 and 4, are the same setting."""
    return text if seed is None else re.sub(rf"(?<=[-_/.])(s|seed)[-_=]?{seed}(?![0-9a-zA-Z])", r"\1*", text)


def _key(record: RunRecord) -> str:
    return json.dumps([record.method, record.model_name, record.kind, _settings(record)], sort_keys=True)


def _tell_apart(groups: list[Group]) -> None:
    """Groups of the same name get the settings in which they differ."""
    for label, count in Counter(group.label for group in groups).items():
        if count == 1:
            continue
        same = [group for group in groups if group.label == label]
        settings = [_settings(group.runs[0]) for group in same]
        keys = sorted({key for s in settings for key in s})
        differing = [key for key in keys if len({s.get(key) for s in settings}) > 1][:3]
        for number, (group, values) in enumerate(zip(same, settings, strict=True), 1):
            told = ", ".join(f"{key}={_short(values.get(key))}" for key in differing)
            group.label = f"{label} ({told or f'#{number}'})"
    for label, count in Counter(group.label for group in groups).items():  # more than three settings differ
        if count > 1:
            for number, group in enumerate([g for g in groups if g.label == label], 1):
                group.label = f"{label} #{number}"


def _short(value: str | None) -> str:
    text = "unset" if value is None else value.strip('"')
    text = text.rstrip("/").rsplit("/", 1)[-1]
    return text if len(text) <= 32 else text[:31] + "…"
