"""What was measured per step and layer, and each question that can be put to it."""

from lisa_analysis.metrics import ablation, changes, gradients, probed, two_runs, updates, weights
from lisa_analysis.metrics.gradients import GradSnr
from lisa_analysis.metrics.log import Measurements
from lisa_analysis.metrics.registry import (
    METRICS,
    AtStart,
    Metric,
    find_metric,
    metric,
    metric_name,
)

__all__ = [
    "METRICS",
    "AtStart",
    "GradSnr",
    "Measurements",
    "Metric",
    "ablation",
    "changes",
    "find_metric",
    "gradients",
    "metric",
    "metric_name",
    "probed",
    "two_runs",
    "updates",
    "weights",
]
