"""Sums per step and layer against pandas, and what null, NaN and absence mean."""

import gc
import weakref

import numpy as np
import pyarrow as pa
import pytest

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics import log
from lisa_analysis.metrics.changes import growth_exponent
from lisa_analysis.metrics.gradients import running_mean
from lisa_analysis.metrics.layer_sums import Accumulator, Chunk, sum_batch, unpack
from lisa_analysis.metrics.log import measurements
from lisa_analysis.metrics.series import last_known
from lisa_analysis.metrics.step_tables import grouping, step_table
from lisa_analysis.rundir.events import draw_events, draws, ruling_draws


def by_pandas(run, column, power):
    """Layer sums the slow way."""
    frame = run.metrics([column]).merge(run.parameters[["param_id", "layer"]], on="param_id")
    frame = frame[(frame["step"] > 0) & frame["layer"].notna()].dropna()
    frame["part"] = frame[column].astype(float) ** power
    table = frame.pivot_table(index="step", columns="layer", values="part", aggfunc="sum")
    return table.reindex(columns=range(run.n_layers)).to_numpy(dtype=float) ** (1 / power)


@pytest.mark.parametrize("method", ["full", "lora", "lisa"])
def test_layer_norms_are_roots_of_summed_squares(make_run, method):
    run = make_run(method=method, steps=40, profile=5)
    table = step_table(run)
    for column, power in (("grad_norm", 2), ("update_norm", 2), ("descent", 1)):
        np.testing.assert_allclose(table[column][:, :5], by_pandas(run, column, power), rtol=1e-6)
    assert table.rows == len(run.metrics(["weight_norm"]))


def test_a_frame_has_named_axes_and_the_norms_of_the_layers(make_run):
    run = make_run(method="lisa", steps=20, interval=10, profile=4, draws=[[0, 1], [1, 2]])
    frame = step_table(run).to_frame("grad_norm")
    assert (frame.index.name, frame.columns.name) == ("step", "layer")
    assert frame.columns.tolist() == [0, 1, 2, 3, "embed", "norm"]
    np.testing.assert_allclose(frame[[0, 1, 2, 3]], by_pandas(run, "grad_norm", 2), rtol=1e-6)
    kinds = step_table(run, "kind").to_frame("grad_norm")
    assert kinds.columns.name == "kind"
    assert set(run.parameters["kind"]) == set(kinds.columns)


@pytest.mark.parametrize("level", ["layer", "kind", "module", "tensor"])
def test_total_is_the_same_at_every_level(make_run, level):
    run = make_run(steps=12, profile=4)
    table = step_table(run, level)
    squares = np.nansum(table["grad_norm"].astype(float) ** 2, axis=1)
    frame = run.metrics(["grad_norm"])
    expected = frame.assign(s=frame["grad_norm"].astype(float) ** 2).groupby("step")["s"].sum()
    np.testing.assert_allclose(squares, expected[expected.index > 0], rtol=1e-6)
    width = {"layer": 4, "kind": 2, "module": 8, "tensor": 8}[level]
    assert table.groups.inside == width
    assert table.groups.names[width:] == ("embed", "norm")
    assert len(set(table.groups.names)) == width + 2


def test_an_unknown_level_is_refused_with_a_suggestion(make_run):
    with pytest.raises(LisaError, match="Did you mean 'layer'"):
        grouping(make_run(steps=2), "layers")


def test_a_frozen_layer_is_absent_not_zero(make_run):
    run = make_run(method="lisa", steps=20, interval=10, profile=4, draws=[[0, 1], [1, 2]])
    table = step_table(run)
    norms = table["grad_norm"]
    assert np.isnan(norms[10:, 0]).all()
    assert np.isfinite(norms[:, 1]).all()
    assert np.isnan(norms[:, 3]).all()
    assert not table.trained[:, 3].any()
    assert table.numel[3] == 0


def test_not_measured_and_not_finite_are_different(make_run):
    def plant(frame):
        bad = (frame["step"] == 7) & (frame["param_id"] == 2)
        frame.loc[bad, "grad_norm"] = np.nan
        return frame

    run = make_run(steps=12, profile=4, edit=plant)
    table = step_table(run)
    layer = int(run.parameters.set_index("param_id").loc[2, "layer"])
    assert np.isinf(table["grad_norm"][6, layer])
    assert np.isfinite(np.delete(table["grad_norm"][:, :4].ravel(), 6 * 4 + layer)).all()
    assert table.first_non_finite == {"grad_norm": (7, 2)}
    assert "probe_grad_norm" not in table
    with pytest.raises(KeyError, match="probe_grad_norm was not recorded"):
        table["probe_grad_norm"]


