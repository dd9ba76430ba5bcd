"""ablation.parquet: rows as they were measured, kept through interruptions and later calls."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import ABLATION, ABLATION_FIELDS, ABLATION_TABLE, SCHEMA_VERSION
from lisa_train.measure.ablation.file import AblationFile, Key, Measured

ABOUT = {"model": "adapter", "base": "tiny", "dtype": "float32", "device": "cpu", "unmeasured": []}


def examples(n=3, digest="a", name="data.jsonl"):
    about = {"name": name, "examples": n, "available": 9, "tokens": 5 * n, "digest": digest}
    return Measured(about, np.full(n, 5, np.int32))


def key(unit="0", kind=None, mode="reset", data="held_out"):
    return Key(unit, kind, mode, data)


def table(folder):
    return pq.read_table(folder / ABLATION)


def test_rows_come_back_as_they_were_measured(tmp_path):
    file = AblationFile(tmp_path, ABOUT, {"held_out": examples()})
    exact = [1 / 3, math.nan, math.inf]
    file.add(key(), [0, 1, 2], exact)
    file.add(key(None, mode="trained"), [0, 1, 2], [1.0, 2.0, 3.0])
    file.add(key("10", "attn.q"), [0, 1, 2], [1.0, 2.0, 3.0])
    file.add(key("2"), [0, 1, 2], [1.0, 2.0, 3.0])
    file.finish(passes=1.5, seconds=2.0)
    stored = table(tmp_path)
    assert stored.schema.names == list(ABLATION_TABLE.names)
    assert [f.nullable for f in stored.schema] == [c.nullable for c in ABLATION_TABLE.columns]
    assert [str(f.type) for f in stored.schema] == [
        c.type.replace("float64", "double") for c in ABLATION_TABLE.columns
    ]
    rows = stored.to_pylist()
    assert [(r["unit"], r["kind"], r["mode"]) for r in rows[::3]] == [
        (None, None, "trained"), ("0", None, "reset"), ("2", None, "reset"),
        ("10", "attn.q", "reset"),
    ]  # fmt: skip
    losses = [r["loss"] for r in rows[3:6]]
    assert losses[0] == exact[0]
    assert math.isnan(losses[1])
    assert losses[2] == math.inf
    assert [r["example"] for r in rows[:3]] == [0, 1, 2]
    assert {r["tokens"] for r in rows} == {5}
    metadata = stored.schema.metadata
    assert metadata[b"schema_version"].decode() == SCHEMA_VERSION
    about = json.loads(metadata[b"ablation"])
    assert set(about) == set(ABLATION_FIELDS)
    assert about["data"]["held_out"]["examples"] == 3
    assert about["passes"] == 1.5
    assert [p.name for p in tmp_path.iterdir()] == [ABLATION]


def test_what_an_interrupted_call_finished_is_kept(tmp_path):
    file = AblationFile(tmp_path, ABOUT, {"held_out": examples()})
    file.add(key(), [0, 1, 2], [0.1, math.nan, -math.inf])
    file.add(key("1"), [1], [7.0])
    assert not (tmp_path / ABLATION).exists()
    with file.unfinished.open("ab") as cut:
        cut.write(b'{"unit":"2","kind":null,"mo')  # killed in the middle of a line
    again = AblationFile(tmp_path, ABOUT, {"held_out": examples()})
    assert len(again.missing(key())) == 0
    assert again.missing(key("1")).tolist() == [0, 2]
    assert again.missing(key("2")).tolist() == [0, 1, 2]
    again.add(key("1"), [0, 2], [8.0, 9.0])
    again.finish(1, 1)
    losses = [r["loss"] for r in table(tmp_path).to_pylist()]
    assert losses[0] == 0.1
    assert math.isnan(losses[1])
    assert losses[2:] == [-math.inf, 8.0, 7.0, 9.0]


def test_a_later_call_adds_rows_and_keeps_the_others(tmp_path):
    file = AblationFile(tmp_path, ABOUT, {"held_out": examples()})
    file.add(key(), [0, 1, 2], [1.0, 2.0, 3.0])
    file.add(key("1"), [0], [4.0])  # not whole when the other call ends
    file.finish(1, 10)
    assert len(table(tmp_path)) == 3
    general = {"general": examples(2, "b")}
    second = AblationFile(tmp_path, ABOUT, {"held_out": examples(), **general})
    assert second.missing(key("1")).tolist() == [1, 2]
    second.add(key("4-7"), [0, 1, 2], [5.0, 6.0, 7.0])
    second.add(key(data="general"), [0, 1], [8.0, 9.0])
    second.add(key("1"), [1, 2], [4.5, 4.6])
    second.finish(0.5, 5)
    rows = table(tmp_path).to_pylist()
    assert [r["loss"] for r in rows] == [1.0, 2.0, 3.0, 4.0, 4.5, 4.6, 5.0, 6.0, 7.0, 8.0, 9.0]
    about = json.loads(table(tmp_path).schema.metadata[b"ablation"])
    assert about["passes"] == 1.5
    assert about["seconds"] == 15
    assert set(about["data"]) == {"held_out", "general"}
    # A third call without the general text leaves its rows alone.
    third = AblationFile(tmp_path, ABOUT, {"held_out": examples()})
    third.add(key("2"), [0, 1, 2], [0.0, 0.0, 0.0])
    third.finish(0, 0)
    assert [r["data"] for r in table(tmp_path).to_pylist()].count("general") == 2


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("about", "data", "says"),
    [
        (ABOUT | {"model": "checkpoints/final"}, examples(), "model 'adapter', this call has"),
        (ABOUT | {"device": "cuda"}, examples(), "device 'cpu'"),
        (ABOUT, examples(digest="c"), "3 of data.jsonl.*3 of data.jsonl.*same data"),
        (ABOUT, examples(2, "c"), "other held_out examples .3 of data.jsonl. than .*2 of"),
    ],
)
def test_what_does_not_fit_is_refused_and_stays(tmp_path, finished, about, data, says):
    file = AblationFile(tmp_path, ABOUT, {"held_out": examples()})
    file.add(key(), [0, 1, 2], [1.0, 2.0, 3.0])
    if finished:
        file.finish(1, 1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(RunDirectoryError, match=says):
        AblationFile(tmp_path, about, {"held_out": data})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / ABLATION).write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"ablation\.parquet cannot be read"):
        AblationFile(tmp_path, ABOUT, {"held_out": examples()})


def test_damaged_lines_are_refused(tmp_path):
    file = AblationFile(tmp_path, ABOUT, {"held_out": examples()})
    file.add(key(), [0], [1.0])
    file.unfinished.write_text(file.unfinished.read_text() + "{]\n")
    with pytest.raises(RunDirectoryError, match=r"unfinished\.jsonl cannot be read"):
        AblationFile(tmp_path, ABOUT, {"held_out": examples()})
