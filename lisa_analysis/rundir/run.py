"""Run: opens and checks one run directory, pushes filters down to its files."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract import reprs as notebook
from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.contract.schema import (
    ABLATION,
    EVENTS,
    EVENTS_TABLE,
    LOCK,
    MANIFEST,
    METRICS_DIR,
    PARAMETERS,
    PROBES_DIR,
    SCALARS,
    SCALARS_TABLE,
)
from lisa_analysis.rundir.ablation import read_ablation
from lisa_analysis.rundir.columns import asked_columns, empty_schema, non_finite_values
from lisa_analysis.rundir.events import usable_events
from lisa_analysis.rundir.jsonl import lines_frame, read_lines
from lisa_analysis.rundir.manifest import next_flush, read_manifest, writer_lives
from lisa_analysis.rundir.metrics_rows import MetricsRows, Wanted
from lisa_analysis.rundir.probes import read_probes
from lisa_analysis.rundir.shards import (
    KEYS,
    Steps,
    last_valid_steps,
    list_shards,
    read_parameters,
    step_bounds,
    whole_numbers,
)

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Layers = int | slice | Sequence[int]


class Run:
    """One run directory.

    Attributes
    ----------
    path : Path
        The folder.
    manifest : dict
        run.json, see `lisa_analysis.contract.schema.MANIFEST_FIELDS`.
    run_id, method : str
        From the manifest.
    status : str
        ``running``, ``finished``, ``failed`` or ``interrupted``. A run whose file says
        ``running`` but whose process is gone is ``interrupted``.
    layer_names : tuple of str
        Canonical module path of every layer, by index.
    base : Path or None
        Where the base model is, when that was said at `load`.
    has_course : bool
        Whether there was a training to look at, not weights alone.
    has_layers : bool
        Whether layers were recorded; a log of another trainer has none.
    warnings : list of str
        What was left out or looks wrong so far, in sentences; grows as tables are read.
    """

    base: Path | None = None
    has_course: bool = True
    has_layers: bool = True

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            is_directory, exists = path.is_dir(), path.exists()
        except OSError as error:
            raise RunDirectoryError(
                f"{path} cannot be opened ({error.strerror or error}): check its permissions."
            ) from None
        if not is_directory:
            found = "is a file, not a folder" if exists else "does not exist"
            raise RunDirectoryError(f"{path} {found}: give the run directory of a training run.")
        if not (path / MANIFEST).exists():
            raise RunDirectoryError(
                f"{path} holds no {MANIFEST}: it is not a run directory, give the folder that "
                "lisa-train wrote (its output_dir), an adapter's or a model's."
            )
        self.manifest, self.warnings = read_manifest(path / MANIFEST)
        self.run_id: str = self.manifest["run_id"]
        self.method: str = self.manifest["method"]
        self.layer_names = tuple(layer["name"] for layer in self.manifest["layers"])
        self.status: str = self.manifest["status"]
        if self.status == "running" and not writer_lives(path / LOCK):
            self.status = "interrupted"

    @property
    def is_probe(self) -> bool:
        """Whether nothing was trained: batches went through a model as it is."""
        return self.method == "probe"

    @property
    def waiting(self) -> str | None:
        """Of a run that is being written: that no step has reached the disk yet, and until when."""
        return next_flush(self.path, self.manifest) if self.status == "running" else None

    @property
    def n_layers(self) -> int:
        """Number of layers of all stacks together."""
        return len(self.layer_names)

    @cached_property
    def parameters(self) -> "pd.DataFrame":
        """One row per tensor, see `lisa_analysis.contract.schema.PARAMETERS_TABLE`."""
        return read_parameters(self.path / PARAMETERS, self.n_layers, self.warnings)

    @cached_property
    def probes(self) -> "pd.DataFrame":
        """What probes measured, see `lisa_analysis.contract.schema.PROBES_TABLE`.

        A run may hold several, told apart by `step`: what a resumed segment replaced is left out.
        """
        return read_probes(
            self.path / PROBES_DIR,
            self.parameters["param_id"].to_numpy(),
            self.warnings,
            last_valid_steps(self._segment_starts, self._shards),
        )

    @cached_property
    def ablation(self) -> "pd.DataFrame":
        """What the layers' changes were worth, `lisa_analysis.contract.schema.ABLATION_TABLE`."""
        return read_ablation(self.path / ABLATION, self.n_layers, self.warnings)

    @cached_property
    def scalars(self) -> "pd.DataFrame":
        """One row per logged optimizer step, see `lisa_analysis.contract.schema.SCALARS_TABLE`."""
        lines, warnings = read_lines(self.path / SCALARS, SCALARS_TABLE, extra=False)
        self._warn(warnings)
        # A step that a resumed segment repeated stands as the newest segment wrote it.
        valid = self._still_valid(lines)
        newest = {line["step"]: line for line in valid}
        if repeated := len(valid) - len({(line["step"], line["segment"]) for line in valid}):
            self._warn(
                [
                    f"{SCALARS} repeats the step of {repeated} lines within a segment: of each "
                    "step the last line counts."
                ]
            )
        ordered = [newest[step] for step in sorted(newest)]
        return lines_frame(ordered, SCALARS_TABLE)

    @cached_property
    def events(self) -> "pd.DataFrame":
        """One row per event; fields by kind in `lisa_analysis.contract.schema.EVENT_FIELDS`."""
        kept: list[dict[str, Any]] = []
        draws: dict[int, int] = {}
        for line in self._still_valid(self._event_lines):
            if line["event"] == "lisa_draw":
                # A resume repeats the draw of the period that it continues.
                if line["step"] in draws:
                    kept[draws[line["step"]]] = line
                    continue
                draws[line["step"]] = len(kept)
            kept.append(line)
        return lines_frame(kept, EVENTS_TABLE)

    def metrics(
        self,
        columns: Sequence[str] | None = None,
        layers: Layers | None = None,
        steps: Steps | None = None,
    ) -> "pd.DataFrame":
        """Read metrics rows, with the filters pushed down to the files.

        Parameters
        ----------
        columns
            Names from `lisa_analysis.contract.schema.METRICS_TABLE`; None reads all.
        layers
            Layer index, slice or indices (negative ones count from the end); None reads every
            tensor, those outside the stack too.
        steps
            Slice of step numbers (the end is not included) or step numbers; None reads all.

        Returns
        -------
        DataFrame
            `step`, `param_id` and the columns, sorted by both. Null and NaN are both NaN here;
            `non_finite` tells what was measured and not finite.
        """
        import pyarrow as pa

        names = asked_columns(columns)
        batches = list(self.iter_metrics(names, layers, steps))
        schema = batches[0].schema if batches else empty_schema(names)
        table = pa.Table.from_batches(batches, schema=schema)
        table = table.sort_by([(key, "ascending") for key in KEYS])
        if "opt_steps" in names:
            index = table.schema.get_field_index("opt_steps")
            table = table.set_column(index, "opt_steps", table["opt_steps"].cast(pa.float64()))
        return table.to_pandas()

    def norms(self, column: str = "grad_norm", *, by: str = "layer") -> "pd.DataFrame":
        """Return one measured column as a frame step × layer, see `lisa_analysis.norms`."""
        import lisa_analysis

        return lisa_analysis.norms(self, column, by=by)

    def iter_metrics(
        self,
        columns: Sequence[str] | None = None,
        layers: Layers | None = None,
        steps: Steps | None = None,
    ) -> "Iterator[pa.RecordBatch]":
        """Yield the rows of `metrics` as Arrow batches, shard by shard, in bounded memory.

        Batches come in the order of steps; within a batch the order is the file's. Rows that a
        resumed segment replaced are already left out. Arrow keeps null and NaN apart.
        """
        names = asked_columns(columns)
        param_ids = None if layers is None else self._param_ids(layers)
        return self._rows.read(names, Wanted(*step_bounds(steps), param_ids))

    @cached_property
    def _rows(self) -> MetricsRows:
        limits = last_valid_steps(self._segment_starts, self._shards)
        return MetricsRows(
            self._shards, limits, lambda: self.parameters["param_id"].to_numpy(), self._warn
        )

    def non_finite(self) -> "pd.DataFrame":
        """Return every value that was measured and is NaN or infinite.

        Returns
        -------
        DataFrame
            `step`, `param_id`, `column`, `value`, in the order of steps.
        """
        return non_finite_values(self.iter_metrics)

    @cached_property
    def _event_lines(self) -> list[dict[str, Any]]:
        path = self.path / EVENTS
        lines, warnings = read_lines(path, EVENTS_TABLE, extra=True)
        self._warn(warnings)
        lines, warnings = usable_events(lines, self.n_layers, path)
        self._warn(warnings)
        return lines

    @cached_property
    def _shards(self) -> list[Any]:
        shards, warnings = list_shards(self.path / METRICS_DIR)
        self._warn(warnings)
        return shards

    @cached_property
    def _segment_starts(self) -> dict[int, int]:
        return {
            line["segment"]: line["step"]
            for line in self._event_lines
            if line["event"] == "resume" and line["segment"]
        }

    def _still_valid(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        limits = last_valid_steps(self._segment_starts, self._shards)
        return [
            line
            for line in lines
            if (limit := limits.get(line["segment"] or 0)) is None or line["step"] <= limit
        ]

    def _warn(self, warnings: Sequence[str]) -> None:
        self.warnings.extend(w for w in warnings if w not in self.warnings)

    def _param_ids(self, layers: Layers) -> list[int]:
        wanted: list[int] = []
        if isinstance(layers, slice):
            wanted = list(range(self.n_layers))[layers]
        else:
            for layer in whole_numbers(layers, "layers"):
                index = layer + (self.n_layers if layer < 0 else 0)
                if not 0 <= index < self.n_layers:
                    raise RunDirectoryError(
                        f"There is no layer {layer} in {self.path}: it has {self.n_layers} "
                        "layers, counted from 0."
                    )
                wanted.append(index)
        table = self.parameters
        return [int(i) for i in table["param_id"][table["layer"].isin(wanted)]]

    def __repr__(self) -> str:
        model = self.manifest.get("model")
        name = model.get("name") if isinstance(model, dict) else None
        return (
            f"Run {self.run_id!r} ({self.method}, {self.status}): {name or 'a model'} with "
            f"{self.n_layers} layers, started {self.manifest.get('created', 'at an unknown time')}"
            f", {len(self._shards)} metrics shards in {self.path}"
        )

    def _repr_html_(self) -> str:
        first, last = (self._entry("result", f"{x}_held_out_loss") for x in ("first", "last"))
        measured = isinstance(first, float) and isinstance(last, float)
        every = self._entry("recording", "every")
        return notebook.facts(
            [
                ("run", self.run_id),
                ("method", f"{self.method}, {self.status}"),
                ("model", self._entry("model", "name") or self._entry("model", "architecture")),
                ("layers", self.n_layers),
                ("steps", self._entry("result", "steps")),
                ("held-out loss", f"{first:.3f} → {last:.3f}" if measured else None),
                ("measured", "every step" if every == 1 else every and f"every {every} steps"),
                ("started", str(self.manifest.get("created", "unknown"))[:19].replace("T", " ")),
                ("folder", self.path),
            ]
        )

    def _entry(self, part: str, name: str) -> Any:
        """Value in a part of the manifest; None when there is no such part."""
        found = self.manifest.get(part)
        return found.get(name) if isinstance(found, dict) else None
