"""Findings while a run goes on: the rules of `diagnose`, on its newest steps, in memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lisa_analysis.contract.schema import (
    EVENTS_TABLE,
    METRICS_TABLE,
    PARAMETERS_TABLE,
    SCALARS_TABLE,
)
from lisa_analysis.rundir.columns import asked_columns
from lisa_analysis.rundir.jsonl import lines_frame
from lisa_analysis.rundir.run import Layers, Run
from lisa_analysis.rundir.shards import KEYS, Steps, arrow_schema
from lisa_analysis.runs.diagnostics.finding import Finding
from lisa_analysis.runs.diagnostics.gradients import DeadLayers, NonFinite
from lisa_analysis.runs.diagnostics.rule import Evidence, Rule
from lisa_analysis.runs.diagnostics.schedule import Coverage
from lisa_analysis.runs.diagnostics.updates import Bf16Stall, SampledNotUpdated
from lisa_analysis.runs.diagnostics.weights import LoraDead

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

# A layer that waits for its first draw is reported once chance alone hardly explains it.
CHANCE = 1e-3


def live_rules() -> list[Rule]:
    """Return the rules that mean something before a run has ended."""
    return [
        NonFinite(), DeadLayers(), SampledNotUpdated(), Bf16Stall(), LoraDead(),
        Coverage(chance=CHANCE),
    ]  # fmt: skip


class NewestSteps(Run):
    """The newest recorded steps of a run that is being written, with the face of a run.

    Parameters
    ----------
    manifest
        run.json.
    parameters
        One mapping per tensor with the columns of `lisa_analysis.contract.schema.PARAMETERS_TABLE`.
    rows
        Of each recorded step, in order, the columns of the metrics as arrays of one length; masked
        entries of a masked array are null.
    lines
        Lines of the scalars since the first of these steps.
    draws
        LISA's draws so far: the step, and the fields of the event.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        parameters: Sequence[Mapping[str, Any]],
        rows: Iterable[Mapping[str, Any]],
        lines: Iterable[Mapping[str, Any]] = (),
        draws: Iterable[tuple[int, Mapping[str, Any]]] = (),
    ) -> None:
        self.manifest = dict(manifest)
        self.warnings: list[str] = []
        self.run_id = str(manifest.get("run_id", ""))
        self.method = str(manifest.get("method", ""))
        self.status = "running"
        self.layer_names = tuple(layer["name"] for layer in manifest["layers"])
        self._tensors = parameters
        self._batches = [_batch(one) for one in rows]
        self._lines = [{name: line.get(name) for name in SCALARS_TABLE.names} for line in lines]
        known = {**dict.fromkeys(EVENTS_TABLE.names), "event": "lisa_draw", "time": 0.0}
        self._draws = [{**known, "step": step, **fields} for step, fields in draws]

    @cached_property
    def parameters(self) -> "pd.DataFrame":  # type: ignore[override]
        """One row per tensor."""
        import pyarrow as pa

        names = PARAMETERS_TABLE.names
        rows = [{name: row.get(name) for name in names} for row in self._tensors]
        frame = pa.Table.from_pylist(rows, schema=arrow_schema(PARAMETERS_TABLE)).to_pandas()
        return frame.astype({"layer": "Int16", "tied_to": "Int32"})

    @property
    def scalars(self) -> "pd.DataFrame":  # type: ignore[override]
        """One row per optimizer step since the oldest that is kept."""
        return lines_frame(self._lines, SCALARS_TABLE)

    @property
    def events(self) -> "pd.DataFrame":  # type: ignore[override]
        """One row per draw."""
        return lines_frame(self._draws, EVENTS_TABLE)

    def iter_metrics(
        self,
        columns: Sequence[str] | None = None,
        layers: Layers | None = None,
        steps: Steps | None = None,
    ) -> "Iterator[pa.RecordBatch]":
        """Yield the rows of the kept steps, all of them."""
        names = asked_columns(columns)
        for batch in self._batches:
            yield batch.select([*KEYS, *names])


def _batch(rows: Mapping[str, Any]) -> "pa.RecordBatch":
    """Rows of one step as Arrow holds them, with null for what is absent."""
    import pyarrow as pa

    schema = arrow_schema(METRICS_TABLE)
    arrays = []
    for field in schema:
        given = rows.get(field.name)
        if given is None:
            arrays.append(pa.nulls(len(rows["step"]), field.type))
            continue
        mask = np.ma.getmaskarray(given)
        arrays.append(pa.array(np.ma.getdata(given), field.type, mask=mask, from_pandas=False))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def judge(run: NewestSteps, rules: Iterable[Rule]) -> list[tuple[Rule, Finding]]:
    """Return what is wrong now, and the rule that says so."""
    evidence = Evidence(run)
    judged = [(rule, rule(evidence)) for rule in rules if rule.applies(run)]
    return [(rule, finding) for rule, finding in judged if finding.state in ("fail", "warn")]
