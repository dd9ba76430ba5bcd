"""Signal and noise of probed batches: against dense gradients, and intervals that hold."""

import numpy as np
import pandas as pd
import pytest
from helpers_runs import write_run

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError, RunDirectoryError
from lisa_analysis.contract.schema import PROBES_DIR, PROBES_TABLE, shard_name
from lisa_analysis.metrics import probed
from lisa_analysis.rundir.shards import arrow_schema
from lisa_analysis.statistics.estimate import fit_series
from lisa_analysis.statistics.signal import signal_and_noise

LAYERS = 6


def dense(batches, mean, rng, elements=40):
    """Gradients of every batch and tensor, shape (batches, tensors, elements)."""
    noise = rng.normal(size=(batches, len(mean), elements)) / np.sqrt(elements)
    return mean[:, None] / np.sqrt(elements) + noise


def numbers(gradients):
    """‖g_b‖² and ⟨g_b, mean of the others⟩, by brute force over all pairs."""
    gram = np.einsum("bte,cte->tbc", gradients, gradients)
    squares = np.einsum("tbb->bt", gram)
    return squares, (gram.sum(axis=2).T - squares) / (len(gradients) - 1)


def write_probe(path, gradients, version="1.0", step=0):
    import pyarrow as pa
    import pyarrow.parquet as pq

    squares, agreement = numbers(gradients)
    batches, tensors = squares.shape
    frame = pd.DataFrame(
        {
            "step": step, "batch": np.repeat(np.arange(batches), tensors),
            "param_id": np.tile(np.arange(tensors), batches),
            "grad_norm": np.sqrt(squares).ravel(), "signal": agreement.ravel(),
        }
    )  # fmt: skip
    together = pd.DataFrame(
        {"step": step, "param_id": np.arange(tensors), "signal": agreement.mean(axis=0)}
    )
    rows = pd.concat([frame, together], ignore_index=True)
    rows["batch"] = rows["batch"].astype("Int32")
    table = pa.Table.from_pandas(
        rows.reindex(columns=list(PROBES_TABLE.names)), arrow_schema(PROBES_TABLE),
        preserve_index=False,
    )  # fmt: skip
    (path / PROBES_DIR).mkdir(exist_ok=True)
    table = table.replace_schema_metadata({"schema_version": version})
    pq.write_table(table, path / PROBES_DIR / shard_name(0, step))


@pytest.fixture
def probed_run(tmp_path):
    path = write_run(
        tmp_path / "probe", n_layers=LAYERS, steps=1, method="probe", kinds=("attn.q", "mlp.up")
    )
    frame = la.load(path).parameters
    layer = frame["layer"].astype("Float64").fillna(0).to_numpy(dtype=float)
    rng = np.random.default_rng(0)
    gradients = dense(32, 1.0 + (layer == 2), rng)
    write_probe(path, gradients)
    return path, frame, gradients


def test_scores_are_those_of_the_dense_gradients(probed_run):
    path, frame, gradients = probed_run
    profile = la.importance(path)
    assert profile.metric == "grad_signal"
    ratio = la.importance(path, "signal_to_noise")
    for layer in range(LAYERS):
        rows = np.flatnonzero((frame["layer"] == layer).fillna(False))
        elements = float(frame["numel"].iloc[rows].sum())
        g = gradients[:, rows].reshape(len(gradients), -1)
        squares, agreement = numbers(g[:, None, :])
        found = signal_and_noise(squares, agreement)
        # The score is free of the root's bias: close to the plain root, not equal.
        plain = np.sqrt(found.signal[0] / elements)
        assert profile[layer].score == pytest.approx(plain, rel=0.01)
        assert ratio[layer].score == pytest.approx(found.signal[0] / found.noise[0], rel=0.03)
        assert profile[layer].low < plain < profile[layer].high
        assert profile[layer].n_eff == len(gradients)


def test_a_layer_of_twice_the_gradient_stands_apart(probed_run):
    profile = la.importance(probed_run[0])
    others = [row.high for row in profile if row.layer != 2]
    assert profile[2].low > max(others)


