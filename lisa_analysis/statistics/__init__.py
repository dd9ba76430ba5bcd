"""Statistics of layer profiles: arrays in, arrays and small frozen results out (numpy only)."""

from lisa_analysis.statistics.autocorrelation import (
    block_length,
    intraclass_correlation,
)
from lisa_analysis.statistics.bootstrap import (
    Interval,
    block_totals,
    cluster_totals,
    t_quantile,
)
from lisa_analysis.statistics.concentration import (
    Concentration,
    coefficient_of_variation,
    effective_layers,
    ends_to_middle,
    gini,
    headroom,
    top_share,
)
from lisa_analysis.statistics.effects import Effects, additive_effects
from lisa_analysis.statistics.shape import (
    Shape,
    above_the_course,
    quadratic_fit,
    two_lines,
    u_shape,
)
from lisa_analysis.statistics.stability import (
    jensen_shannon,
    kendall_tau,
    kendall_taus,
    kendall_w,
    page_hinkley,
    pearson,
    ranks,
    spearman,
    spearman_brown,
    top_jaccard,
)

__all__ = [
    "Concentration",
    "Effects",
    "Interval",
    "Shape",
    "above_the_course",
    "additive_effects",
    "block_length",
    "block_totals",
    "cluster_totals",
    "coefficient_of_variation",
    "effective_layers",
    "ends_to_middle",
    "gini",
    "headroom",
    "intraclass_correlation",
    "jensen_shannon",
    "kendall_tau",
    "kendall_taus",
    "kendall_w",
    "page_hinkley",
    "pearson",
    "quadratic_fit",
    "ranks",
    "spearman",
    "spearman_brown",
    "t_quantile",
    "top_jaccard",
    "top_share",
    "two_lines",
    "u_shape",
]
