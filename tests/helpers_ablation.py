"""Ablations of known worth, written as `lisa-ablate` writes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lisa_analysis.contract.schema import ABLATION, ABLATION_TABLE, SCHEMA_VERSION
from lisa_analysis.rundir.shards import arrow_schema

Unit = tuple[str, str | None]


def layers(worth: Sequence[float]) -> dict[Unit, float]:
    """Worth by unit, of layers in their order."""
    return {(str(layer), None): value for layer, value in enumerate(worth)}


def ablation_rows(
    reset: Mapping[Unit, float],
    keep: Mapping[Unit, float] | None = None,
    *,
    data: str = "held_out",
    examples: int = 64,
    noise: float = 0.02,
    gain: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Losses per example whose expectation per token is the given worth, with noise per example.

    On general text a worth is that of the base: what is negative was forgotten.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(4, 60, size=examples)
    base = tokens * (3 + 0.3 * rng.standard_normal(examples))
    trained = base - tokens * (gain + 0.1 * rng.standard_normal(examples))
    rows = [(None, None, "base", base), (None, None, "trained", trained)]
    for (unit, kind), value in reset.items():
        moved = tokens * (value + noise * rng.standard_normal(examples) * (value != 0))
        rows.append((unit, kind, "reset", trained + moved))
    for (unit, kind), value in (keep or {}).items():
        moved = tokens * (value + noise * rng.standard_normal(examples) * (value != 0))
        rows.append((unit, kind, "keep", base - moved))
    return pd.concat(
        pd.DataFrame(
            {"unit": unit, "kind": kind, "mode": mode, "data": data,
             "example": np.arange(examples), "loss": loss, "tokens": tokens}
        )
        for unit, kind, mode, loss in rows
    )  # fmt: skip


def write_ablation(run: Path, frame: pd.DataFrame) -> Path:
    """Write `frame` into the run directory."""
    schema = arrow_schema(ABLATION_TABLE)
    # A loss that is NaN was measured; a unit or kind that is not there is null.
    arrays = [pa.array(frame[f.name], f.type, from_pandas=f.name != "loss") for f in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    path = run / ABLATION
    pq.write_table(table.replace_schema_metadata({"schema_version": SCHEMA_VERSION}), path)
    return path
