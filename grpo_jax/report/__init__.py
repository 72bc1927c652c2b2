"""Metrics, the prediction beside the measurement, figures and the report.

What computes with jax loads on first use, so that the command line, which compares what is on disk, starts fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from grpo_jax.report.evaluation import draw_evaluation, evaluation_page, evaluation_table, samples_text
from grpo_jax.report.figure import draw_run
from grpo_jax.report.metrics import MetricsLog, read_rows
from grpo_jax.report.progress import progress
from grpo_jax.report.summary import inline, report, table

if TYPE_CHECKING:
    from grpo_jax.report.monitor import (
        exact_iterates,
        forecast,
        group_weights,
        mean_with_interval,
        probe_row,
    )
    from grpo_jax.report.opening import header, outlook
    from grpo_jax.report.result import make_result, named, pass_at_k
    from grpo_jax.report.scores import majority_at_k, powers_of_two, summarise

_MODULES = {
    "exact_iterates": "monitor",
    "forecast": "monitor",
    "group_weights": "monitor",
    "header": "opening",
    "mean_with_interval": "monitor",
    "outlook": "opening",
    "probe_row": "monitor",
    "make_result": "result",
    "named": "result",
    "pass_at_k": "result",
    "majority_at_k": "scores",
    "powers_of_two": "scores",
    "summarise": "scores",
}

__all__ = [
    "MetricsLog",
    "draw_evaluation",
    "draw_run",
    "evaluation_page",
    "evaluation_table",
    "exact_iterates",
    "forecast",
    "group_weights",
    "header",
    "inline",
    "majority_at_k",
    "make_result",
    "mean_with_interval",
    "named",
    "outlook",
    "pass_at_k",
    "powers_of_two",
    "probe_row",
    "progress",
    "read_rows",
    "report",
    "samples_text",
    "summarise",
    "table",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'grpo_jax.report' has no attribute {name!r}")
    return getattr(import_module(f"grpo_jax.report.{_MODULES[name]}"), name)
