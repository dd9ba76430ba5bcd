"""The writer: what reaches the disk, when, and what happens when the disk refuses."""

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

import lisa_train.measure.disk.storage as storage
from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.rundir.opening import load
from lisa_train.measure.disk.writer import RunWriter

MANIFEST = {
    "method": "full",
    "layers": [{"index": i, "name": f"model.layers.{i}", "stack": "model.layers"} for i in (0, 1)],
}


def parameters(n=4):
    return [
        {
            "param_id": i, "name": f"model.layers.{i % 2}.w{i}.weight", "layer": i % 2,
            "kind": "attn.q", "role": "base", "numel": 10, "shape": "5x2", "dtype": "float32",
            "tied_to": None,
        }
        for i in range(n)
    ]  # fmt: skip


def open_run(path, **options):
    return RunWriter(path, manifest=MANIFEST, parameters=parameters(), **options)


def rows(step, n=4, value=1.0):
    return {
        "step": np.full(n, step),
        "param_id": np.arange(n),
        "grad_norm": np.full(n, value, np.float32),
    }


def shards(path):
    return sorted(p.name for p in (path / "metrics").iterdir())


def test_what_is_written_is_read_back_with_null_apart_from_nan(tmp_path):
    writer = open_run(tmp_path / "run", config_yaml="a: 1\n")
    update = np.ma.array([1.0, np.nan, np.inf, 7.0], mask=[0, 0, 0, 1])
    writer.write_metrics({**rows(1, value=2.5), "update_norm": update})
    writer.write_metrics(rows(2))
    writer.scalars({"step": 1, "loss": float("nan"), "tokens": 7})
    writer.event("evaluate", 2, metrics={"eval_loss": float("inf"), "n": np.int64(3)})
    writer.close()

    run = load(tmp_path / "run")
    assert run.status == "finished"
    assert (tmp_path / "run" / "config.yaml").read_text() == "a: 1\n"
    [batch] = run.iter_metrics(["update_norm"], steps=[1])
    ordered = batch.sort_by("param_id").column("update_norm").to_pylist()
    assert ordered[0] == 1.0
    assert np.isnan(ordered[1])
    assert ordered[2:] == [np.inf, None]
    assert run.non_finite()["param_id"].tolist() == [1, 2]
    assert run.metrics(["grad_norm"])["grad_norm"].tolist() == [2.5] * 4 + [1.0] * 4
    assert run.metrics(["update_norm"], steps=[2])["update_norm"].isna().all()
    assert np.isnan(run.scalars.loss[0])
    assert run.events.metrics[0] == {"eval_loss": "Infinity", "n": 3}


def test_nothing_but_whole_files_is_left_and_a_flush_never_touches_an_earlier_one(tmp_path):
    writer = open_run(tmp_path / "run")
    writer.write_metrics(rows(1))
    writer.flush()
    [first] = shards(tmp_path / "run")
    before = (tmp_path / "run" / "metrics" / first).stat()
    writer.write_metrics(rows(2))
    writer.close()
    assert shards(tmp_path / "run") == ["part-000-00000001.parquet", "part-000-00000002.parquet"]
    after = (tmp_path / "run" / "metrics" / first).stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_step_that_was_flushed_cannot_be_overwritten(tmp_path):
    writer = open_run(tmp_path / "run")
    writer.write_metrics(rows(1))
    writer.flush()
    writer.write_metrics(rows(1, value=9.0))
    with pytest.raises(RunDirectoryError, match="flushed twice"):
        writer.flush()
    assert load(tmp_path / "run").metrics()["grad_norm"].tolist() == [1.0] * 4


def test_a_directory_with_a_run_is_refused(tmp_path):
    open_run(tmp_path / "run").close()
    with pytest.raises(RunDirectoryError, match="already holds a run: choose another"):
        open_run(tmp_path / "run")
    assert load(tmp_path / "run").status == "finished"


def test_there_is_nothing_to_resume_in_an_empty_directory(tmp_path):
    with pytest.raises(RunDirectoryError, match="holds no run to resume"):
        open_run(tmp_path / "run", resume=True)


