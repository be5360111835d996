"""Reporting: FLOPs (counted), speed and memory (measured), tables with intervals, one HTML page.

Counted and measured figures are never mixed. Nothing here knows the pipeline: it takes plain records and modules.
"""

from __future__ import annotations

from xdfast.reporting.flops import FlopCount, count_flops
from xdfast.reporting.page import build_report
from xdfast.reporting.records import Analysis, ModelRecord, PolicyRecord, Report, RunRecord, VLARecord
from xdfast.reporting.speed import SpeedTable, compare_speed
from xdfast.reporting.tables import compare_to_scratch, method_table, summarize

__all__ = [
    "Analysis",
    "FlopCount",
    "ModelRecord",
    "PolicyRecord",
    "Report",
    "RunRecord",
    "SpeedTable",
    "VLARecord",
    "build_report",
    "compare_speed",
    "compare_to_scratch",
    "count_flops",
    "method_table",
    "summarize",
]
