"""The contract between the two halves: files, columns, types, meanings, version (stdlib only).

Everything that a run directory holds is stated here once: files and columns here, the entries of
its JSON in `fields`, and all of it is imported from here. The writer (`lisa_train.measure.disk`)
and the reader (`lisa_analysis.rundir`) import it, and the documentation and the report print from
it.

Steps count *completed* optimizer steps. A metrics row with ``step = s`` describes the s-th
optimizer step (s >= 1) and the weights after it; rows with ``step = 0`` are the census before
any training. A ``lisa_draw`` event with ``step = s`` chooses the layers for the optimizer steps
s+1 … s+K.
"""

import re
from typing import Literal

from lisa_analysis.contract.fields import ABLATION_FIELDS as ABLATION_FIELDS
from lisa_analysis.contract.fields import EVENT_FIELDS as EVENT_FIELDS
from lisa_analysis.contract.fields import HELD_OUT_SCORES as HELD_OUT_SCORES
from lisa_analysis.contract.fields import MANIFEST_FIELDS as MANIFEST_FIELDS
from lisa_analysis.contract.tables import Adds as Adds
from lisa_analysis.contract.tables import Column as Column
from lisa_analysis.contract.tables import ColumnType as ColumnType
from lisa_analysis.contract.tables import FactTable as FactTable
from lisa_analysis.contract.tables import Moment as Moment
from lisa_analysis.contract.tables import Table as Table
from lisa_analysis.contract.tables import to_markdown as to_markdown

SCHEMA_VERSION = "1.2"

MANIFEST = "run.json"
CONFIG = "config.yaml"
PARAMETERS = "parameters.parquet"
METRICS_DIR = "metrics"
PROBES_DIR = "probes"
ABLATION = "ablation.parquet"
ABLATION_UNFINISHED = "ablation.unfinished.jsonl"
SCALARS = "scalars.jsonl"
EVENTS = "events.jsonl"
CHECKPOINTS_DIR = "checkpoints"
ADAPTER_DIR = "adapter"
ADAPTER_START = "adapter_start.safetensors"
LOCK = "run.lock"

Status = Literal["running", "finished", "failed", "interrupted"]
STATUSES: tuple[str, ...] = ("running", "finished", "failed", "interrupted")

PARAMETERS_TABLE = Table(
    "parameters",
    PARAMETERS,
    "one row per tensor of the model",
    (
        Column("param_id", "int32", False, "identifier used by the metrics table"),
        Column("name", "string", False, "the name in `model.named_parameters()`"),
        Column("layer", "int16", True, "index of the layer in the stack; null outside the stack"),
        Column("kind", "string", False, "attn.q … mlp.down, norm, embed, head, prompt, other"),
        Column("role", "string", False, "base, lora_A, lora_B, …: base weight or adapter part"),
        Column("numel", "int64", False, "number of elements"),
        Column("shape", "string", False, "shape, as '576x1536'"),
        Column("dtype", "string", False, "storage precision, as 'bfloat16'"),
        Column(
            "tied_to",
            "int32",
            True,
            "param_id of the tensor this name shares storage with; "
            "a tied name has no metrics rows of its own",
        ),
    ),
)

