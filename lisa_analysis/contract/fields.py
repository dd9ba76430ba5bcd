"""The entries of a run directory's JSON: run.json, events, the ablation's metadata."""

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
    "last_held_out_scores by name, where the task has scores; best_step, best_held_out_loss and "
    "best_held_out_scores, where the weights of that step are kept and not the last; with LISA "
    "layer_visits (draws of every layer) and layers_never_drawn, or with lisa.by unit_visits and "
    "units_never_drawn",
    "error": "one sentence, when the status is failed",
}

EVENT_FIELDS: dict[str, dict[str, str]] = {
    "lisa_draw": {
        "layers": "indices of the layers active for the next period",
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
        "trainable_share": "part of the model's parameters that train in the period",
        "state_bytes": "bytes of optimizer state held after the draw: what left is freed or on the "
        "host, what came has none yet",
    },
    "evaluate": {
        "metrics": "held-out metrics by name; eval_loss is a mean over labels, absent where none "
        "counts; of batches without labels, as of preferences, the trainer's own",
        "after_training": "true of one that was made after the end: of other data perhaps, or of "
        "the best weights, with the trainer's own loss; no figure of the run counts it",
    },
    "checkpoint": {"path": "folder below the run directory"},
    "probe": {
        "batches": "how many batches the probe took",
        "signal": "exact, or sketch where the sums of the gradients did not fit into memory",
        "draw": "number of the draw of batches: probes of one number are of the same batches",
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

# What a held-out part is judged by beside its loss, as `eval_<name>` in events and by this name in
# `result.last_held_out_scores` of run.json; which of them there are depends on the task.
HELD_OUT_SCORES: dict[str, str] = {
    "accuracy": "share of the labels that are predicted",
    "macro_f1": "mean over the classes of F1 = 2·tp / (2·tp + fp + fn)",
    "token_accuracy": "share of the tokens that are predicted from those before them",
    "word_error_rate": "edits that turn what was heard into what was said, per word said",
}