def test_unknown_names_are_programming_errors(tmp_path):
    writer = open_run(tmp_path / "run")
    with pytest.raises(ValueError, match="Did you mean 'grad_norm'"):
        writer.write_metrics({"step": np.array([1]), "grad_nrm": np.array([1.0])})
    with pytest.raises(ValueError, match="Did you mean 'loss'"):
        writer.scalars({"step": 1, "los": 1.0})
    with pytest.raises(ValueError, match="Did you mean 'evaluate'"):
        writer.event("evaluat", 1)


def test_a_resume_opens_a_segment_and_voids_what_lay_beyond_its_start(tmp_path):
    writer = open_run(tmp_path / "run")
    for step in range(1, 6):
        writer.write_metrics(rows(step, value=1.0))
        writer.scalars({"step": step, "loss": 1.0})
        writer.event("warning", step, message="old")
        writer.flush()
    writer.close("interrupted")
    writer = open_run(tmp_path / "run", resume=True, step=3, checkpoint="checkpoints/checkpoint-3")
    run = load(tmp_path / "run")
    assert run.status == "running"
    assert run.scalars.step.tolist() == [1, 2, 3]
    writer.write_metrics(rows(4, value=2.0))
    writer.scalars({"step": 4, "loss": 2.0})
    writer.close()

    run = load(tmp_path / "run")
    frame = run.metrics()
    assert frame.groupby("step").grad_norm.max().to_dict() == {1: 1.0, 2: 1.0, 3: 1.0, 4: 2.0}
    assert not frame.duplicated(["step", "param_id"]).any()
    assert run.scalars.loss.tolist() == [1.0, 1.0, 1.0, 2.0]
    assert run.events.event.tolist() == ["warning"] * 3 + ["resume"]
    assert run.events.checkpoint.iloc[-1] == "checkpoints/checkpoint-3"
    assert run.manifest["segment"] == 1


def test_a_resume_with_another_model_is_refused(tmp_path):
    open_run(tmp_path / "run").close()
    with pytest.raises(RunDirectoryError, match=r"another model .4 tensors, this one has 5"):
        RunWriter(tmp_path / "run", manifest=MANIFEST, parameters=parameters(5), resume=True)


def test_a_line_that_a_kill_cut_off_is_removed_by_the_resume(tmp_path):
    writer = open_run(tmp_path / "run")
    writer.scalars({"step": 1, "loss": 1.0})
    writer.close("interrupted")
    with (tmp_path / "run" / "scalars.jsonl").open("a") as handle:
        handle.write('{"step":2,"lo')
    run = load(tmp_path / "run")
    assert run.scalars.step.tolist() == [1]
    assert "cut off" in run.warnings[0]
    writer = open_run(tmp_path / "run", resume=True, step=1)
    writer.scalars({"step": 2, "loss": 3.0})
    writer.close()
    assert load(tmp_path / "run").scalars.loss.tolist() == [1.0, 3.0]


def test_an_event_after_the_end_is_still_written(tmp_path):
    writer = open_run(tmp_path / "run")
    writer.close()
    writer.event("evaluate", 3, metrics={"eval_loss": 1.0})
    assert load(tmp_path / "run").events.event.tolist() == ["evaluate"]


# --- the disk refuses ---------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_the_next_flush_catches_up(tmp_path, monkeypatch):
    writer = open_run(tmp_path / "run")
    writer.write_metrics(rows(1))
    writer.flush()
    writer.write_metrics(rows(2))
    writer.scalars({"step": 2, "loss": 1.0})

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)
        with pytest.raises(RunDirectoryError, match="No space left on device"):
            writer.flush()
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert load(tmp_path / "run").metrics()["step"].unique().tolist() == [1]
    writer.write_metrics(rows(3))
    writer.flush()
    assert load(tmp_path / "run").metrics()["step"].unique().tolist() == [1, 2, 3]
    assert load(tmp_path / "run").scalars.step.tolist() == [2]


def test_half_a_line_on_a_full_disk_is_taken_back(tmp_path, monkeypatch):
    file = storage.LineFile(tmp_path / "lines")
    file.append(['{"a":1}'])

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "fsync", full)  # the bytes are in the file by then
        with pytest.raises(OSError, match="No space"):
            file.append(['{"a":2}'])
    assert (tmp_path / "lines").read_text() == '{"a":1}\n'
    file.append(['{"a":3}'])
    assert (tmp_path / "lines").read_text() == '{"a":1}\n{"a":3}\n'