METRICS_TABLE = FactTable(
    "metrics",
    METRICS_DIR,
    "one row per recorded step and tensor; null = not measured, NaN or inf = measured and "
    "non-finite; a frozen tensor is absent from a training step, never zero; numbers have 18 "
    "significant bits (relative 4e-6)",
    (
        Column("step", "int64", False, "completed optimizer steps; 0 = before training"),
        Column("param_id", "int32", False, "the tensor, see the parameters table"),
        Column(
            "weight_norm",
            "float32",
            True,
            "‖θ_t‖ of the tensor after the step (Frobenius, accumulated in at least two-level "
            "fp32)",
            adds="squares",
            when="weights",
        ),
        Column(
            "grad_norm",
            "float32",
            True,
            "‖g_t‖ of the accumulated gradient of the optimizer step, before clipping",
            adds="squares",
            when="gradients",
        ),
        Column(
            "grad_norm_l1",
            "float32",
            True,
            "‖g_t‖₁ of the same gradient",
            adds="values",
            when="gradients",
        ),
        Column(
            "update_norm",
            "float32",
            True,
            "‖θ_{t+1} − θ_t‖ as realised in the stored precision",
            adds="squares",
            when="update",
        ),
        Column(
            "descent",
            "float32",
            True,
            "−⟨g_t, θ_{t+1} − θ_t⟩: the loss decrease that the step predicts, additive over "
            "tensors; g_t is the gradient before clipping",
            adds="values",
            when="update",
            signed=True,
        ),
        Column(
            "delta_norm",
            "float32",
            True,
            "‖W_t − W_0‖ since the run began; for LoRA ‖(α/r)(BA − B_0A_0)‖ by r×r Gram "
            "matrices, on the row of lora_B (DoRA: of the rescaled weight, in censuses); null "
            "where the adapter is no product BA",
            adds="squares",
            when="weights",
        ),
        Column(
            "merged_norm",
            "float32",
            True,
            "LoRA only: ‖W + (α/r)BA‖ of the adapted weight (DoRA: rescaled), on the row of "
            "lora_B; measured in censuses (step 0, checkpoints, the end), since it takes all base "
            "weights; at step 0 it is the ‖W_0‖ of delta_norm",
            adds="squares",
            when="census",
        ),
        Column(
            "opt_steps",
            "int32",
            True,
            "the optimizer's own step count of the tensor: a reset is visible",
            adds="copies",
            when="update",
        ),
        Column(
            "grad_noise",
            "float32",
            True,
            "optional: variance of the gradient between the micro-batches of the step, those of "
            "all processes, tr Σ of one micro-batch gradient (unbiased)",
            adds="values",
            when="gradients",
        ),
        Column(
            "probe_grad_norm",
            "float32",
            True,
            "optional: ‖g_t‖ from a measuring pass with all layers, frozen ones included, mean "
            "over the processes; of several batches (probes) the root of the mean square; no "
            "update is made from it",
            adds="squares",
            when="probe",
        ),
    ),
)

PROBES_TABLE = Table(
    "probes",
    PROBES_DIR,
    "one row per probed batch and tensor, at fixed weights; one row per tensor with batch null for "
    "what all batches of the step gave together",
    (
        Column("step", "int64", False, "optimizer steps done when the probe was taken"),
        Column("batch", "int32", True, "number of the batch, from 0; null = all batches together"),
        Column("param_id", "int32", False, "the tensor, see the parameters table"),
        Column("grad_norm", "float32", True, "‖g_b‖ of the gradient of the batch's mean loss"),
        Column("grad_norm_l1", "float32", True, "‖g_b‖₁ of the same gradient"),
        Column("taylor", "float32", True, "⟨g_b, θ⟩ with the weights θ, additive over tensors"),
        Column(
            "signal",
            "float32",
            True,
            "‖E g‖², unbiased and additive over tensors, below zero where it is small: the mean of "
            "all products of two batches; in a batch's own row ⟨g_b, mean of the other batches⟩, "
            "whose mean over the batches it is",
        ),
        Column("noise", "float32", True, "tr Σ of one batch's gradient, additive over tensors"),
    ),
)

ABLATION_TABLE = Table(
    "ablation",
    ABLATION,
    "one row per example, unit and mode: the loss of one example with what one unit learned taken "
    "out of the trained model, or put into the base alone; every unit of a `data` has the same "
    "examples",
    (
        Column(
            "unit",
            "string",
            True,
            "layer index (`3`), `embed`, `head`, `norm`, `other`, or layers `4-7`, both ends "
            "included; null = the whole model (modes trained and base)",
        ),
        Column("kind", "string", True, "kind of tensor in the unit, as attn.q; null = all of it"),
        Column(
            "mode",
            "string",
            False,
            "trained, base; reset = the trained model with the unit's learned change taken out; "
            "keep = the base with the unit's learned change alone",
        ),
        Column("data", "string", False, "held_out, or general: text that was not trained for"),
        Column("example", "int32", False, "number of the example in its data, from 0"),
        Column("loss", "float64", False, "loss of the example in nats, summed over its labels"),
        Column("tokens", "int32", False, "labels that the loss is a sum over; at least 1"),
    ),
)

