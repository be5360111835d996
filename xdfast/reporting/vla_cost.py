"""What a decision costs, one row per column of the tables: FLOPs that were counted, and latency that was measured, never mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from xdfast.reporting.groups import Group
from xdfast.reporting.vla_tables import role, vlas_of

__all__ = ["cost_rows"]


def cost_rows(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Rows of ``label``, ``role``, ``run`` (the measured one), ``counted``, ``measured``, ``machine``.

    ``counted``: ``stack`` and ``decision`` → ``dense``, ``nominal``, ``executed`` FLOPs for one observation, or None. The stack's
    are the mean over the decisions of the evaluated episodes; where an evaluation does not tell, over those that were measured.

    ``measured``: per ``batch``, ``fraction`` (executed share of the stack's FLOPs in these decisions), ``stack`` and ``decision``
    → ``dense`` and ``routed`` → ``p50``, ``p95`` in ms, and ``speedup_low``, ``speedup_high``; ``stack_speedup``,
    ``decision_speedup``: ratios of the medians; ``of_ideal``: stack_speedup · fraction, 1 if time is in proportion to FLOPs.

    Groups of whose cost nothing is known have no row.
    """
    rows = []
    known = [row for group in groups if role(group) not in ("teacher", "dense") and (row := _routed(group)) is not None]
    parts = [part for row in known if (part := _dense(row["counted"]))["stack"]]
    parts = [part for part in parts if part["decision"]] or parts  # those that know all
    dense = {repr(part): part for part in parts}
    for group in groups:
        if role(group) == "teacher" and len(dense) == 1:
            (counted,) = dense.values()
            rows.append({**_named(group), "run": None, "counted": counted, "measured": [], "machine": ""})
    return [*rows, *known]


def _named(group: Group) -> dict[str, Any]:
    return {"label": group.label, "role": role(group)}


def _routed(group: Group) -> dict[str, Any] | None:
    run = next((run for run in vlas_of(group) if run.cost), None)
    cost: dict[str, Any] = (run.cost or {}) if run is not None else {}
    told = [paths for one in vlas_of(group) for paths in one.paths.values() if paths["decisions"]]
    counted: dict[str, Any] = dict(cost.get("counted") or {"stack": None, "decision": None})
    if told:
        decisions = sum(paths["decisions"] for paths in told)
        mean = {k: sum(p[k] * p["decisions"] for p in told) / decisions for k in ("dense", "nominal", "executed")}
        if counted["stack"] and counted["decision"]:  # what is around the stack is the same for every path
            around = counted["decision"]["dense"] - counted["stack"]["dense"]
            counted["decision"] = {key: value + around for key, value in mean.items()}
        counted["stack"] = mean
    if counted["stack"] is None and not cost.get("measured"):
        return None
    return {
        **_named(group),
        "run": None if run is None else run.name,
        "counted": counted,
        "measured": [_timed(row) for row in cost.get("measured", [])],
        "machine": cost.get("machine", ""),
    }


def _timed(row: dict[str, Any]) -> dict[str, Any]:
    """Speedups of medians beside the times, and the transformer's as a fraction of the ideal one; None: not timed."""
    parts: dict[str, dict[str, Any]] = {part: row.get(part) or {} for part in ("stack", "decision")}
    speedups = {f"{part}_speedup": told.get("speedup") for part, told in parts.items()}
    fraction, speedup = row.get("fraction"), speedups["stack_speedup"]
    return {**row, **speedups, "of_ideal": fraction * speedup if fraction and speedup else None}


def _dense(counted: dict[str, Any]) -> dict[str, Any]:
    return {
        part: dict.fromkeys(("dense", "nominal", "executed"), round(counted[part]["dense"])) if counted[part] else None
        for part in ("stack", "decision")
    }
