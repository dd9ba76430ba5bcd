"""What was measured per step and layer, and each question that can be put to it."""

from lisa_analysis.metrics import changes, gradients, two_runs, updates
from lisa_analysis.metrics.gradients import GradSnr
from lisa_analysis.metrics.registry import METRICS, AtStart, Metric, find_metric, metric

__all__ = [
    "METRICS",
    "AtStart",
    "GradSnr",
    "Metric",
    "changes",
    "find_metric",
    "gradients",
    "metric",
    "two_runs",
    "updates",
]
