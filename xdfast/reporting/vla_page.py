"""The part of a report that is about policies of several tasks: its figures, pictures and videos."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xdfast.reporting import vla_plots as plots
from xdfast.reporting.groups import Group
from xdfast.reporting.media import MOST_BYTES, choose_clips, data_uri
from xdfast.reporting.policy_tables import TaskGroups
from xdfast.reporting.policy_words import differing_settings, short
from xdfast.reporting.records import VLARecord
from xdfast.reporting.svg import Picture
from xdfast.reporting.vla_cost import cost_rows
from xdfast.reporting.vla_curves import curves
from xdfast.reporting.vla_tables import (
    column_rows,
    comparisons,
    groups_of,
    path_table,
    role,
    success_table,
    task_groups,
    vlas_of,
)
from xdfast.reporting.vla_words import findings, remarks, unsteady

__all__ = ["VLAPart", "vla_part"]

#: Most runs whose layers are drawn; the JSON has all.
_MOST_MAPS = 12


@dataclass(frozen=True)
class VLAPart:
    """Of a page.

    Attributes:
        data: for the JSON and the tables.
        headline: sentences with what was found.
        pictures: "pareto" and "training".
        routes: one per drawn run: ``label``, ``run``, ``picture``, ``times`` (picture or None), ``table``.
        clips: (task, [(label, videos with ``uri`` and ``words``)]) in order.
    """

    data: dict[str, Any]
    headline: list[str]
    pictures: dict[str, list[Picture]]
    routes: list[dict[str, Any]]
    clips: list[tuple[str, list[tuple[str, list[dict[str, str]]]]]]


def vla_part(records: Sequence[VLARecord]) -> VLAPart:
    """Everything about the policies.

    Raises:
        ValueError: no records.
    """
    groups, left_out = groups_of(records)
    tasks = task_groups(groups)
    columns, success, compared = column_rows(groups), success_table(groups), comparisons(groups)
    cost = cost_rows(groups)
    clips = choose_clips(tasks, MOST_BYTES)
    routed = [(group, run) for group in groups for run in vlas_of(group) if run.paths]
    data = {
        "columns": columns,
        "success": success,
        "comparisons": compared,
        "cost": cost,
        "measurements": [
            run.cost["measurement"]
            for group in groups
            for run in vlas_of(group)
            if run.cost and run.cost.get("measurement")
        ],
        "routing": [
            {"label": group.label, "run": run.name, "always_on": list(run.always_on), "tasks": run.paths}
            for group, run in routed
        ],
        "paths": [{"label": group.label, "run": run.name, **path_table([run])} for group, run in routed],
        "settings": differing_settings([TaskGroups("", _alike(groups))]),
        "remarks": [*remarks(groups, success["total"]), *unsteady(cost), *left_out, *clips.missing],
        "videos": [clip.to_dict() for clip in clips.shown],
        "videos_left_out": [clip.to_dict() for clip in clips.left_out],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matplotlib, about fonts
        drawn = {"pareto": [plots.pareto(columns, success["total"])], "training": [curves(groups)]}
        routes = [_route(group, run) for group, run in routed[:_MOST_MAPS]]
    return VLAPart(
        data,
        findings(columns, success["total"], compared, cost),
        {section: [p for p in found if p is not None] for section, found in drawn.items()},
        [route for route in routes if route["picture"]],
        _cards(tasks, clips.shown),
    )


def _alike(groups: Sequence[Group]) -> list[Group]:
    """Those whose settings can be compared: a student's are other ones than its teacher's."""
    dense = [group for group in groups if role(group) in ("teacher", "dense")]
    routed = [group for group in groups if group not in dense]
    return routed if len(routed) > 1 else dense


def _route(group: Group, run: VLARecord) -> dict[str, Any]:
    return {
        "label": group.label,
        "run": run.name,
        "role": role(group),
        "picture": plots.heat_maps(run, group.label),
        "times": plots.over_time(run, group.label),
        "table": path_table([run]),
    }


def _cards(
    tasks: Sequence[TaskGroups], shown: Sequence[Any]
) -> list[tuple[str, list[tuple[str, list[dict[str, str]]]]]]:
    """Videos by task, and within it by group: what differs stands side by side."""
    cards = []
    for task in tasks:
        parts = []
        for group in task.groups:
            mine = [
                {"words": clip.words, "run": clip.run, "uri": data_uri(clip.file, "video/mp4")}
                for clip in shown
                if (clip.task, clip.label) == (task.task, group.label)
            ]
            if mine:
                parts.append((group.label, mine))
        if parts:
            cards.append((short(task.task), parts))
    return cards
