"""What the streams say, read in one place: draws, held-out losses, learning rates."""

import numpy as np
import pandas as pd
import pytest

from lisa_analysis.rundir.events import chosen, held_out_losses, learning_rates
from lisa_analysis.runs import losses
from lisa_analysis.runs.curves import held_out_frame
from lisa_analysis.runs.schedule import schedule_grid, visit_counts


def evaluations(*pairs):
    def edit(events):
        lines = [
            {"event": "evaluate", "step": step, "time": 1.0, "metrics": metrics}
            for step, metrics in pairs
        ]
        return [*(event for event in events if event["event"] != "evaluate"), *lines]

    return edit


def test_a_held_out_loss_is_the_same_for_curve_and_comparison(make_run):
    """An evaluation that gave no loss is not a loss of NaN; of two at a step the later counts."""
    edit = evaluations(
        (10, {"eval_loss": 2.0}), (20, {"eval_loss": None}), (5, {"eval_loss": 3.0}),
        (30, {"eval_accuracy": 0.5}), (40, {"eval_loss": "NaN"}), (10, {"eval_loss": 1.5}),
        (50, None),
    )  # fmt: skip
    run = make_run(steps=60, edit_events=edit)
    expected = pd.DataFrame({"step": [5, 10, 40], "value": [3.0, 1.5, np.nan]})
    pd.testing.assert_frame_equal(held_out_losses(run), expected)
    pd.testing.assert_frame_equal(held_out_frame(run), expected)
    curve = losses.evaluations(run, "a")
    assert curve["step"].tolist() == [5, 10, 40]
    np.testing.assert_array_equal(curve["held_out_loss"], expected["value"])


def test_without_evaluations_there_are_no_losses(make_run):
    frame = held_out_losses(make_run(steps=5, edit_events=evaluations()))
    assert list(frame) == ["step", "value"]
    assert frame.empty


def test_draws_of_every_layer_are_counted_once_and_for_all(make_run):
    drawn = [[0, 1], [1, 2], [1, 3], [0, 1]]
    run = make_run(method="lisa", steps=40, interval=10, profile=5, draws=drawn)
    held = chosen(run)
    assert held.shape == (4, 5)
    assert [np.flatnonzero(row).tolist() for row in held] == drawn
    visits = visit_counts(run)
    assert visits["observed"].tolist() == [2, 4, 1, 1, 0]
    grid = schedule_grid(run)
    assert grid.steps.tolist() == [0, 10, 20, 30]
    np.testing.assert_array_equal(grid.values, held.T)


def test_a_step_that_was_not_logged_has_the_rate_of_its_neighbour(make_run, monkeypatch):
    run = make_run(steps=5)
    scalars = pd.DataFrame({"step": [10, 20, 20, 30], "learning_rate": [1.0, 5.0, 2.0, np.nan]})
    monkeypatch.setattr(type(run), "scalars", scalars)
    assert learning_rates(run, np.array([0, 10, 14, 16, 99])) == pytest.approx([1, 1, 1, 2, 2])
    monkeypatch.setattr(type(run), "scalars", scalars.assign(learning_rate=np.nan))
    assert learning_rates(run, np.array([1])) is None
