"""`la.norms` and `run.norms`: frames of steps and layers, against sums over the raw rows."""

import numpy as np
import pandas as pd
import pytest

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError


def test_a_layers_norm_is_the_root_of_its_tensors_squares(make_run) -> None:
    run = make_run(steps=12)
    frame = run.norms("grad_norm")
    assert frame.index.name == "step"
    assert list(frame.columns[: run.n_layers]) == list(range(run.n_layers))
    rows = run.metrics(["grad_norm"]).merge(run.parameters[["param_id", "layer"]], on="param_id")
    rows = rows.dropna()
    square = (rows["grad_norm"].astype(np.float64) ** 2).groupby([rows["step"], rows["layer"]])
    expected = np.sqrt(square.sum()).unstack()
    found = frame[list(range(run.n_layers))]
    np.testing.assert_allclose(found, expected.loc[found.index], rtol=1e-6)


def test_a_resting_layer_is_nan_and_a_path_or_a_run_is_the_same(make_run) -> None:
    run = make_run(method="lisa", steps=20)
    frame = run.norms("grad_norm")
    resting = frame[list(range(run.n_layers))].isna()
    assert resting.any().any()
    assert not resting.all(axis=1).any()  # some layer trains at each step
    pd.testing.assert_frame_equal(la.norms(run.path, "grad_norm"), frame)
    pd.testing.assert_frame_equal(la.norms(str(run.path)), frame)
    frame.iloc[:] = 0  # the caller's own
    assert run.norms("grad_norm").isna().any().any()


def test_kinds_modules_and_tensors_are_named(make_run) -> None:
    run = make_run(steps=5)
    assert "attn.q" in run.norms("grad_norm", by="kind").columns
    assert f"{run.layer_names[0]} attn.q" in run.norms("grad_norm", by="module").columns
    tensors = set(run.norms("weight_norm", by="tensor").columns)
    inside = run.parameters.dropna(subset=["layer"])["name"]
    assert set(inside) <= tensors


def test_what_cannot_be_had_is_one_sentence(make_run) -> None:
    run = make_run(steps=5)
    with pytest.raises(LisaError, match="Did you mean 'grad_norm'"):
        run.norms("grad_nrm")
    with pytest.raises(LisaError, match=r"one recorded column, got \['grad_norm'\]"):
        run.norms(["grad_norm"])
    with pytest.raises(LisaError, match="Did you mean 'layer'"):
        run.norms("grad_norm", by="layers")
    with pytest.raises(LisaError, match="got a int"):
        la.norms(3)
