"""The whole `lisa-analyze` on thousands of damaged runs: results with warnings, or one sentence.

Damage that leaves the truth recognisable must leave every number as it was, and be named; for the
rest there is no right answer, only no traceback.
"""

import json
import random
import shutil
import signal
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from helpers_damage import edit_json, mutate
from helpers_runs import write_run

import lisa_analysis as la
from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.views.cli import main
from lisa_analysis.views.html_report import report_of

SECONDS = 20  # of one command; a sound run takes 0.03
EVERY_REPORT = 40  # rendering takes twenty times as long as everything else
REPORT = "lisa_analysis.views.html_report.report_of"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    write_run(folder, n_layers=4, steps=40, every=2)
    for path in sorted((folder / "metrics").iterdir()):  # as a run that was flushed several times
        table = pq.read_table(path)
        step = table.column("step").to_numpy()
        for first, last in ((0, 0), (1, 10), (11, 20), (21, 40)):
            part = table.filter(pa.array((step >= first) & (step <= last)))
            if part.num_rows:
                target = path.with_name(f"part-000-{part.column('step')[0].as_py():08d}.parquet")
                pq.write_table(part, target)
        if path.name not in {p.name for p in (folder / "metrics").glob("part-000-0000000[01]*")}:
            path.unlink()
    return folder


# --- edits of tables: each returns the table and what must come of it ---------------------------
# "same": every number as before; "named": left out or refused, in words; "any": no traceback.


def put(table: pa.Table, name: str, values: Any) -> pa.Table:
    index = table.schema.get_field_index(name)
    field = table.schema.field(index)
    sound = field.type == values.type and (field.nullable or not values.null_count)
    return table.set_column(index, field if sound else name, values)


def numbers(table: pa.Table) -> list[str]:
    return [f.name for f in table.schema if f.name not in ("step", "param_id", "opt_steps")]


def some_value(table, rng):
    name = rng.choice(numbers(table))
    values = table.column(name).to_pylist()
    values[rng.randrange(len(values))] = rng.choice([np.nan, np.inf, -np.inf, None, 0.0, 3e38])
    return put(table, name, pa.array(values, table.schema.field(name).type)), "any"


def negative_value(table, rng):
    name = rng.choice([n for n in numbers(table) if n != "descent"])
    values = table.column(name).to_pylist()
    at = rng.randrange(len(values))
    values[at] = -1.0 if values[at] is None else -abs(values[at]) - 1
    return put(table, name, pa.array(values, table.schema.field(name).type)), "named"


def negative_rows(table, rng):
    extra = table.slice(rng.randrange(table.num_rows), 3)
    step = pa.array([-rng.randrange(1, 2**40)] * extra.num_rows, pa.int64())
    return pa.concat_tables([put(extra, "step", step), table]), "left out"


def repeated_rows(table, rng):
    extra = table.slice(rng.randrange(table.num_rows), rng.randrange(1, 30))
    return pa.concat_tables([table, extra]), "left out"


def shuffled_rows(table, rng):
    order = list(range(table.num_rows))
    rng.shuffle(order)
    return table.take(pa.array(order)), "same"


def contradicting_rows(table, rng):
    extra = table.slice(rng.randrange(table.num_rows), 5)
    for name in numbers(table):
        extra = put(extra, name, pc.multiply(extra.column(name), pa.scalar(7.0, pa.float32())))
    return pa.concat_tables([table, extra]), "left out"


def key(table, rng):
    name = rng.choice(["step", "param_id"])
    values = table.column(name).to_pylist()
    kind = table.schema.field(name).type
    most = 2**31 - 1 if name == "param_id" else 2**62
    values[rng.randrange(len(values))] = rng.choice([None, -1, most, 10**6, 3])
    return put(table, name, pa.array(values, kind)), "any"


def wrong_type(table, rng):
    name = rng.choice(table.schema.names)
    kind = rng.choice([pa.string(), pa.float64(), pa.int8(), pa.bool_(), pa.list_(pa.int64())])
    return put(table, name, pa.nulls(table.num_rows, kind)), "any"


def as_text(table, rng):
    name = rng.choice(table.schema.names)
    return put(table, name, table.column(name).cast(pa.string())), "any"


def wider(table, rng):
    name = rng.choice(numbers(table))
    return put(table, name, table.column(name).cast(pa.float64())), "same"


def missing_column(table, rng):
    return table.drop_columns([rng.choice(table.schema.names)]), "any"


def extra_column(table, rng):
    return table.append_column("brand_new", pa.array([1.0] * table.num_rows)), "same"


def other_order_of_columns(table, rng):
    names = list(table.schema.names)
    rng.shuffle(names)
    return table.select(names), "same"


def empty(table, rng):
    return table.slice(0, 0), "any"