@pytest.mark.parametrize(("batches", "ratio"), [(6, 0.3), (16, 0.05), (32, 3.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(batches, ratio):
    rng = np.random.default_rng(1)
    held = total = 0
    for _ in range(60):
        gradients = dense(batches, np.full(12, np.sqrt(ratio)), rng, elements=200)
        squares, agreement = numbers(gradients)
        values = probed._pseudo_values(
            squares, agreement, lambda signal, noise: np.sqrt(np.maximum(signal, 0))
        )
        fit = fit_series(
            values, log=False, clusters=None, confidence=0.95, rng=rng, remove_common=False,
            independent=True,
        )  # fmt: skip
        held += ((fit.low <= np.sqrt(ratio)) & (np.sqrt(ratio) <= fit.high)).sum()
        total += 12
    # Jackknife errors are too wide where there is little signal, never too narrow.
    assert 0.93 <= held / total <= 1.0


def test_few_batches_have_scores_and_no_interval(tmp_path):
    path = write_run(tmp_path / "run", n_layers=LAYERS, steps=1, method="probe")
    count = len(la.load(path).parameters)
    write_probe(path, dense(5, np.ones(count), np.random.default_rng(0)))
    frame = la.importance(path).to_frame()
    assert frame["score"].notna().all()
    assert frame["low"].isna().all()


def test_what_it_says_without_a_probe_or_with_a_damaged_one(probed_run, tmp_path):
    other = write_run(tmp_path / "other", n_layers=LAYERS, steps=20)
    with pytest.raises(LisaError, match="--config probe"):
        la.importance(other, "grad_signal")
    path = probed_run[0]
    [file] = (path / PROBES_DIR).iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunDirectoryError, match="restore it"):
        _ = la.load(path).probes
    # Nothing of training is asked of a probe.
    file.write_bytes(whole)
    assert not la.diagnose(path).findings


def add_probe(path, gradients, step):
    """Another probe of a run, after some steps."""
    import pyarrow.parquet as pq

    source = path.parent / f"other-{step}"
    source.mkdir()
    write_probe(source, gradients)
    table = pq.read_table(source / PROBES_DIR / shard_name(0, 0))
    index = table.schema.get_field_index("step")
    steps = np.full(len(table), step)
    table = table.set_column(index, table.schema.field(index), [steps.tolist()])
    pq.write_table(table, path / PROBES_DIR / shard_name(0, step))


def test_the_probe_of_a_step_is_chosen_behind_an_at(probed_run):
    path, frame, _ = probed_run
    before = la.importance(path).to_frame()
    rng = np.random.default_rng(5)
    layer = frame["layer"].astype("Float64").fillna(0).to_numpy(dtype=float)
    add_probe(path, dense(32, 1.0 + (layer == 4), rng), 100)
    newest = la.importance(path, "grad_signal")
    start = la.importance(path, "grad_signal@0")
    assert (start.to_frame()["score"] == before["score"]).all()
    assert int(newest.to_frame()["score"].to_numpy().argmax()) == 4
    assert int(start.to_frame()["score"].to_numpy().argmax()) == 2
    assert start.metric == "grad_signal@0"
    assert "probed after 0 steps" in start.definition
    # Several probes of one run stand side by side.
    assert sorted(la.load(path).probes["step"].unique()) == [0, 100]
    with pytest.raises(LisaError, match="no probe of step 7: it was probed after 0, 100"):
        la.importance(path, "signal_to_noise@7")
    with pytest.raises(LisaError, match=r"chooses the probe of grad_signal, signal_to_noise"):
        la.importance(path, "grad_rms@7")


@pytest.mark.parametrize("ratio", [0.05, 0.5])
def test_the_root_of_a_mean_whose_parts_lie_below_zero(ratio):
    """Steps whose signal is noise around `ratio`: the score is the root of their mean."""
    rng = np.random.default_rng(2)
    values = ratio + 0.3 * rng.normal(size=(400, 50))
    values[rng.random(values.shape) < 0.3] = np.nan  # layers that rested
    assert (np.nan_to_num(values) < 0).any()
    found = probed._pseudo_root(values)
    mean = np.nanmean(found, axis=0)
    np.testing.assert_allclose(mean, np.sqrt(np.nanmean(values, axis=0)), rtol=0.1)
    assert mean.mean() == pytest.approx(np.sqrt(ratio), rel=0.06)
    assert (np.isnan(found) == np.isnan(values)).all()
    # Their spread is that of the root: the delta method.
    error = np.nanstd(found, axis=0).mean() / np.sqrt(280)
    assert error == pytest.approx(0.3 / (2 * np.sqrt(ratio)) / np.sqrt(280), rel=0.1)


def test_what_never_has_a_signal_has_the_score_zero():
    found = probed._pseudo_root(np.full((10, 1), -1.0))
    assert (found == 0).all()


def test_two_probes_say_which_layers_rose_and_fell(tmp_path):
    path = write_run(tmp_path / "run", steps=8, n_layers=LAYERS, method="full")
    tensors = len(la.load(path).parameters)
    rng = np.random.default_rng(3)
    mean = np.full(tensors, 2.0)
    owner = la.load(path).parameters["layer"].to_numpy(dtype=float)
    factor = np.select([owner == 1, owner == 4], [3.0, 0.2], 1.0)
    write_probe(path, dense(12, mean, rng), step=0)
    with pytest.raises(LisaError, match="at 1 steps, and a change"):
        la.probe_change(path)
    write_probe(path, dense(12, mean * factor, rng), step=8)
    found = la.probe_change(path)
    assert (found.first, found.last) == (0, 8)
    assert found.layers["change"].tolist() == [
        "within",
        "rose",
        "within",
        "within",
        "fell",
        "within",
    ]
    np.testing.assert_allclose(found.layers["ratio"], [1, 3, 1, 1, 0.2, 1], rtol=0.15)
    assert "rose in layer 1 (×" in found.statement
    assert "fell in layer 4 (×" in found.statement
    assert not found.paired
    difference = found.after.scores - found.before.scores
    np.testing.assert_allclose(found.layers["difference"], difference, rtol=1e-6, atol=1e-12)
    assert found.layers["before"].tolist() == la.importance(path, "grad_signal@0").scores.tolist()
    assert (found.layers["ratio"] >= 0).all()
    page = la.report(path).html
    assert "What training changed" in page
    assert found.statement.split(" the gradient")[0] in page
