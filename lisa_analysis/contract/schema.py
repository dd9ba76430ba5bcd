"""The contract between the two halves: files, columns, types, meanings, version (stdlib only).

Everything that a run directory holds is stated here once. The writer (`lisa_train.measure.disk`)
and the reader (`lisa_analysis.rundir`) import it, and the documentation and the report print from
it.

Steps count *completed* optimizer steps. A metrics row with ``step = s`` describes the s-th
optimizer step (s >= 1) and the weights after it; rows with ``step = 0`` are the census before
any training. A ``lisa_draw`` event with ``step = s`` chooses the layers for the optimizer steps
s+1 … s+K.
"""

import re
from typing import Literal

from lisa_analysis.contract.tables import Adds as Adds
from lisa_analysis.contract.tables import Column as Column
from lisa_analysis.contract.tables import ColumnType as ColumnType
from lisa_analysis.contract.tables import FactTable as FactTable
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
        ),
        Column(
            "grad_norm",
            "float32",
            True,
            "‖g_t‖ of the accumulated gradient of the optimizer step, before clipping",
            adds="squares",
            of_training=True,
        ),
        Column(
            "grad_norm_l1",
            "float32",
            True,
            "‖g_t‖₁ of the same gradient",
            adds="values",
            of_training=True,
        ),
        Column(
            "update_norm",
            "float32",
            True,
            "‖θ_{t+1} − θ_t‖ as realised in the stored precision",
            adds="squares",
            of_training=True,
        ),
        Column(
            "descent",
            "float32",
            True,
            "−⟨g_t, θ_{t+1} − θ_t⟩: the loss decrease that the step predicts, additive over "
            "tensors; g_t is the gradient before clipping",
            adds="values",
            signed=True,
            of_training=True,
        ),
        Column(
            "delta_norm",
            "float32",
            True,
            "‖W_t − W_0‖ since the run began; for LoRA ‖(α/r)(BA − B_0A_0)‖ by r×r Gram "
            "matrices, on the row of lora_B (DoRA: of the rescaled weight, in censuses); null "
            "where the adapter is no product BA",
            adds="squares",
        ),
        Column(
            "merged_norm",
            "float32",
            True,
            "LoRA only: ‖W + (α/r)BA‖ of the adapted weight (DoRA: rescaled), on the row of "
            "lora_B; measured in censuses (step 0, checkpoints, the end), since it takes all base "
            "weights; at step 0 it is the ‖W_0‖ of delta_norm",
            adds="squares",
        ),
        Column(
            "opt_steps",
            "int32",
            True,
            "the optimizer's own step count of the tensor: a reset is visible",
            adds="copies",
            of_training=True,
        ),
        Column(
            "grad_noise",
            "float32",
            True,
            "optional: variance of the gradient between the micro-batches of the step, those of "
            "all processes, tr Σ of one micro-batch gradient (unbiased)",
            adds="values",
            of_training=True,
        ),
        Column(
            "probe_grad_norm",
            "float32",
            True,
            "optional: ‖g_t‖ from a measuring pass with all layers, frozen ones included, mean "
            "over the processes; of several batches (probes) the root of the mean square; no "
            "update is made from it",
            adds="squares",
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

# Metadata `ablation` of the file: JSON with these entries.
ABLATION_FIELDS: dict[str, str] = {
    "model": "what was measured: the folder below the run directory, or words",
    "base": "the base model, as it was named",
    "dtype": "precision of weights and arithmetic",
    "device": "cpu, cuda, …",
    "data": "per data: name, examples measured, how many there are (available), tokens, digest of "
    "what was measured",
    "unmeasured": "tensors that the base does not have; they stay as trained in every mode",
    "passes": "passes over the examples that it took, as parts of whole passes of the model",
    "seconds": "time that it took",
}

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
            "training loss of the step, mean over the labels that count (none: null)",
        ),
        Column("learning_rate", "float64", True, "learning rate used by the step"),
        Column("grad_norm", "float64", True, "global gradient norm before clipping"),
        Column("clip_coef", "float64", True, "factor applied by clipping; 1 = not clipped"),
        Column("tokens", "int64", True, "tokens seen since the start of the run"),
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