def version(table, rng):
    text = rng.choice(["2.0", "1.9", "0.1", "x", "", "1", None])
    metadata = {} if text is None else {"schema_version": text}
    return table.replace_schema_metadata(metadata), "same" if text == "1.9" else "any"


OF_METRICS = (
    some_value, negative_value, negative_rows, repeated_rows, shuffled_rows, contradicting_rows,
    key, wrong_type, as_text, wider, missing_column, extra_column, other_order_of_columns, empty,
    version,
)  # fmt: skip
OF_PARAMETERS = (
    key, wrong_type, as_text, missing_column, extra_column, other_order_of_columns, shuffled_rows,
    repeated_rows, empty, version,
)  # fmt: skip


def edit_table(run: Path, rng: random.Random) -> str:
    shards = sorted((run / "metrics").iterdir())
    path = rng.choice([*shards, *shards, run / "parameters.parquet"])
    table = pq.read_table(path)
    of_parameters = path.name == "parameters.parquet"
    edit = rng.choice(OF_PARAMETERS if of_parameters else OF_METRICS)
    if of_parameters and edit is key:
        values = table.column("param_id").to_pylist()
        values[rng.randrange(len(values))] = rng.choice([None, -1, 2**31 - 1, 1000, 3])
        changed, verdict = put(table, "param_id", pa.array(values, pa.int32())), "any"
    else:
        changed, verdict = edit(table, rng)
    if "schema_version" not in str(changed.schema.metadata) and edit is not version:
        changed = changed.replace_schema_metadata(table.schema.metadata)
    pq.write_table(changed, path)
    if of_parameters and verdict == "left out":
        return "refused"
    return verdict


def rename_shard(run: Path, rng: random.Random) -> str:
    shards = sorted((run / "metrics").iterdir())
    path = rng.choice(shards)
    name = rng.choice(
        ["part-000-00000013.parquet", "part-001-00000001.parquet", "part-000-99999999.parquet",
         "other.parquet", "part-000-00000005.parquet", "part-002-00000000.parquet"]
    )  # fmt: skip
    if rng.random() < 0.5:
        shutil.copy(path, path.with_name(name))
    else:
        path.rename(path.with_name(name))
    return "any"


def edit_document(run: Path, rng: random.Random) -> str:
    edit_json(run / rng.choice(["run.json", "events.jsonl", "scalars.jsonl"]), rng)
    return "any"


def edit_bytes(run: Path, rng: random.Random) -> str:
    path = rng.choice([p for p in sorted(run.rglob("*")) if p.suffix in (".json", ".jsonl")])
    raw = mutate(np.random.default_rng(rng.randrange(2**32)), path.read_bytes())
    path.write_bytes(raw)
    return "any"


EDITS = (edit_table, edit_table, edit_table, edit_document, edit_document, edit_bytes, rename_shard)


# --- the command --------------------------------------------------------------------------------


@contextmanager
def at_most(seconds: int):
    def stop(*_):
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class NoReport:
    def save(self, path: Path) -> None:
        """Render nothing."""


def analyse(run: Path, capsys) -> tuple[dict[str, Any] | None, str]:
    """Run the command; return what it found, or None with its sentence."""
    found = run.parent / "found.json"
    with at_most(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("error")
        code = main([str(run), "--json", str(found), "-o", str(run.parent / "report.html")])
    out, errors = capsys.readouterr()
    if code == 2:
        assert errors.count("\n") == 1
        assert 20 < len(errors) < 900
        return None, errors
    assert (code, errors) == (0, "")
    result = json.loads(found.read_text())["runs"][0]
    assert all(warning in out for warning in result["warnings"])  # printed, not only stored
    return result, out


def apart_from_words(result: dict[str, Any]) -> dict[str, Any]:
    found = {k: v for k, v in result.items() if k not in ("warnings", "path")}
    # Rules come worst first, and this one repeats the warnings.
    rules = sorted(found["findings"], key=lambda finding: finding["id"])
    found["findings"] = [rule for rule in rules if rule["id"] != "log_gaps"]
    if found["probabilities"] is not None:
        found["probabilities"] = found["probabilities"] | {"created": None, "source_runs": None}
    return found


def fuzz(source, folder, capsys, monkeypatch, count, seed):
    rng = random.Random(seed)
    sound, _ = analyse(Path(shutil.copytree(source, folder / "sound" / "run")), capsys)
    assert sound is not None
    assert sound["warnings"] == []
    outcomes = {"read": 0, "refused": 0, "same": 0, "left out": 0}
    asked = []  # numbers of the runs whose report was to be rendered
    number = 0

    def rendered(*args, **options):
        asked.append(number)
        return NoReport() if number % EVERY_REPORT else report_of(*args, **options)

    monkeypatch.setattr(REPORT, rendered)
    for number in range(count):
        run = Path(shutil.copytree(source, folder / "damaged" / "run"))
        edit = rng.choice(EDITS)
        verdict = edit(run, rng)
        try:
            result, _ = analyse(run, capsys)
        except BaseException as error:
            raise AssertionError(f"edit {number} ({edit.__name__}, {verdict})") from error
        outcomes["refused" if result is None else "read"] += 1
        where = (number, edit.__name__, verdict)
        if verdict in ("same", "left out"):
            assert result is not None, where
            assert apart_from_words(result) == apart_from_words(sound), where
            outcomes[verdict] += 1
        if verdict == "left out":
            assert any("rows of" in text for text in result["warnings"]), where
        if verdict == "named" and result is not None:
            assert any("negative" in text for text in result["warnings"]), where
        if verdict == "refused":
            assert result is None, where
        shutil.rmtree(folder / "damaged")
    assert len(asked) == outcomes["read"]  # whatever the door is through which reports come
    return outcomes


def test_a_hundred_damaged_runs(source, tmp_path, capsys, monkeypatch):
    outcomes = fuzz(source, tmp_path, capsys, monkeypatch, count=100, seed=0)
    assert outcomes["read"] + outcomes["refused"] == 100
    # Seen: 73 and 27; of the edits that must change nothing 15, of rows to be left out 5.
    assert outcomes["read"] > 60
    assert outcomes["refused"] > 20
    assert outcomes["same"] > 10
    assert outcomes["left out"] > 3


@pytest.mark.slow
def test_thousands_of_damaged_runs(source, tmp_path, capsys, monkeypatch):
    outcomes = fuzz(source, tmp_path, capsys, monkeypatch, count=5000, seed=1)
    assert min(outcomes.values()) > 300


# --- the holes that this fuzz was written for ---------------------------------------------------


def rewrite(path: Path, change) -> None:
    table = pq.read_table(path)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), path)


