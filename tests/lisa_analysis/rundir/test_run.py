"""The reader: filters, segments, versions, and a sentence for whatever is not a run directory."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import (
    METRICS_TABLE,
    PARAMETERS_TABLE,
    SCALARS_TABLE,
    SCHEMA_VERSION,
    shard_name,
)
from lisa_analysis.rundir.opening import load
from lisa_analysis.rundir.shards import Shard, arrow_schema, last_valid_steps

N_LAYERS, PER_LAYER = 4, 3
STEPS = (0, 1, 10, 20, 30, 40)


def write_table(path, frame, version="1.0", table=METRICS_TABLE):
    fields = [f for f in arrow_schema(table) if f.name in frame]
    extra = [pa.field(n, pa.float32()) for n in frame if n not in table.names]
    data = pa.Table.from_pandas(frame, schema=pa.schema(fields + extra), preserve_index=False)
    pq.write_table(data.replace_schema_metadata({"schema_version": version}), path)


def parameter_frame():
    n = N_LAYERS * PER_LAYER + 1
    layer = pd.array([*np.repeat(range(N_LAYERS), PER_LAYER), pd.NA], dtype="Int16")
    return pd.DataFrame(
        {
            "param_id": np.arange(n, dtype=np.int32),
            "name": [f"p{i}" for i in range(n)],
            "layer": layer,
            "kind": "attn.q", "role": "base", "numel": 6, "shape": "2x3", "dtype": "float32",
            "tied_to": pd.array([pd.NA] * n, dtype="Int32"),
        }
    )  # fmt: skip


def metrics_frame(steps, offset=0.0):
    n = N_LAYERS * PER_LAYER + 1
    step = np.repeat(np.array(steps), n)
    param = np.tile(np.arange(n), len(steps))
    return pd.DataFrame({"step": step, "param_id": param, "grad_norm": step + param / 100 + offset})


def write_run(path, *, version="1.0", status="finished"):
    (path / "metrics").mkdir(parents=True)
    layers = [
        {"index": i, "name": f"model.layers.{i}", "stack": "model.layers"} for i in range(N_LAYERS)
    ]
    manifest = {
        "schema_version": version, "run_id": "r", "status": status, "method": "full",
        "created": "2026-01-01T00:00:00+00:00", "layers": layers, "model": {"name": "tiny"},
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(manifest))
    write_table(path / "parameters.parquet", parameter_frame(), table=PARAMETERS_TABLE)
    write_table(path / "metrics" / shard_name(0, 0), metrics_frame(STEPS[:3]))
    write_table(path / "metrics" / shard_name(0, 20), metrics_frame(STEPS[3:]))
    lines = [{"step": s, "loss": 1.0 / s, "tokens": s * 5} for s in range(1, 41)]
    (path / "scalars.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [
        {"event": "lisa_draw", "step": 0, "time": 1.0, "layers": [0, 1]},
        {"event": "evaluate", "step": 20, "time": 2.0, "metrics": {"eval_loss": 3.0}},
    ]
    (path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    return path


@pytest.fixture
def directory(tmp_path):
    return write_run(tmp_path / "run")


def test_tables_have_the_columns_and_types_of_the_schema(directory):
    run = load(directory)
    assert run.layer_names == tuple(f"model.layers.{i}" for i in range(4))
    assert (run.n_layers, run.method, run.status, run.run_id) == (4, "full", "finished", "r")
    assert tuple(run.parameters) == PARAMETERS_TABLE.names
    assert tuple(run.metrics()) == METRICS_TABLE.names
    assert tuple(run.scalars) == SCALARS_TABLE.names
    assert run.scalars.tokens.tolist() == [5 * s for s in range(1, 41)]
    assert run.events.event.tolist() == ["lisa_draw", "evaluate"]
    assert run.events.layers[0] == [0, 1]
    assert run.warnings == []
    assert "4 layers" in repr(run)
    assert ">r</td>" in run._repr_html_()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (None, STEPS),
        (slice(1, 20), (1, 10)),
        (slice(None, 21), (0, 1, 10, 20)),
        (slice(20, None), (20, 30, 40)),
        (slice(0, 41, 20), (0, 20, 40)),
        ([10, 40, 41], (10, 40)),
        ([], ()),
        (slice(5, 5), ()),
        (slice(1000, 2000), ()),
    ],
)
def test_steps_filter(directory, steps, expected):
    frame = load(directory).metrics(["grad_norm"], steps=steps)
    assert tuple(frame["step"].unique()) == expected
    assert len(frame) == 13 * len(expected)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, range(13)),
        (0, range(3)),
        (-1, range(9, 12)),
        (slice(2, None), range(6, 12)),
        ([0, 3], [0, 1, 2, 9, 10, 11]),
        ([], []),
    ],
)
def test_layers_filter(directory, layers, expected):
    frame = load(directory).metrics(["grad_norm"], layers=layers, steps=[10])
    assert frame["param_id"].tolist() == list(expected)
    assert np.allclose(frame["grad_norm"], 10 + frame["param_id"] / 100)


def test_a_step_filter_does_not_open_the_other_shards(directory):
    (directory / "metrics" / shard_name(0, 0)).write_bytes(b"not parquet")
    assert load(directory).metrics(steps=slice(20, 31))["step"].unique().tolist() == [20, 30]
    with pytest.raises(RunDirectoryError, match="cannot be read as Parquet"):
        load(directory).metrics()


def test_iterating_yields_the_same_rows_in_the_order_of_steps(directory):
    run = load(directory)
    batches = list(run.iter_metrics(["grad_norm"]))
    assert [batch.schema.names for batch in batches] == [["step", "param_id", "grad_norm"]] * 2
    joined = pa.Table.from_batches(batches).to_pandas()
    pd.testing.assert_frame_equal(joined, run.metrics(["grad_norm"]))


def test_unknown_columns_and_layers_are_named(directory):
    run = load(directory)
    with pytest.raises(RunDirectoryError, match="Did you mean 'grad_norm'"):
        run.metrics(["grad_nrm"])
    with pytest.raises(RunDirectoryError, match=r"no layer 4 .* it has 4 layers"):
        run.metrics(layers=4)
    with pytest.raises(RunDirectoryError, match="negative bound"):
        run.metrics(steps=slice(-5, None))


# --- segments -----------------------------------------------------------------------------------


def resume(path, segment, step, steps):
    with (path / "events.jsonl").open("a") as handle:
        line = {"event": "resume", "step": step, "time": 3.0, "segment": segment}
        handle.write(json.dumps(line) + "\n")
    if steps:
        frame = metrics_frame(steps, offset=1000.0 * segment)
        write_table(path / "metrics" / shard_name(segment, steps[0]), frame)
    with (path / "scalars.jsonl").open("a") as handle:
        handle.writelines(
            json.dumps({"step": s, "loss": segment, "segment": segment}) + "\n" for s in steps
        )


def test_a_later_segment_replaces_everything_after_its_start(directory):
    resume(directory, 1, 15, [20, 30])
    resume(directory, 2, 25, [30])
    frame = load(directory).metrics(["grad_norm"])
    origin = (frame["grad_norm"] // 1000).astype(int)
    assert dict(zip(frame["step"], origin, strict=True)) == {0: 0, 1: 0, 10: 0, 20: 1, 30: 2}
    scalars = load(directory).scalars
    assert scalars.step.tolist() == [*range(1, 16), 20, 30]
    assert scalars.loss.tolist()[-2:] == [1.0, 2.0]
    assert scalars.segment.tolist()[-3:] == [0, 1, 2]
    events = load(directory).events
    assert events.loc[events.event == "resume", "segment"].tolist() == [1, 2]


def test_a_segment_that_wrote_nothing_yet_still_voids_what_it_repeats(directory):
    resume(directory, 1, 10, [])
    assert load(directory).metrics()["step"].max() == 10
    assert load(directory).scalars.step.max() == 10


def test_last_valid_steps_falls_back_on_the_first_shard():
    shards = [Shard(None, 0, 0, None), Shard(None, 1, 31, None), Shard(None, 2, 21, None)]
    assert last_valid_steps({}, shards) == {0: 20, 1: 20}
    assert last_valid_steps({1: 25}, shards) == {0: 20, 1: 20}
    assert last_valid_steps({}, shards[:1]) == {}


def test_the_draw_that_a_resume_repeats_counts_once(directory):
    resume(directory, 1, 10, [])
    with (directory / "events.jsonl").open("a") as handle:
        line = {"event": "lisa_draw", "step": 0, "time": 4.0, "layers": [2, 3], "segment": 1}
        handle.write(json.dumps(line) + "\n")
    events = load(directory).events
    draws = events[events.event == "lisa_draw"]
    assert draws.layers.tolist() == [[2, 3]]


# --- versions -----------------------------------------------------------------------------------


def test_another_major_version_is_an_error_that_names_both(tmp_path):
    path = write_run(tmp_path / "run", version="2.0")
    with pytest.raises(
        RunDirectoryError, match=rf"version 2\.0, .* reads {re.escape(SCHEMA_VERSION)}: install"
    ):
        load(path)


def test_another_major_version_of_a_shard_is_an_error(directory):
    write_table(directory / "metrics" / shard_name(0, 50), metrics_frame([50]), version="3.1")
    with pytest.raises(
        RunDirectoryError, match=rf"version 3\.1, .* reads {re.escape(SCHEMA_VERSION)}"
    ):
        load(directory).metrics()


def test_a_newer_minor_version_is_read_with_a_warning(tmp_path):
    path = write_run(tmp_path / "run", version="1.7")
    frame = metrics_frame([50])
    frame["brand_new"] = 1.0
    write_table(path / "metrics" / shard_name(0, 50), frame, version="1.7")
    run = load(path)
    assert f"newer than {SCHEMA_VERSION}" in run.warnings[0]
    assert tuple(run.metrics(steps=[50])) == METRICS_TABLE.names
    assert len(run.warnings) == 2


def test_absent_optional_columns_are_null(directory):
    [batch] = load(directory).iter_metrics(["delta_norm", "opt_steps"], steps=[40])
    assert batch.column("delta_norm").null_count == 13
    assert batch.column("opt_steps").null_count == 13


# --- not a run directory ------------------------------------------------------------------------

SENTENCE = re.compile(r"^[^\n]{20,600}$")


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("run.json", None, "holds no run.json"),
        ("run.json", b"", "is not JSON"),
        ("run.json", b"[]", "expected a JSON object"),
        ("run.json", b'{"schema_version": 1}', "states the schema version 1"),
        ("run.json", b"{" * 100_000, "is not JSON"),
        ("parameters.parquet", None, "parameters.parquet is missing"),
        ("parameters.parquet", b"PAR1", "cannot be read as Parquet"),
        ("metrics/part-000-00000000.parquet", b"PAR1xxxxPAR1", "cannot be read as Parquet"),
        ("scalars.jsonl", b"1\n", "expected a JSON object"),
        ("scalars.jsonl", b'{"loss": 1}\n', "has no 'step'"),
        ("scalars.jsonl", b'{"step": 1.5}\n', "expected int64"),
        ("scalars.jsonl", b'{"step": 1e400}\n', "expected int64"),
        ("scalars.jsonl", b'{"step": 1, "loss": "high"}\n', "expected float64"),
        ("scalars.jsonl", b'{"step": 99999999999999999999}\n', "expected int64"),
        ("scalars.jsonl", b'{"step": -1}\n', "step -1, expected 0"),
        ("events.jsonl", b'\xff\xfe{"step": 1}\n', "is not JSON"),
        ("events.jsonl", b'{"event": 3, "step": 1, "time": 1}\n', "expected string"),
    ],
)
def test_damage_gets_a_sentence(directory, name, damage, words):
    file = directory / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage)
    with pytest.raises(RunDirectoryError) as caught:
        read_everything(directory)
    assert SENTENCE.match(str(caught.value))
    assert words in str(caught.value)


def read_everything(path):
    run = load(path)
    frames = run.parameters, run.scalars, run.events, run.metrics(), run.non_finite()
    return run, frames, run._repr_html_()


def test_a_missing_folder_a_file_and_a_foreign_folder(tmp_path):
    with pytest.raises(RunDirectoryError, match="does not exist"):
        load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="is a file, not a folder"):
        load(tmp_path / "file")
    with pytest.raises(RunDirectoryError, match=r"holds no run\.json"):
        load(tmp_path)


def test_a_missing_stream_is_a_warning(directory):
    (directory / "scalars.jsonl").unlink()
    shutil.rmtree(directory / "metrics")
    run = load(directory)
    assert len(run.scalars) == 0
    assert len(run.metrics()) == 0
    assert tuple(run.metrics(["grad_norm"])) == ("step", "param_id", "grad_norm")
    assert len(run.warnings) == 2


FUZZ = """
import sys
from pathlib import Path
import numpy as np
sys.path[:0] = {tests!r}
from helpers_damage import mutate
from test_run import read_everything, SENTENCE
from lisa_analysis.contract.errors import RunDirectoryError

path, seed, count = Path({path!r}), {seed}, {count}
files = sorted(p for p in path.rglob("*") if p.is_file())
rng = np.random.default_rng(seed)
outcomes = [0, 0]
for number in range(count):
    file = files[number % len(files)]
    original = file.read_bytes()
    file.write_bytes(mutate(rng, original))
    try:
        read_everything(path)
        outcomes[0] += 1
    except RunDirectoryError as error:
        outcomes[1] += 1
        assert SENTENCE.match(str(error)), str(error)
    finally:
        file.write_bytes(original)
print(*outcomes)
"""


@pytest.mark.parametrize("count", [500, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutations_give_a_sentence_or_a_reading(directory, count):
    """In a process of its own: a damaged Parquet file must not bring the interpreter down."""
    code = FUZZ.format(
        tests=[str(parent) for parent in Path(__file__).parents[0:3]],
        path=str(directory),
        seed=0,
        count=count,
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    read, refused = map(int, result.stdout.split())
    assert read + refused == count
    assert refused > 0.3 * count
    assert read > 0.1 * count