def test_census_rows_of_frozen_tensors_do_not_count_as_training(make_run):
    run = make_run(steps=15, profile=4)
    plain = step_table(run)
    batches = Accumulator(plain.groups.of, len(plain.groups.names))
    frame = run.metrics()
    census = frame[frame["step"] == 0].assign(step=99)[["step", "param_id", "weight_norm"]]
    for part in (frame, census):
        measured = part.drop(columns=[c for c in part if part[c].isna().all()])
        batches.add(pa.RecordBatch.from_pandas(measured, preserve_index=False))
    chunks = batches.steps.finish()
    assert sum(len(chunk.steps) for chunk in chunks) == 15


def test_steps_cut_by_batches_are_completed(make_run):
    """Any cut of the rows into batches gives the same table."""
    run = make_run(steps=25, profile=5, method="lora")
    groups = grouping(run)
    frame = run.metrics()
    whole = step_table(run)["grad_norm"]
    rng = np.random.default_rng(0)
    for _ in range(5):
        cuts = np.sort(rng.integers(0, len(frame), 9))
        sums = Accumulator(groups.of, len(groups.names))
        for part in np.split(np.arange(len(frame)), cuts):
            rows = frame.iloc[part]
            rows = rows.drop(columns=[c for c in rows if rows[c].isna().all()])
            sums.add(pa.RecordBatch.from_pandas(rows, preserve_index=False))
        chunks = sums.steps.finish()
        joined = np.concatenate([chunk.sums["grad_norm"] for chunk in chunks])
        np.testing.assert_allclose(joined, whole, rtol=1e-6)


@pytest.mark.parametrize("method", ["full", "lora", "lisa"])
def test_the_last_value_of_every_tensor_is_its_last(make_run, method):
    """Wherever batches are cut, and with tensors that train only now and then."""
    run = make_run(steps=25, profile=5, method=method)
    groups = grouping(run)
    frame = run.metrics(["weight_norm", "grad_norm"])
    expected = frame.dropna(subset=["weight_norm"]).groupby("param_id")["weight_norm"].last()
    rng = np.random.default_rng(1)
    for cuts in (9, 60):
        sums = Accumulator(groups.of, len(groups.names))
        for part in np.split(np.arange(len(frame)), np.sort(rng.integers(0, len(frame), cuts))):
            sums.add(frame.iloc[part])
        last = sums.last["weight_norm"]
        np.testing.assert_allclose(last[expected.index], expected, rtol=0)
        assert np.isnan(np.delete(last, expected.index)).all()


def test_rows_in_any_order_within_a_batch(make_run):
    run = make_run(steps=9, profile=3)
    groups = grouping(run)
    rows = run.metrics(["grad_norm"], steps=slice(1, 10)).sample(frac=1, random_state=0)
    sums = Accumulator(groups.of, len(groups.names))
    sums.add(rows)
    (chunk,) = sums.steps.finish()
    np.testing.assert_allclose(chunk.sums["grad_norm"], step_table(run)["grad_norm"], rtol=1e-6)
    assert chunk.steps.tolist() == list(range(1, 10))


def test_nulls_are_left_out_of_sums():
    batch = pa.RecordBatch.from_pydict(
        {
            "step": pa.array([1, 1, 1], pa.int64()),
            "param_id": pa.array([0, 1, 2], pa.int32()),
            "grad_norm": pa.array([3.0, None, 4.0], pa.float32()),
            "opt_steps": pa.array([5, 7, None], pa.int32()),
            "delta_norm": pa.array([None, None, None], pa.float32()),
        }
    )
    step, ids, columns = unpack(batch)
    assert set(columns) == {"grad_norm", "opt_steps"}
    chunk = sum_batch(step, np.zeros(3, dtype=np.int64)[ids], columns, 2).finished()
    assert isinstance(chunk, Chunk)
    assert chunk.sums["grad_norm"][0, 0] == 5
    assert chunk.sums["opt_steps"][0, 0] == 6
    assert np.isnan(chunk.sums["grad_norm"][0, 1])


