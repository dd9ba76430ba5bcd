"""`lisa-analyze` on run directories that somebody edited: a sentence, never a traceback."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_damage import edit_json
from helpers_runs import write_run

from lisa_analysis.views.cli import main


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("damage") / "run", n_layers=4, steps=40, every=5)


@pytest.fixture
def run(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "run"))


def analyse(run: Path, capsys) -> tuple[int, str]:
    code = main([str(run), "--json", str(run / "found.json")])
    errors = capsys.readouterr().err
    assert code in (0, 2)
    assert (errors.count("\n"), code) in ((0, 0), (1, 2))
    return code, errors


def edit_manifest(run: Path, **changes: Any) -> None:
    content = json.loads((run / "run.json").read_text()) | changes
    (run / "run.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "gpt"}, {"lisa": "x"}, {"result": "x"}, {"recording": 5}, {"seeds": [1]},
        {"layers": [{"index": 0, "name": "a", "stack": {}}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_of_other_types(run, capsys, changes):
    edit_manifest(run, **changes)
    code, errors = analyse(run, capsys)
    assert code == 2
    assert "run.json" in errors


def test_half_a_character_becomes_a_replacement(run, capsys):
    names = [{"index": i, "name": f"\udfff{i}", "stack": "a"} for i in range(4)]
    edit_manifest(run, run_id="\ud800", method="\udfff", layers=names)
    assert analyse(run, capsys) == (0, "")
    assert "\ufffd" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": None}, {"layers": 5}, {"layers": "ab"}, {"layers": [[1]]}, {"layers": [999]},
        {"inclusion_probabilities": ["x"]}, {"inclusion_probabilities": [10**400] * 4},
        {"visits": {}},
    ],
    ids=str,
)  # fmt: skip
def test_a_draw_that_makes_no_sense_is_left_out_with_a_warning(run, capsys, fields):
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    at = next(i for i, line in enumerate(lines) if line["event"] == "lisa_draw")
    lines[at] |= fields
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = main([str(run)])
    assert code == 0
    assert "events.jsonl: the lisa_draw of step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("column", "value"), [("param_id", 10_000), ("param_id", -1), ("step", 2**62), ("step", -3)]
)
def test_rows_that_would_index_beyond_everything(run, capsys, column, value):
    shard = sorted((run / "metrics").iterdir())[-1]
    table = pq.read_table(shard)
    numbers = table.column(column).to_numpy().copy()
    numbers[-1] = value
    position = table.schema.get_field_index(column)
    field = table.schema.field(position)
    pq.write_table(table.set_column(position, field, pa.array(numbers, field.type)), shard)
    code, errors = analyse(run, capsys)
    if (column, value) != ("step", -3):  # before the first step that anybody asks for
        assert code == 2
        assert f"{column} = {value}" in errors


def test_a_segment_that_no_run_reaches(run, capsys):
    shard = sorted((run / "metrics").iterdir())[-1]
    far = Path(shutil.copy(shard, shard.with_name("part-2147483647-00000001.parquet")))
    assert "named as segment 2147483647" in analyse(run, capsys)[1]
    far.unlink()
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "resume", "step": 0, "time": 1.0, "segment": 2147483647}\n')
    assert "has segment 2147483647" in analyse(run, capsys)[1]


def test_a_loss_too_large_for_a_number_is_left_out(run, capsys):
    with (run / "events.jsonl").open("a") as file:
        line = {"event": "evaluate", "step": 40, "time": 1.0, "metrics": {"eval_loss": 10**400}}
        file.write(json.dumps(line) + "\n")
    assert main([str(run)]) == 0
    assert "events.jsonl: the evaluate of step 40" in capsys.readouterr().out


def test_reading_and_writing_are_told_apart(run, capsys):
    assert main([str(run), "-o", str(run / "none" / "report.html")]) == 2
    assert f"cannot write {run / 'none' / 'report.html'}" in capsys.readouterr().err
    other = shutil.copytree(run, run.parent / "other")
    (run / "config.yaml").unlink()
    (run / "config.yaml").mkdir()
    # A run alone is no repetition of another: its settings are not asked for.
    assert analyse(run, capsys)[0] == 0
    assert main([str(run), str(other)]) == 2
    assert "config.yaml cannot be read (Is a directory)" in capsys.readouterr().err


def test_a_table_of_tensors_that_is_empty_or_absurd(run, capsys):
    table = pq.read_table(run / "parameters.parquet")
    pq.write_table(table.slice(0, 0), run / "parameters.parquet")
    assert "holds no tensor" in analyse(run, capsys)[1]
    ids = table.column("param_id").to_numpy().copy()
    ids[-1] = np.iinfo(np.int32).max
    huge = table.set_column(
        table.schema.get_field_index("param_id"), "param_id", pa.array(ids, pa.int32())
    )
    pq.write_table(huge.replace_schema_metadata(table.schema.metadata), run / "parameters.parquet")
    assert "param_id" in analyse(run, capsys)[1]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_random_edits(source, tmp_path, capsys, seed):
    rng = random.Random(seed)
    for number in range(12):
        run = Path(shutil.copytree(source, tmp_path / str(number)))
        edit_json(run / rng.choice(["run.json", "run.json", "events.jsonl", "scalars.jsonl"]), rng)
        analyse(run, capsys)
