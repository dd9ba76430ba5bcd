"""ablation.parquet: what was measured, kept line by line until a call is whole."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import ABLATION, ABLATION_TABLE, ABLATION_UNFINISHED
from lisa_analysis.rundir.jsonl import NON_FINITE
from lisa_analysis.rundir.shards import arrow_schema, check_stored_version
from lisa_train.measure.disk.encoding import as_json, write_parquet
from lisa_train.measure.disk.storage import LineFile, describe_os_error, replace_file

_KEY = ("unit", "kind", "mode", "data")
MODES = ("trained", "base", "reset", "keep")
# What must be the same for rows to stand in one file.
_SAME = ("model", "base", "dtype", "device", "unmeasured")


class Key(NamedTuple):
    """What one loss per example is of: a unit (None: the whole model), a kind, a mode, a data."""

    unit: str | None
    kind: str | None
    mode: str
    data: str


@dataclass(frozen=True)
class Measured:
    """The examples of one `data`, in their order.

    Attributes
    ----------
    about
        Entry of the file's metadata: name, examples, available, tokens, digest.
    tokens
        Labels of every example, shape (examples,).
    """

    about: Mapping[str, Any]
    tokens: NDArray[np.int32]


class AblationFile:
    """The ablation of one run: rows of earlier calls, of an interrupted one, and new ones.

    Parameters
    ----------
    run_dir
        The run directory.
    about
        Metadata, see `lisa_analysis.contract.schema.ABLATION_FIELDS`, all but data, passes and
        seconds.
    data
        The examples that are measured, by ``held_out`` and ``general``.

    Attributes
    ----------
    losses : dict
        Loss of every example of a key, float64 of shape (examples,); masked = not measured yet.
    tokens : dict
        Labels of every example of a data.
    about : dict
        The metadata of what is in the file.
    writes : bool
        False in a process that only keeps in mind what the first one writes.

    Raises
    ------
    RunDirectoryError
        When what is there was measured on other examples or another model, or cannot be read.
    """

    def __init__(
        self, run_dir: Path, about: Mapping[str, Any], data: Mapping[str, Measured]
    ) -> None:
        self.path = run_dir / ABLATION
        self.unfinished = run_dir / ABLATION_UNFINISHED
        self.about: dict[str, Any] = {
            **about,
            "data": {name: dict(one.about) for name, one in data.items()},
            "passes": 0.0,
            "seconds": 0.0,
        }
        self.losses: dict[Key, np.ma.MaskedArray[Any, Any]] = {}
        self.tokens: dict[str, NDArray[np.int32]] = {n: one.tokens for n, one in data.items()}
        self.writes = True
        self._lines: LineFile | None = None
        if self.path.exists():
            self._take_table()
        if self.unfinished.exists():
            self._take_lines()

    def missing(self, key: Key) -> NDArray[np.int64]:
        """Return the numbers of the examples that `key` has no loss of yet."""
        if key not in self.losses:
            return np.arange(len(self.tokens[key.data]))
        return np.flatnonzero(np.ma.getmaskarray(self.losses[key]))

    def add(self, key: Key, examples: Sequence[int], losses: Sequence[float]) -> None:
        """Keep losses of some examples; they are on the disk when this returns.

        Raises
        ------
        RunDirectoryError
            When the disk refuses.
        """
        self._put(key, examples, losses)
        if not self.writes:
            return
        try:
            if self._lines is None:
                self._lines = LineFile(self.unfinished)
                if not self.unfinished.stat().st_size:
                    self._lines.append([_line(self.about)])
            self._lines.append([_row(key, examples, losses)])
        except OSError as error:
            raise describe_os_error(self.unfinished, error) from error

    def finish(self, passes: float, seconds: float) -> None:
        """Put everything that is whole into the file; of the rest the lines are kept.

        Raises
        ------
        RunDirectoryError
            When the disk refuses; the lines stay.
        """
        import pyarrow as pa

        self.about["passes"] = round(self.about["passes"] + passes, 3)
        self.about["seconds"] = round(self.about["seconds"] + seconds, 1)
        if not self.writes:
            return
        whole = sorted((key for key in self.losses if not len(self.missing(key))), key=_order)
        counts = [len(self.losses[key]) for key in whole]
        columns: dict[str, Any] = {
            name: [value for key, n in zip(whole, counts, strict=True) for value in [key[i]] * n]
            for i, name in enumerate(_KEY)
        }
        columns["example"] = [number for n in counts for number in range(n)]
        columns["loss"] = [loss for key in whole for loss in self.losses[key].data]
        columns["tokens"] = [count for key in whole for count in self.tokens[key.data]]
        schema = arrow_schema(ABLATION_TABLE)
        arrays = [pa.array(columns[f.name], f.type, from_pandas=False) for f in schema]
        try:
            table = pa.table(arrays, schema=schema)
            write_parquet(self.path, table, {"ablation": _line(self.about)})
            self._keep_lines([key for key in self.losses if len(self.missing(key))])
        except OSError as error:
            raise describe_os_error(self.path, error) from error

    def _keep_lines(self, keys: Sequence[Key]) -> None:
        self._lines = None
        if not keys:
            self.unfinished.unlink(missing_ok=True)
            return
        lines = [_line(self.about)]
        for key in keys:
            there = np.flatnonzero(~np.ma.getmaskarray(self.losses[key])).tolist()
            lines.append(_row(key, there, self.losses[key].data[there].tolist()))
        text = "".join(f"{line}\n" for line in lines)
        replace_file(self.unfinished, lambda path: path.write_text(text, "utf-8"))

    def _put(self, key: Key, examples: Sequence[int], losses: Sequence[float]) -> None:
        if key not in self.losses:
            self.losses[key] = np.ma.masked_all(len(self.tokens[key.data]))
        self.losses[key][list(examples)] = np.asarray(losses, np.float64)

    def _take_table(self) -> None:
        import pyarrow.parquet as pq

        try:
            with self.path.open("rb") as file:  # Arrow reads a path as an address with a colon
                table = pq.ParquetFile(file).read()
            check_stored_version(table.schema, self.path, [])
            about = json.loads((table.schema.metadata or {})[b"ablation"])
            rows = table.select(list(ABLATION_TABLE.names)).to_pylist()
        except RunDirectoryError:
            raise
        except Exception as error:
            raise _unreadable(self.path, error) from None
        self._check_same(self.path, about)
        self.about |= {name: float(about.get(name, 0)) for name in ("passes", "seconds")}
        gathered: dict[Key, list[tuple[int, float]]] = {}
        for row in rows:
            key = Key(*(row[name] for name in _KEY))
            gathered.setdefault(key, []).append((row["example"], row["loss"]))
            if key.data not in self.tokens:  # of an earlier call; it stays as it is
                count = int(about["data"][key.data]["examples"])
                self.tokens[key.data] = np.zeros(count, np.int32)
                self.about["data"][key.data] = about["data"][key.data]
            self.tokens[key.data][row["example"]] = row["tokens"]
        for key, pairs in gathered.items():
            numbers, losses = zip(*pairs, strict=True)
            self._put(key, numbers, losses)

    def _take_lines(self) -> None:
        content = self.unfinished.read_bytes()
        lines = content[: content.rfind(b"\n") + 1].splitlines()  # a kill may cut the last one off
        if not lines:
            return
        try:
            about, *rows = (json.loads(line) for line in lines)
            self._check_same(self.unfinished, about)
            for row in rows:
                key = Key(*(row[name] for name in _KEY))
                if key.data not in self.tokens:
                    raise RunDirectoryError(
                        f"{self.unfinished} is of a call that was interrupted and measured "
                        f"{key.data} data as well: repeat that call, or remove the file."
                    )
                losses = [NON_FINITE[x] if isinstance(x, str) else float(x) for x in row["loss"]]
                self._put(key, row["examples"], losses)
        except RunDirectoryError:
            raise
        except Exception as error:
            raise _unreadable(self.unfinished, error) from None

    def _check_same(self, path: Path, about: Mapping[str, Any]) -> None:
        """Rows that are paired have the same examples, model and arithmetic."""
        for name in _SAME:
            if about.get(name) != as_json(self.about.get(name)):
                raise RunDirectoryError(
                    f"{path} was measured with {name} {about.get(name)!r}, this call has "
                    f"{self.about.get(name)!r}: repeat it with the same, or move the file away to "
                    "measure anew."
                )
        for name, now in self.about["data"].items():
            before = about.get("data", {}).get(name)
            if before is not None and before["digest"] != now["digest"]:
                raise RunDirectoryError(
                    f"{path} was measured on other {name} examples ({_words(before)}) than this "
                    f"call's ({_words(now)}), and rows of a file are paired by example: give the "
                    "same data and max_examples, or move the file away to measure anew."
                )


def _words(about: Mapping[str, Any]) -> str:
    return f"{about.get('examples')} of {about.get('name')}"


def _row(key: Key, examples: Sequence[int], losses: Sequence[float]) -> str:
    return _line(
        {**dict(zip(_KEY, key, strict=True)), "examples": list(examples), "loss": list(losses)}
    )


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(as_json(value), allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _unreadable(path: Path, error: Exception) -> RunDirectoryError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return RunDirectoryError(
        f"{path} cannot be read ({reason}): restore the file, or move it away to measure anew."
    )


def _order(key: Key) -> tuple[Any, ...]:
    """Data, then the whole models, then layers by depth, groups, ranges; then kinds."""
    first, _, last = (key.unit or "").partition("-")
    depth = int(first) if first.isdecimal() else math.inf
    return (key.data != "held_out", key.data, MODES.index(key.mode), last != "", depth, key.unit
            or "", key.kind or "")  # fmt: skip
