"""Metrics, the prediction beside the measurement, figures and the report."""

from grpo_jax.report.figure import draw_run
from grpo_jax.report.metrics import MetricsLog, read_rows
from grpo_jax.report.monitor import (
    exact_iterates,
    forecast,
    group_weights,
    header,
    mean_with_interval,
    outlook,
    probe_row,
)
from grpo_jax.report.progress import progress
from grpo_jax.report.result import make_result, named, pass_at_k
from grpo_jax.report.summary import report, table

__all__ = [
    "MetricsLog",
    "draw_run",
    "exact_iterates",
    "forecast",
    "group_weights",
    "header",
    "make_result",
    "mean_with_interval",
    "named",
    "outlook",
    "pass_at_k",
    "probe_row",
    "progress",
    "read_rows",
    "report",
    "table",
]
