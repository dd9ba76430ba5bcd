"""Plots: Axes in, Axes out; they read no files and show nothing."""

from lisa_analysis.views.plots.ablations import gain_and_forgetting as gain_and_forgetting
from lisa_analysis.views.plots.ablations import validity as validity
from lisa_analysis.views.plots.ablations import worth as worth
from lisa_analysis.views.plots.grids import heatmap as heatmap
from lisa_analysis.views.plots.grids import kind_grid as kind_grid
from lisa_analysis.views.plots.grids import learned_probabilities as learned_probabilities
from lisa_analysis.views.plots.grids import schedule as schedule
from lisa_analysis.views.plots.grids import visits as visits
from lisa_analysis.views.plots.lines import bands as bands
from lisa_analysis.views.plots.lines import curves as curves
from lisa_analysis.views.plots.lines import trajectories as trajectories
from lisa_analysis.views.plots.lines import update_ratio as update_ratio
from lisa_analysis.views.plots.panels import side_by_side as side_by_side
from lisa_analysis.views.plots.runs import comparison as comparison
from lisa_analysis.views.plots.runs import differences as differences
from lisa_analysis.views.plots.scores import probabilities as probabilities
from lisa_analysis.views.plots.scores import profile as profile
from lisa_analysis.views.plots.scores import profiles as profiles
from lisa_analysis.views.plots.scores import rank_stability as rank_stability
from lisa_analysis.views.plots.scores import strengths as strengths
