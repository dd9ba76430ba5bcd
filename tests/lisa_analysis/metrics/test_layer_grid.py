"""Grids and thinned series against brute-force sums; thinning hides nothing."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from helpers_runs import write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from lisa_analysis.metrics.layer_grid import LayerGrid, depth_bands, layer_grids
from lisa_analysis.metrics.thinning import thin
from lisa_analysis.rundir.opening import load
from lisa_analysis.views.plots.style import step_label


def test_layer_grid_is_the_root_of_the_summed_squares(tmp_path):
    run = load(write_run(tmp_path / "run", n_layers=5, steps=30, every=5, method="full"))
    grid = layer_grids(run, ["grad_norm"])["grad_norm"]
    rows = run.metrics(["grad_norm"]).merge(run.parameters[["param_id", "layer"]], on="param_id")
    rows = rows[(rows["step"] > 0) & rows["layer"].notna()]
    expected = rows.assign(square=rows["grad_norm"].astype(float) ** 2)
    expected = expected.groupby(["layer", "step"])["square"].sum().pow(0.5).unstack()
    assert grid.steps.tolist() == [1, 5, 10, 15, 20, 25, 30]
    np.testing.assert_allclose(grid.values, expected.to_numpy(dtype=float), rtol=1e-5)
    assert not grid.non_finite.any()


def test_frozen_layers_are_missing_and_nan_is_non_finite(tmp_path):
    run = load(write_run(tmp_path / "run", n_layers=4, steps=20, every=1, k=1, interval=5))
    grid = layer_grids(run, ["grad_norm"])["grad_norm"]
    drawn = run.events[run.events["event"] == "lisa_draw"]["layers"].tolist()
    for column, step in enumerate(grid.steps):
        active = set(np.flatnonzero(np.isfinite(grid.values[:, column])))
        assert active == set(drawn[(step - 1) // 5])
    bad = load(write_run(tmp_path / "bad", n_layers=4, steps=20, every=5, method="full", nan_at=10))
    grid = layer_grids(bad, ["grad_norm"])["grad_norm"]
    assert np.argwhere(grid.non_finite).tolist() == [[1, grid.steps.tolist().index(10)]]


def test_a_column_that_was_not_recorded_gives_an_empty_grid(tmp_path):
    run = load(write_run(tmp_path / "run", n_layers=3, steps=2, method="full"))
    grid = layer_grids(run, ["grad_norm_l1"])["grad_norm_l1"]
    assert grid.values.shape == (3, 0)
    assert len(grid) == 0


def test_thinned_grid_averages_neighbours_and_keeps_every_fault():
    rng = np.random.default_rng(0)
    values = rng.random((3, 1000))
    values[0, 200:260] = np.nan  # frozen for longer than a group
    non_finite = np.zeros(values.shape, dtype=bool)
    non_finite[2, 777] = True
    grid = LayerGrid("x", np.arange(1, 1001), values, non_finite)
    small, group = grid.thinned(100)
    assert group == 10
    assert small.steps[:3].tolist() == [1, 11, 21]
    np.testing.assert_allclose(small.values[1], values[1].reshape(100, 10).mean(axis=1))
    assert np.isnan(small.values[0, 20:26]).all()
    assert np.argwhere(small.non_finite).tolist() == [[2, 77]]
    assert grid.thinned(1000) == (grid, 1)


@given(hnp.arrays(float, st.integers(1, 500), elements=st.floats(-1e6, 1e6)), st.integers(1, 120))
@settings(max_examples=80, deadline=None)
def test_thinning_keeps_extremes_and_total(values, most):
    series = thin(np.arange(len(values)), values, most)
    assert len(series) <= most or len(series) == len(values) <= most
    assert series.low.min() == values.min()
    assert series.high.max() == values.max()
    slack = 1e-6 * (1 + np.abs(values).max())
    assert (series.low <= series.middle + slack).all()
    assert (series.middle <= series.high + slack).all()


def test_thinning_leaves_out_what_is_missing():
    series = thin([1, 2, 3], [1.0, np.nan, np.inf])
    assert series.x.tolist() == [1]
    assert series.group == 1


@pytest.mark.parametrize("n_layers", [1, 2, 3, 4, 5, 12, 31, 32, 80])
def test_depth_bands_split_the_stack_without_gap_or_overlap(n_layers):
    covered = [layer for part in depth_bands(n_layers).values() for layer in range(n_layers)[part]]
    assert covered == list(range(n_layers))


def test_axis_label_says_when_points_stand_for_several_records():
    assert step_label(1) == "optimizer step"
    assert "mean of 1,250 records" in step_label(1250)
