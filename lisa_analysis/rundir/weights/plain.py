"""Weights without a run: an adapter, two checkpoints or a model, read like a run that ended."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.layers import canonical_name, kind_of
from lisa_analysis.contract.schema import (
    ABLATION_TABLE,
    EVENTS_TABLE,
    METRICS_TABLE,
    PARAMETERS_TABLE,
    PROBES_TABLE,
    SCALARS_TABLE,
    SCHEMA_VERSION,
    Table,
)
from lisa_analysis.rundir.columns import asked_columns
from lisa_analysis.rundir.run import Layers, Run
from lisa_analysis.rundir.shards import Steps, arrow_schema
from lisa_analysis.rundir.weights.adapter import CONFIG, open_adapter
from lisa_analysis.rundir.weights.changes import of_adapter, of_checkpoints, of_model
from lisa_analysis.rundir.weights.checkpoint import (
    find_layers,
    holds_weights,
    open_checkpoint,
    read_config,
)

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
          "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # fmt: skip


def is_weights(path: Path) -> bool:
    """Whether a path holds an adapter or a model rather than a run."""
    return path.is_file() or (path / CONFIG).exists() or holds_weights(path)


class PlainWeights(Run):
    """An adapter, two checkpoints, or a model alone, with the face of a run.

    Made by `lisa_analysis.load`. Nothing of a course over time is there: no steps, losses or
    gradients, so that what needs them says that it could not run.

    Attributes
    ----------
    base : Path or None
        The weights before.
    changed : list of Changed
        Every weight that is known, in the order of its param_id.
    remarks : tuple of str
        What was not compared, and why.
    """

    has_course = False

    def __init__(self, path: Path, base: Path | None = None) -> None:
        self.path, self.base = path, base
        adapter = path.is_dir() and (path / CONFIG).exists()
        before = None if base is None else open_checkpoint(base)
        remarks: list[str] = []
        if adapter:
            found = open_adapter(path)
            self.changed, remarks = of_adapter(found, before)
            model = found.base_name
        else:
            tuned = open_checkpoint(path)
            model = str(base or path)
            if before is None:
                self.changed = of_model(tuned)
            else:
                self.changed, remarks = of_checkpoints(tuned, before)
                remarks += _rounded(tuned, before)
        if not self.changed:
            raise LisaError(
                f"{path} and {base} have no weight in common: give the model that it was made of."
                if base is not None
                else f"{path} holds no weights: give a model's or an adapter's folder."
            )
        names = [change.name for change in self.changed]
        wide = [change.name for change in self.changed if len(change.shape) > 1]
        # An adapter of one module per layer has one matrix there, and is a stack all the same.
        layers = find_layers(names, wide, least=1 if adapter else 2)
        config = read_config(base or path)
        self.remarks = tuple(remarks)
        self.method = "adapter" if adapter else "weights" if base is not None else "model"
        self.status, self.run_id = "finished", path.resolve().name
        self.warnings = list(remarks)
        self.layer_names = tuple(layers)
        self.manifest = {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "status": self.status,
            "method": self.method,
            "model": {
                "name": model or "unknown",
                "architecture": next(iter(config.get("architectures") or []), None),
                "parameters": sum(change.numel for change in self.changed),
            },
            "layers": [
                {"index": i, "name": name, "stack": name.rsplit(".", 1)[0]}
                for i, name in enumerate(layers)
            ],
        }

    @property
    def default_metric(self) -> str:
        """Metric that these weights are profiled by unless another one is asked for."""
        if self.method == "model":
            return "base_norm"
        return "delta_norm" if self.base is None else "delta_rel"

    @cached_property
    def parameters(self) -> "pd.DataFrame":
        """One row per weight, see `lisa_analysis.contract.schema.PARAMETERS_TABLE`."""
        import pandas as pd

        paths = {f"{name}.": i for i, name in enumerate(self.layer_names)}
        rows = []
        for number, change in enumerate(self.changed):
            name = canonical_name(change.name)
            # Paths end with a dot, so that layer 1 is not found in layer 10.
            cuts = [name[: i + 1] for i, letter in enumerate(name) if letter == "."]
            path = next((cut for cut in cuts if cut in paths), None)
            kind = kind_of(change.name, layer_path=None if path is None else path[:-1])
            rows.append((number, change.name, pd.NA if path is None else paths[path], kind, "base",
                         change.numel, "x".join(map(str, change.shape)),
                         _TYPES.get(change.dtype, change.dtype), pd.NA))  # fmt: skip
        frame = pd.DataFrame(rows, columns=list(PARAMETERS_TABLE.names))
        return frame.astype({"param_id": "int32", "layer": "Int16", "tied_to": "Int32"})

    @cached_property
    def probes(self) -> "pd.DataFrame":
        """No probe was taken."""
        return _nothing(PROBES_TABLE)

    @cached_property
    def ablation(self) -> "pd.DataFrame":
        """Nothing was ablated."""
        return _nothing(ABLATION_TABLE)

    @cached_property
    def scalars(self) -> "pd.DataFrame":
        """Nothing was logged."""
        return _nothing(SCALARS_TABLE)

    @cached_property
    def events(self) -> "pd.DataFrame":
        """Nothing happened that was written down."""
        return _nothing(EVENTS_TABLE)

    def iter_metrics(
        self,
        columns: Sequence[str] | None = None,
        layers: Layers | None = None,
        steps: Steps | None = None,
    ) -> "Iterator[pa.RecordBatch]":
        """No step was recorded."""
        asked_columns(columns)
        return iter(())

    @cached_property
    def _event_lines(self) -> list[dict[str, Any]]:
        return []

    @cached_property
    def _shards(self) -> list[Any]:
        return []

    def __repr__(self) -> str:
        what = {"adapter": "an adapter", "weights": "two checkpoints", "model": "a model"}
        return (
            f"<{what[self.method]}, {len(self.changed)} weights in {self.n_layers} layers: "
            f"{self.path}{'' if self.base is None else f' against {self.base}'}>"
        )


def _rounded(tuned: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Say that a change holds the rounding to a coarser type."""
    types = [{t.dtype for t in side.values() if t.is_float} for side in (tuned, before)]
    if types[0] == types[1]:
        return []
    after, was = (", ".join(sorted(_TYPES.get(t, t) for t in side)) for side in types)
    return [
        f"The tuned weights are {after}, the base {was}: what rounding to the coarser changed is "
        "in every difference."
    ]


def _nothing(table: Table) -> "pd.DataFrame":
    import pyarrow as pa

    fields = arrow_schema(table)
    assert table is not METRICS_TABLE
    return pa.table([pa.nulls(0, f.type) for f in fields], names=fields.names).to_pandas()