def test_a_read_only_directory_is_one_sentence(tmp_path, monkeypatch):
    def refuse(path, flags, *args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "open", refuse)  # the tests may run as root, who may write
        with pytest.raises(RunDirectoryError, match=r"cannot be written .Read-only file system"):
            open_run(tmp_path / "run")


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        open_run(tmp_path / "run")


def test_a_real_limit_on_file_size(tmp_path):
    """The kernel refuses in the middle of a write; in a process of its own, as limits stay."""
    import resource

    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            writer = open_run(tmp_path / "run")
            writer.scalars({"step": 1, "loss": 1.0})
            writer.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
            for step in range(2, 100):
                writer.scalars({"step": step, "loss": 1.0})
            with pytest.raises(RunDirectoryError, match="File too large"):
                writer.flush()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    run = load(tmp_path / "run")
    assert run.status == "interrupted"
    assert run.scalars["step"].tolist() == [1]
    assert run.warnings == []


def test_rows_waiting_for_a_disk_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("lisa_train.measure.disk.writer.MAX_WAITING_ROWS", 10)
    monkeypatch.setattr(RunWriter, "_write_shard", lambda self: (_ for _ in ()).throw(OSError(28)))
    writer = open_run(tmp_path / "run")
    for step in range(1, 50):
        writer.write_metrics(rows(step))
        with pytest.raises(RunDirectoryError):
            writer.flush()
    assert writer.waiting_rows <= 10


# --- two processes ------------------------------------------------------------------------------


def _hold(path, ready, leave):
    writer = open_run(Path(path))
    ready.set()
    leave.wait(60)
    writer.close()


def test_two_processes_on_one_directory(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path / "run"), ready, leave))
    other.start()
    assert ready.wait(60)
    assert load(tmp_path / "run").status == "running"
    with pytest.raises(RunDirectoryError, match="being written by another process"):
        open_run(tmp_path / "run", resume=True)
    other.kill()
    other.join()
    assert load(tmp_path / "run").status == "interrupted"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    open_run(tmp_path / "run", resume=True).close()
    assert load(tmp_path / "run").status == "finished"


def test_a_forked_worker_does_not_keep_the_run_alive(tmp_path):
    writer = open_run(tmp_path / "run")
    read_end, write_end = os.pipe()
    started, announce = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write_end)
        os.write(announce, b"1")
        os.read(read_end, 1)  # until the parent lets go
        os._exit(0)
    os.close(read_end)
    os.read(started, 1)
    assert load(tmp_path / "run").status == "running"
    writer._lock.release()  # what the kernel does when the training process is killed
    assert load(tmp_path / "run").status == "interrupted"
    os.close(write_end)
    os.waitpid(child, 0)


# --- precision and other tools ------------------------------------------------------------------


def test_numbers_keep_eighteen_bits():
    from lisa_train.measure.disk.encoding import round_bits

    values = np.random.default_rng(0).lognormal(0, 10, 100_000).astype(np.float32)
    values[::2] *= -1
    rounded = round_bits(values)
    assert np.abs(rounded.astype(float) / values.astype(float) - 1).max() <= 2.0**-18
    assert abs((rounded.astype(float) / values - 1).mean()) < 1e-7  # to the nearest, not down
    assert (round_bits(rounded) == rounded).all()
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0], np.float32)
    np.testing.assert_array_equal(round_bits(special), special)


def test_a_recorded_tensor_and_step_is_twelve_bytes(tmp_path):
    """The default quantities with mantissas as random as those of a real run."""
    rng = np.random.default_rng(0)
    n, steps = 200, 50
    writer = RunWriter(tmp_path / "run", manifest=MANIFEST, parameters=parameters(n))
    scale = rng.lognormal(0, 1, n)
    for step in range(10, 10 * (steps + 1), 10):
        columns = {"step": np.full(n, step), "param_id": np.arange(n)}
        for name in ("weight_norm", "grad_norm", "grad_norm_l1", "update_norm", "descent"):
            # Weights hardly move from one recorded step to the next; all else jumps.
            spread = 1e-4 if name == "weight_norm" else 0.2
            columns[name] = (scale * rng.lognormal(0, spread, n)).astype(np.float32)
        columns["opt_steps"] = np.full(n, step, np.int32)
        writer.write_metrics(columns)
    writer.close()
    [shard] = (tmp_path / "run" / "metrics").iterdir()
    assert shard.stat().st_size / (n * steps) <= 12


