"""run.json: how a run begins, how it goes on, and in what words it ended."""

import datetime
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import (
    CONFIG,
    MANIFEST,
    PARAMETERS,
    SCHEMA_VERSION,
)
from lisa_analysis.rundir.manifest import read_manifest
from lisa_analysis.rundir.shards import read_parameters
from lisa_train.measure.disk.encoding import as_utf8, parameter_table, write_parquet
from lisa_train.measure.disk.storage import replace_file
from lisa_train.model.parallel import lost_a_process

if TYPE_CHECKING:
    import pyarrow as pa


def begun(
    folder: Path,
    entries: Mapping[str, Any],
    parameters: Sequence[Mapping[str, Any]],
    config_yaml: str | None,
) -> dict[str, Any]:
    """Return run.json of a run that begins; its tensors and its configuration are written.

    Raises
    ------
    RunDirectoryError
        When the folder holds a run already.
    """
    if (folder / MANIFEST).exists():
        raise RunDirectoryError(
            f"{folder} already holds a run: choose another run directory, or resume "
            "that run from its checkpoint."
        )
    write_parquet(folder / PARAMETERS, parameter_table(parameters))
    if config_yaml is not None:
        text = as_utf8(config_yaml)
        replace_file(folder / CONFIG, lambda path: path.write_text(text, "utf-8"))
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": new_run_id(),
        "created": now(),
        "segment": 0,
        **entries,
    }


def continued(
    folder: Path, entries: Mapping[str, Any], parameters: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return run.json of a run that goes on in a new segment.

    Raises
    ------
    RunDirectoryError
        When the folder holds no run, or that of another model.
    """
    if not (folder / MANIFEST).exists():
        raise RunDirectoryError(f"{folder} holds no run to resume: give its directory.")
    table = parameter_table(parameters)
    manifest, _ = read_manifest(folder / MANIFEST)
    _check_same_tensors(folder, table)
    for field in ("error", "result"):  # of how the earlier segment ended
        manifest.pop(field, None)
    manifest["segment"] = int(manifest.get("segment", 0)) + 1
    # Of where it goes on now; `segments` keeps what was.
    return manifest | {k: entries[k] for k in ("hardware", "versions") if k in entries}


def segments(
    manifest: Mapping[str, Any], segment: int, step: int, parts: Mapping[str, Any] | None
) -> list[Any]:
    """Return the segments of run.json with one more, that begins at `step`.

    `parts` say how its steps are put together.
    """
    known = manifest.get("segments")
    entry = {"segment": segment, "step": step, "started": now(), **(parts or {})}
    return [*(known if isinstance(known, list) else []), entry]


def _check_same_tensors(folder: Path, table: "pa.Table") -> None:
    """Refuse to continue the run of another model."""
    known = read_parameters(folder / PARAMETERS, 2**15, [])
    before = list(zip(known["param_id"], known["name"], known["shape"], strict=True))
    now = list(zip(*(table[c].to_pylist() for c in ("param_id", "name", "shape")), strict=True))
    same = [_same(b, n) for b, n in zip(before, now, strict=False)]
    if not all(same) or len(before) != len(now):
        changed = next((n for n, kept in zip(now, same, strict=False) if not kept), None)
        detail = f"; the first that differs is {changed[1]!r}" if changed else ""
        raise RunDirectoryError(
            f"{folder} was recorded from another model ({len(before)} tensors, this one "
            f"has {len(now)}{detail}): choose another run directory."
        )


def _same(before: tuple[int, str, str], now: tuple[int, str, str]) -> bool:
    """Whether two rows are of one tensor; versions before 2026-11-28 wrote 4-bit weights packed."""
    if before == now:
        return True
    packed, _, width = before[2].partition("x")
    if before[:2] != now[:2] or width != "1" or not packed.isdecimal():
        return False
    size = math.prod(map(int, now[2].split("x")))
    # Two in a byte, in elements of one, two or four bytes.
    return any(-(-size // held) == int(packed) for held in (2, 4, 8))


def new_run_id() -> str:
    """Return a name for a run: its start (UTC) and six random hexadecimal digits."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{secrets.token_hex(3)}"


def now() -> str:
    """Return the time, ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def status_of(error: BaseException | None) -> tuple[str, str | None]:
    """Return the status and the sentence of a run that ended with `error`, or without one."""
    if error is None:
        return "finished", None
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return "interrupted", None
    if lost_a_process(error):
        return "interrupted", f"another process ended: {one_sentence(error)}"
    return "failed", one_sentence(error)


def one_sentence(error: BaseException) -> str:
    """Return an exception as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__