@pytest.fixture
def run(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "run"))


def test_what_is_left_out_is_counted(run):
    expected = la.load(run).metrics()
    paths = sorted((run / "metrics").iterdir())
    rewrite(paths[1], lambda t: pa.concat_tables([t, t.slice(0, 4)]))
    rewrite(
        paths[2],
        lambda t: pa.concat_tables([put(t.slice(0, 2), "step", pa.array([-5, -4], pa.int64())), t]),
    )
    opened = la.load(run)
    assert opened.metrics().equals(expected)
    assert opened.warnings == [
        f"metrics/{paths[1].name} has 4 rows of a step and tensor that it holds already: of each "
        "the first row counts.",
        f"metrics/{paths[2].name} has 2 rows of steps -5 to -4, but by its name holds steps "
        f"{int(paths[2].stem[-8:])} to {int(paths[3].stem[-8:]) - 1}: they are left out.",
    ]


def test_a_negative_norm_is_no_measurement(run):
    path = sorted((run / "metrics").iterdir())[1]
    before = la.load(run).metrics(["grad_norm"])
    at = before.index[before["grad_norm"].notna()][0]
    step, number = before.loc[at, ["step", "param_id"]].astype(int)

    def negate(table):
        row = pc.and_(
            pc.equal(table.column("step"), step), pc.equal(table.column("param_id"), number)
        )
        values = table.column("grad_norm")
        return put(table, "grad_norm", pc.if_else(row, pc.negate(values), values))

    rewrite(path, negate)
    opened = la.load(run)
    after = opened.metrics(["grad_norm"])
    assert np.isnan(after.loc[at, "grad_norm"])
    assert after.drop(index=at).equals(before.drop(index=at))
    assert opened.warnings == [
        f"metrics/{path.name} has 1 negative values of grad_norm, which cannot be: they count as "
        "not measured."
    ]
    assert len(opened.non_finite()) == 0


@pytest.mark.parametrize("pi", [["x"] * 4, [0.5], [2.0] * 4, [-0.5] * 4, [float("nan")] * 4])
def test_a_draw_stands_without_its_probabilities(run, pi):
    sound = la.load(run).events
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    at = next(i for i, line in enumerate(lines) if line["event"] == "lisa_draw")
    lines[at]["inclusion_probabilities"] = pi
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened = la.load(run)
    events = opened.events
    assert events["layers"].equals(sound["layers"])
    assert events.loc[at, "inclusion_probabilities"] is None
    assert "these are left out, the draw counts" in opened.warnings[0]


def test_a_tensor_that_the_table_lacks_is_named(run):
    rewrite(run / "parameters.parquet", lambda t: pa.concat_tables([t.slice(0, 3), t.slice(4)]))
    with pytest.raises(RunDirectoryError, match=r"param_id = 3, which parameters.parquet does"):
        la.load(run).metrics()


def test_scalars_that_repeat_a_step_are_counted(run):
    path = run / "scalars.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0], lines[1]]) + "\n")
    opened = la.load(run)
    assert len(opened.scalars) == len(lines)
    assert "repeats the step of 2 lines within a segment" in opened.warnings[0]
