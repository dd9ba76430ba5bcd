"""A log of somebody else's run with the face of a run: loss, rate, global norm, evaluations."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.schema import (
    ABLATION_TABLE,
    EVENTS_TABLE,
    PARAMETERS_TABLE,
    PROBES_TABLE,
    SCALARS_TABLE,
    SCHEMA_VERSION,
    Table,
)
from lisa_analysis.rundir.columns import asked_columns
from lisa_analysis.rundir.jsonl import MOST_STEPS, lines_frame
from lisa_analysis.rundir.logs.sources import read_log
from lisa_analysis.rundir.run import Layers, Run
from lisa_analysis.rundir.shards import Steps, arrow_schema

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

# What to do for everything that a log does not hold.
ATTACH = (
    "attach the recorder in the next run: lisa_train.attach(trainer, "
    "record=lisa_train.RecordConfig('runs/next')), or train with lisa-train"
)
# Our scalar -> what trainers call it, after `train/` or `train_` is taken off.
_NAMES = {
    "loss": ("loss",),
    "learning_rate": ("learning_rate", "lr", "learning_rate/group_0"),
    "grad_norm": ("grad_norm", "gradient_norm", "grad_norm/total", "total_grad_norm"),
    "epoch": ("epoch",),
    "tokens": ("num_input_tokens_seen", "num_tokens", "tokens"),
}
_MEANT = {name: ours for ours, names in _NAMES.items() for name in names}
_HELD_OUT = ("eval/", "eval_", "val/", "val_", "valid/", "validation/", "test/")


class OthersLog(Run):
    """A `trainer_state.json`, TensorBoard's event files, or a project of trackio.

    Made by `lisa_analysis.load`. There is no layer in it: diagnostics of the course run, a profile
    says what to attach.

    Attributes
    ----------
    kind : str
        ``trainer_state.json``, ``TensorBoard`` or ``trackio``.
    """

    has_layers = False

    def __init__(self, path: Path) -> None:
        self.path = path
        found = read_log(path)
        self.kind = found.kind
        self.method = "log"
        self.status = "finished" if found.finished is not False else "interrupted"
        self.run_id = found.name or path.resolve().name
        self.layer_names = ()
        self._lines, self._evaluations, others = _sorted_out(found.values)
        steps = sorted({*self._lines, *self._evaluations})
        self.warnings = list(found.remarks)
        if others:
            named = ", ".join(sorted(others)[:6])
            self.warnings.append(f"Not read of this log: {named}{' …' if len(others) > 6 else ''}.")
        losses = [(step, m["eval_loss"]) for step, m in sorted(self._evaluations.items())
                  if "eval_loss" in m]  # fmt: skip
        result: dict[str, Any] = {"steps": steps[-1] if steps else 0}
        if losses:
            result |= {"first_held_out_loss": losses[0][1], "last_held_out_loss": losses[-1][1]}
        self.manifest = {
            "schema_version": SCHEMA_VERSION,
            "run_id": self.run_id,
            "status": self.status,
            "method": self.method,
            "model": {"name": f"a model that {self.kind} does not name"},
            "layers": [],
            "result": result,
        }

    @property
    def waiting(self) -> str | None:
        """Nothing is known of who writes it."""
        return None

    @cached_property
    def parameters(self) -> "pd.DataFrame":
        """No tensor is known."""
        frame = _empty(PARAMETERS_TABLE)
        return frame.astype({"layer": "Int16", "tied_to": "Int32"})

    @cached_property
    def probes(self) -> "pd.DataFrame":
        """No probe was taken."""
        return _empty(PROBES_TABLE)

    @cached_property
    def ablation(self) -> "pd.DataFrame":
        """Nothing was ablated."""
        return _empty(ABLATION_TABLE)

    @cached_property
    def scalars(self) -> "pd.DataFrame":
        """One row per logged step; a Trainer's `loss` is the mean since the line before."""
        blank = dict.fromkeys(SCALARS_TABLE.names)
        lines = [{**blank, "step": step, **self._lines[step]} for step in sorted(self._lines)]
        return lines_frame(lines, SCALARS_TABLE)

    @cached_property
    def events(self) -> "pd.DataFrame":
        """One row per evaluation."""
        blank = {**dict.fromkeys(EVENTS_TABLE.names), "event": "evaluate", "time": 0.0}
        found = sorted(self._evaluations.items())
        lines = [{**blank, "step": step, "metrics": metrics} for step, metrics in found]
        return lines_frame(lines, EVENTS_TABLE)

    def iter_metrics(
        self,
        columns: Sequence[str] | None = None,
        layers: Layers | None = None,
        steps: Steps | None = None,
    ) -> "Iterator[pa.RecordBatch]":
        """No layer was recorded."""
        asked_columns(columns)
        return iter(())

    @cached_property
    def _event_lines(self) -> list[dict[str, Any]]:
        return []

    @cached_property
    def _shards(self) -> list[Any]:
        return []

    def __repr__(self) -> str:
        return f"<log of {self.kind}, {len(self._lines)} steps: {self.path}>"


def _sorted_out(
    values: list[tuple[str, int, float]],
) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, float]], set[str]]:
    """Lines by step, evaluations by step, and the names that mean nothing here.

    Of two values of one name and step the later counts: a run that was resumed repeats its steps.
    """
    lines: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, float]] = {}
    others: set[str] = set()
    for name, step, value in values:
        if not 0 <= step <= MOST_STEPS:
            continue
        held_out = next((head for head in _HELD_OUT if name.startswith(head)), None)
        if held_out is not None:
            evaluations.setdefault(step, {})[f"eval_{name.removeprefix(held_out)}"] = value
            continue
        ours = _MEANT.get(name.removeprefix("train/").removeprefix("train_"))
        # `train_loss` of the last line of a Trainer is the mean of the whole training.
        if ours is None or name == "train_loss":
            others.add(name)
        else:
            lines.setdefault(step, {})[ours] = int(value) if ours == "tokens" else value
    return {s: line for s, line in lines.items() if set(line) != {"epoch"}}, evaluations, others


def _empty(table: Table) -> "pd.DataFrame":
    import pyarrow as pa

    fields = arrow_schema(table)
    return pa.table([pa.nulls(0, f.type) for f in fields], names=fields.names).to_pandas()