EVENT_FIELDS: dict[str, dict[str, str]] = {
    "lisa_draw": {
        "layers": "indices of the layers active for the next interval",
        "inclusion_probabilities": "π of every layer for this draw",
        "scores": "scores that π was learned from, before the control; null for a layer not "
        "known, and while nothing is learned",
        "update_factors": "with lisa.correct_lr: factors on the updates of the layers drawn",
        "visits": "draws of every layer so far, this one included",
        "units": "with lisa.by half or module: indices of the parts of layers that are active, in "
        "run.json's lisa.unit_names; `layers` are those that any of them is in",
        "unit_probabilities": "then, in place of inclusion_probabilities: π of every part",
        "unit_scores": "then, in place of scores: those of every part",
        "unit_visits": "then, in place of visits: draws of every part so far",
        "groups": "groups (embed, head) that were drawn like layers",
        "trainable_share": "part of the model's parameters that train in the interval",
        "state_bytes": "bytes of optimizer state held after the draw: what left is freed or on the "
        "host, what came has none yet",
    },
    "evaluate": {
        "metrics": "held-out metrics by name; eval_loss is a mean over labels, absent without any"
    },
    "checkpoint": {"path": "folder below the run directory"},
    "probe": {
        "batches": "how many batches the probe took",
        "signal": "exact, or sketch where the sums of the gradients did not fit into memory",
    },
    "resume": {
        "segment": "number of the new segment",
        "checkpoint": "what it continued from",
        "processes": "how many processes train from here on",
        "changes": "what is not as it was before: name -> [before, now]",
        "missing": "what an exact continuation needs and the checkpoint lacked",
    },
    "warning": {
        "message": "what happened, in words",
        "traceback": "of a fault of lisa-toolkit's own; else absent",
        "rule": "id of the rule of `la.diagnose` that found it while training; else absent",
    },
}

TABLES: tuple[Table, ...] = (
    PARAMETERS_TABLE,
    METRICS_TABLE,
    PROBES_TABLE,
    ABLATION_TABLE,
    SCALARS_TABLE,
    EVENTS_TABLE,
)

MANIFEST_FIELDS: dict[str, str] = {
    "schema_version": "version of this contract",
    "run_id": "unique name of the run",
    "status": "running, finished, failed or interrupted",
    "created": "start of the run, ISO 8601, UTC",
    "updated": "last change of this file, ISO 8601, UTC",
    "segment": "number of the newest segment; a resume adds one",
    "segments": "one entry per segment: its first step, start, processes, batch, accumulation",
    "versions": "packages and Python",
    "hardware": "device, its name and memory, processor count, host; of the newest segment",
    "model": "name, architecture, parameter count, dtype",
    "task": "what the model is trained for, as lisa-train names it",
    "method": "full, lora, lisa, peft, select, probe, or what an outside trainer was doing",
    "seeds": "training, data and layer-sampling seed (seed, data_seed, lisa_seed)",
    "command": "the command line that started the run",
    "layers": "one entry per layer: index, name, stack",
    "recording": "what is measured and every how many steps",
    "probe": "batches, and how their signal was taken, when the method is probe",
    "lisa": "the LISA configuration, when the method is lisa",
    "lora": "rank, alpha, targets and initialisation, when the method is lora",
    "peft": "PEFT's configuration, with its peft_type, when the method is peft",
    "select": "what was asked for and what it came to in this model, when the method is select",
    "dataset": "name, columns read and not read, number of examples trained on, held out, dropped",
    "result": "figures of a finished run: steps, tokens, seconds, losses, peak memory; "
    "last_held_out_scores by name, where the task has scores; with LISA "
    "layer_visits (draws of every layer) and layers_never_drawn, or with lisa.by unit_visits and "
    "units_never_drawn",
    "error": "one sentence, when the status is failed",
}

# What a held-out part is judged by beside its loss, as `eval_<name>` in events and by this name in
# `result.last_held_out_scores` of run.json; which of them there are depends on the task.
HELD_OUT_SCORES: dict[str, str] = {
    "accuracy": "share of the labels that are predicted",
    "macro_f1": "mean over the classes of F1 = 2·tp / (2·tp + fp + fn)",
    "token_accuracy": "share of the tokens that are predicted from those before them",
    "word_error_rate": "edits that turn what was heard into what was said, per word said",
}

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
