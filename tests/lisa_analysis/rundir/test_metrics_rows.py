"""Rows of metrics files against a reading by hand: one pass, two passes, filters and damage."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import METRICS_TABLE
from lisa_analysis.rundir import metrics_rows
from lisa_analysis.rundir.metrics_rows import MetricsRows, Wanted, _has_sign
from lisa_analysis.rundir.shards import ShardFile, arrow_schema, list_shards

TENSORS = 7
ALL = Wanted(0, 2**62)


def write(path, frame):
    fields = [field for field in arrow_schema(METRICS_TABLE) if field.name in frame]
    table = pa.Table.from_pandas(frame, schema=pa.schema(fields), preserve_index=False)
    pq.write_table(table.replace_schema_metadata({"schema_version": "1.0"}), path)


def rows_of(steps):
    step = np.repeat(np.asarray(steps, dtype=np.int64), TENSORS)
    frame = pd.DataFrame({"step": step, "param_id": np.tile(np.arange(TENSORS), len(steps))})
    return frame.assign(grad_norm=np.float32(1) + frame["step"] + frame["param_id"] / 8)


def damaged(frame, kind, rng):
    if kind == "shuffled":
        return frame.sample(frac=1, random_state=3)
    if kind == "repeated":
        return pd.concat([frame, frame.iloc[rng.integers(0, len(frame), 5)] * [1, 1, 2]])
    if kind == "outside":
        frame.loc[frame.index[3:6], "step"] = 10**6
    return frame


def by_hand(frames, starts):
    """What every file holds by its name, of each step and tensor the first, in order."""
    kept = []
    for frame, start, end in zip(frames, starts, [*starts[1:], 2**62], strict=True):
        inside = frame[(frame["step"] >= start) & (frame["step"] < end)]
        kept.append(inside.drop_duplicates(["step", "param_id"]))
    return pd.concat(kept).sort_values(["step", "param_id"], ignore_index=True)


def read(path, wanted=ALL, columns=("grad_norm",)):
    said = []
    shards, _ = list_shards(path)
    rows = MetricsRows(shards, {}, lambda: np.arange(TENSORS, dtype=np.int32), said.extend)
    batches = list(rows.read(list(columns), wanted))
    return pa.Table.from_batches(batches).to_pandas(), said, rows


@pytest.mark.parametrize("whole", [True, False], ids=["one pass", "keys first"])
@pytest.mark.parametrize("kind", ["as written", "shuffled", "repeated", "outside"])
def test_rows_are_those_that_a_reading_by_hand_finds(tmp_path, monkeypatch, kind, whole):
    if not whole:
        monkeypatch.setattr(metrics_rows, "WHOLE_ROWS", 0)
    rng = np.random.default_rng(1)
    frames = [rows_of(range(20)), damaged(rows_of(range(20, 45)), kind, rng), rows_of([45, 50])]
    for start, frame in zip((0, 20, 45), frames, strict=True):
        write(tmp_path / f"part-000-{start:08d}.parquet", frame)
    found, said, rows = read(tmp_path)
    expected = by_hand(frames, [0, 20, 45])
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    words = {"repeated": ["5 rows of a step and tensor"], "outside": ["3 rows of steps 1000000"]}
    assert [any(word in text for text in said) for word in words.get(kind, [])] == [True] * len(
        words.get(kind, [])
    )
    assert len(said) == len(words.get(kind, []))
    # The second reading knows the keys, and every filter gives a part of the whole.
    for wanted, part in (
        (Wanted(5, 41), expected["step"].between(5, 41)),
        (Wanted(0, 2**62, [3, 21, 50]), expected["step"].isin([3, 21, 50])),
        (Wanted(0, 2**62, None, [2, 4]), expected["param_id"].isin([2, 4])),
    ):
        again = pa.Table.from_batches(list(rows.read(["grad_norm"], wanted))).to_pandas()
        pd.testing.assert_frame_equal(
            again, expected[part].reset_index(drop=True), check_dtype=False
        )


def test_every_file_is_read_once_and_a_column_that_it_lacks_is_null(tmp_path, monkeypatch):
    for start in (0, 10, 20):
        write(tmp_path / f"part-000-{start:08d}.parquet", rows_of(range(start, start + 10)))
    asked = []
    plain = ShardFile.read
    monkeypatch.setattr(
        ShardFile, "read", lambda self, *a: asked.append(self.path.name) or plain(self, *a)
    )
    found, _, _ = read(tmp_path, columns=("grad_norm", "opt_steps"))
    assert asked == sorted(set(asked))
    assert len(asked) == 3
    assert found["opt_steps"].isna().all()
    assert len(found) == 30 * TENSORS


def test_rows_before_a_broken_file_come_before_its_error(tmp_path):
    write(tmp_path / "part-000-00000000.parquet", rows_of(range(10)))
    (tmp_path / "part-000-00000010.parquet").write_bytes(b"not parquet")
    shards, _ = list_shards(tmp_path)
    rows = MetricsRows(shards, {}, lambda: np.arange(TENSORS, dtype=np.int32), [].extend)
    batches = rows.read(["grad_norm"], ALL)
    assert next(batches).num_rows == 10 * TENSORS
    with pytest.raises(RunDirectoryError, match=r"00000010\.parquet cannot be read as Parquet"):
        next(batches)


@pytest.mark.parametrize(
    ("values", "sign"),
    [
        ([1.0, np.nan, np.inf, 0.0, None], False),
        ([1.0, -1e-30], True),
        ([1.0, -np.inf], True),
        ([None, None], False),
    ],
)
def test_a_sign_is_found_behind_nan_and_null(values, sign):
    column = pa.array([-1.0, *values, -1.0], pa.float32()).slice(1, len(values))
    assert _has_sign(column) is sign
    counts = pa.array([-1, 3, 0], pa.int32())
    assert _has_sign(counts)
    assert not _has_sign(counts.slice(1))