SCALARS_TABLE = Table(
    "scalars",
    SCALARS,
    "one line per logged optimizer step",
    (
        Column("step", "int64", False, "completed optimizer steps"),
        Column("epoch", "float64", True, "passes over the training data"),
        Column(
            "loss",
            "float64",
            True,
            "training loss of the step, mean over the labels that count (none: null); of a batch "
            "without labels, as of preferences, the trainer's own",
        ),
        Column("learning_rate", "float64", True, "learning rate used by the step"),
        Column("grad_norm", "float64", True, "global gradient norm before clipping"),
        Column("clip_coef", "float64", True, "factor applied by clipping; 1 = not clipped"),
        Column(
            "tokens",
            "int64",
            True,
            "tokens seen since the start of the run, those that a decoder writes too",
        ),
        Column(
            "step_seconds",
            "float64",
            True,
            "wall time of the step, and of what is recorded before and after it",
        ),
        Column(
            "recorder_seconds",
            "float64",
            True,
            "part of it spent recording; every moment of recording counts in one step",
        ),
        Column(
            "peak_memory_bytes",
            "int64",
            True,
            "peak allocated device memory so far (CUDA), or peak resident set (CPU)",
        ),
        Column(
            "micro_batches",
            "int32",
            True,
            "micro-batches of the step, those of all processes; counted with grad_noise",
        ),
        Column("skipped", "bool", True, "the optimizer step was skipped (fp16 overflow)"),
        Column("segment", "int32", True, "segment that wrote the line; absent = 0"),
    ),
)

EVENTS_TABLE = Table(
    "events",
    EVENTS,
    "one line per event; every line has event, step and time (seconds since 1970)",
    (
        Column("event", "string", False, "lisa_draw, evaluate, checkpoint, probe, resume, warning"),
        Column("step", "int64", False, "completed optimizer steps when it happened"),
        Column("time", "float64", False, "seconds since 1970, UTC"),
        Column("segment", "int32", True, "segment that wrote the line; absent = 0"),
    ),
)

TABLES: tuple[Table, ...] = (
    PARAMETERS_TABLE,
    METRICS_TABLE,
    PROBES_TABLE,
    ABLATION_TABLE,
    SCALARS_TABLE,
    EVENTS_TABLE,
)

_SHARD = re.compile(r"part-(\d{3,})-(\d{8,})\.parquet")


def shard_name(segment: int, first_step: int) -> str:
    """File name of the metrics shard of `segment` whose first row has `first_step`."""
    return f"part-{segment:03d}-{first_step:08d}.parquet"


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """Return (segment, first step) of a shard's file name, or None for any other file."""
    match = _SHARD.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


def parse_version(text: str) -> tuple[int, int]:
    """Split ``"1.0"`` into (major, minor); `ValueError` for anything else."""
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    if not match:
        raise ValueError(f"not a schema version: {text!r}")
    return int(match[1]), int(match[2])


def layout_to_markdown() -> str:
    """Write the files of a run directory as Markdown, as README.md shows them."""
    events = ", ".join(f"`{name}`" for name in EVENT_FIELDS)
    rows = (
        (MANIFEST, ", ".join(MANIFEST_FIELDS)),
        (CONFIG, "the resolved configuration; `lisa-train --config` repeats the run with it"),
        (PARAMETERS, PARAMETERS_TABLE.meaning),
        (f"{METRICS_DIR}/{shard_name(0, 1)}", METRICS_TABLE.meaning + "; never rewritten"),
        (f"{PROBES_DIR}/{shard_name(0, 0)}", PROBES_TABLE.meaning),
        (ABLATION, f"written by `lisa-ablate`: {ABLATION_TABLE.meaning}"),
        (SCALARS, SCALARS_TABLE.meaning),
        (EVENTS, f"{EVENTS_TABLE.meaning}: {events}"),
        (
            ADAPTER_START,
            "what the adapters started with, if that was not BA = 0 (PiSSA, DoRA, …)",
        ),
        (f"{CHECKPOINTS_DIR}/ {ADAPTER_DIR}/", "the layouts of transformers and PEFT, untouched"),
    )
    lines = ["| file | what it holds |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{name}` | {what} |" for name, what in rows)])