@pytest.fixture
def three_steps(tmp_path):
    writer = open_run(tmp_path / "run")
    for step in (1, 2, 3):
        writer.write_metrics(rows(step, value=float(step)))
        writer.scalars({"step": step, "loss": float("nan") if step == 2 else 1.0 / step})
        writer.flush()
    writer.close()
    return str(tmp_path / "run")


def test_duckdb_reads_the_files(three_steps):
    import duckdb

    query = f"""
        SELECT p.layer, m.step, sqrt(sum(m.grad_norm ** 2)) AS grad_norm
        FROM '{three_steps}/metrics/*.parquet' m
        JOIN '{three_steps}/parameters.parquet' p USING (param_id)
        WHERE m.step >= 2 GROUP BY ALL ORDER BY ALL
    """
    found = duckdb.sql(query).fetchall()
    expected = [(layer, step, step * 2**0.5) for layer in (0, 1) for step in (2, 3)]
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected])
    loss = duckdb.sql(f"SELECT step, loss::DOUBLE FROM '{three_steps}/scalars.jsonl'").fetchall()
    assert [step for step, _ in loss] == [1, 2, 3]
    assert np.isnan(loss[1][1])


def test_polars_reads_the_files(three_steps):
    import polars as pl

    metrics = pl.scan_parquet(f"{three_steps}/metrics/*.parquet")
    parameters = pl.scan_parquet(f"{three_steps}/parameters.parquet")
    found = (
        metrics.filter(pl.col("step") >= 2)
        .join(parameters, on="param_id")
        .group_by("layer", "step")
        .agg((pl.col("grad_norm") ** 2).sum().sqrt())
        .sort("layer", "step")
        .collect()
    )
    assert found["step"].to_list() == [2, 3, 2, 3]
    assert found["grad_norm"].to_list() == pytest.approx([s * 2**0.5 for s in (2, 3, 2, 3)])


def test_pandas_reads_the_files(three_steps):
    import pandas as pd

    metrics = pd.read_parquet(f"{three_steps}/metrics")
    parameters = pd.read_parquet(f"{three_steps}/parameters.parquet")
    joined = metrics.merge(parameters, on="param_id")
    found = joined.groupby(["layer", "step"])["grad_norm"].agg(lambda x: (x**2).sum() ** 0.5)
    assert found.loc[1, 3] == pytest.approx(3 * 2**0.5)
    scalars = pd.read_json(f"{three_steps}/scalars.jsonl", lines=True)
    assert scalars["step"].tolist() == [1, 2, 3]


class _StopError(Exception):
    pass


def _stop(number, frame):
    raise _StopError


@pytest.mark.parametrize("at", range(1, 6))
def test_a_stop_inside_a_flush_loses_no_line_and_doubles_none(tmp_path, monkeypatch, at):
    """A signal that came during `fsync` is raised as it returns: what it wrote is on the disk."""
    writer = open_run(tmp_path / "run")
    writer.write_metrics(rows(1))
    writer.scalars({"step": 1, "loss": 2.0})
    writer.event("checkpoint", 1, path="c")
    calls, fsync = [], os.fsync

    def struck(descriptor):
        fsync(descriptor)
        calls.append(descriptor)
        if len(calls) == at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(os, "fsync", struck)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        if at <= 4:
            with pytest.raises(_StopError):
                writer.flush()
        else:
            writer.flush()
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.undo()
    assert (len(calls) >= at) == (at <= 4)
    writer.close("interrupted")
    run = load(tmp_path / "run")
    assert run.status == "interrupted"
    assert run.scalars["step"].tolist() == [1]
    assert run.events["event"].tolist() == ["checkpoint"]
    assert run.metrics(columns=["grad_norm"])["step"].tolist() == [1] * 4