def test_norms_before_training_and_at_the_end(make_run):
    run = make_run(steps=30, profile=3, method="lora", rank=4)
    table = step_table(run)
    census = run.metrics(["weight_norm"], steps=[0]).merge(run.parameters, on="param_id")
    census["square"] = census["weight_norm"].astype(float) ** 2
    layer = census[census["layer"] == 1]
    adapters = layer[layer["role"] != "base"]["square"].sum() ** 0.5
    base = layer[layer["role"] == "base"]["square"].sum() ** 0.5
    assert table.initial[1] == pytest.approx(adapters, rel=1e-6)
    assert table.initial_base[1] == pytest.approx(base, rel=1e-6)
    assert table.numel[1] == layer[layer["role"] != "base"]["numel"].sum()
    assert np.isnan(step_table(make_run(steps=5, census=False)).initial).all()


def test_a_bias_beside_an_adapter_is_no_adapted_weight(make_run):
    """Biases of Whisper and BERT are larger than their weights, and no product BA adds to them."""

    def merged(frame):
        return frame.assign(merged_norm=np.where(frame["delta_norm"].notna(), 2.0, np.nan))

    run = make_run(steps=30, profile=3, method="lora", edit=merged)
    frame = run.parameters.copy()
    bias = frame["name"] == "model.layers.1.mlp.down_proj.base_layer.weight"
    frame.loc[bias, "name"] = "model.layers.1.mlp.down_proj.base_layer.bias"
    whole = step_table(make_run(steps=30, profile=3, method="lora", edit=merged))
    run.parameters = frame
    table = step_table(run)
    assert whole.initial_base[:3] == pytest.approx(np.sqrt(2) * 2.0)
    assert table.initial_base[:3] == pytest.approx([np.sqrt(8), 2.0, np.sqrt(8)])
    # Drift compares the same tensors at both ends.
    assert table.initial_merged[:3] == pytest.approx(table.final_merged[:3])


def test_tied_names_have_no_group(make_run):
    run = make_run(steps=3, profile=2)
    frame = run.parameters.copy()
    frame.loc[frame["kind"] == "norm", "tied_to"] = 0
    run.parameters = frame
    assert grouping(run).of[frame.loc[frame["kind"] == "norm", "param_id"]].tolist() == [-1]


def test_a_draw_rules_the_steps_after_it(make_run):
    run = make_run(method="lisa", steps=30, interval=10, profile=4, draws=[[0], [1], [2]], k=1)
    assert draws(run) == [(0, (0,)), (10, (1,)), (20, (2,))]
    assert ruling_draws(run, np.array([1, 10, 11, 20, 21])).tolist() == [0, 0, 1, 1, 2]
    assert draw_events(run)[0][2].tolist() == [0.25] * 4
    assert draws(make_run(steps=2)) == []


def test_a_finished_run_is_read_once(make_run):
    run = make_run(steps=4)
    assert step_table(run) is step_table(run)
    run.status = "running"
    assert step_table(run) is not step_table(run)


def test_what_metrics_look_at_is_made_once_and_given_up_with_the_run(make_run, monkeypatch):
    run = make_run(method="lisa", steps=20, interval=10, profile=4, draws=[[0, 1], [1, 2]])
    first = measurements(run)
    monkeypatch.setattr(log, "draws", None)  # is not asked again
    again = measurements(run)
    assert again.visits is first.visits
    assert again.table is first.table
    with pytest.raises(ValueError, match="read-only"):
        again.visits[0] = 2  # the next metric would look at it
    alive = weakref.ref(run)
    del run, first, again
    gc.collect()
    assert alive() is None


def test_running_mean_is_the_recurrence():
    x = np.random.default_rng(0).standard_normal(1000)
    expected, y = [], x[0]
    for t, value in enumerate(x):
        y = value if t == 0 else 0.85 * y + 0.15 * value
        expected.append(y)
    np.testing.assert_allclose(running_mean(x, 0.85, start=x[:1]), expected, atol=1e-12)


def test_last_known_skips_what_is_missing():
    values = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.inf]])
    assert last_known(values)[0] == 2
    assert np.isnan(last_known(values)[1])


@pytest.mark.parametrize("power", [0.5, 0.8, 1.0])
def test_growth_exponent_is_the_planted_one(power):
    rng = np.random.default_rng(1)
    interval = np.repeat(np.arange(60), 5)
    chosen = np.zeros((60, 6), dtype=bool)
    for row in chosen:
        row[rng.choice(6, 2, replace=False)] = True
    visits = np.cumsum(chosen, axis=0)[interval]
    change = np.where(chosen[interval], 0.3 * np.maximum(visits, 1) ** power, np.nan)
    assert growth_exponent(change, visits, interval, 6) == pytest.approx(power, abs=1e-9)
