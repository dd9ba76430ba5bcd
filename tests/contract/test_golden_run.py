"""The committed run of schema 1.0: readable for ever, with the numbers it was written with."""

from pathlib import Path

import numpy as np
import pytest

import lisa_analysis as la

RUN = la.load(Path(__file__).resolve().parents[1] / "data" / "golden-run")


def test_the_manifest_reads() -> None:
    assert RUN.manifest["schema_version"] == "1.0"
    assert (RUN.status, RUN.method, RUN.n_layers) == ("finished", "full", 8)
    assert RUN.layer_names[7] == "model.layers.7"
    assert RUN.warnings == []


def test_the_tables_read() -> None:
    assert len(RUN.parameters) == 75  # 8 × 9 + embedding, norm, and the tied head's name
    assert list(RUN.scalars["step"]) == list(range(1, 241))
    assert list(RUN.events.query("event == 'evaluate'")["step"]) == [0, 80, 160, 240]
    metrics = RUN.metrics()
    assert sorted(metrics["step"].unique()) == [0, 1, *range(3, 241, 3)]


def test_the_root_of_summed_squares_is_the_trainers_own_gradient_norm() -> None:
    """Nothing was left out or counted twice when the run was written."""
    metrics = RUN.metrics(columns=["grad_norm"]).dropna()
    squares = metrics["grad_norm"].astype(float) ** 2
    ours = np.sqrt(squares.groupby(metrics["step"]).sum())
    theirs = RUN.scalars.set_index("step")["grad_norm"].reindex(ours.index)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_steps_add_up_to_at_least_the_way_travelled() -> None:
    """‖W_240 − W_0‖ cannot exceed the path; both were written, so both can be checked."""
    metrics = RUN.metrics(columns=["update_norm", "delta_norm"])
    path = metrics.groupby("param_id")["update_norm"].sum()
    last = metrics[metrics["step"] == 240].set_index("param_id")["delta_norm"].dropna()
    if last.empty:
        pytest.fail("the last census holds no delta_norm")
    # Every third step is recorded: the whole path is about three times the recorded one.
    assert (last < 4 * path[last.index]).all()
