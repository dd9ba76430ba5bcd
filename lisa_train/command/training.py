"""`train(config)`: one training run, from a `TrainConfig` to a finished run directory."""

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract import schema
from lisa_analysis.contract.errors import ConfigError, RunDirectoryError, suggest
from lisa_train.command.config import TrainConfig
from lisa_train.command.output import (
    check_unfinished,
    expand_home,
    find_run_dir,
    is_storage_error,
    keep_inputs,
    last_checkpoint,
    no_trace_of_a_refused_run,
    to_yaml,
)
from lisa_train.command.starting import refusals
from lisa_train.command.tasks.data import TrainingData, check_dataset_name, load_data
from lisa_train.command.tasks.text import load_model
from lisa_train.methods.lora import lora_config
from lisa_train.model.source import check_model_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import SFTConfig, SFTTrainer

FINAL_MODEL = f"{schema.CHECKPOINTS_DIR}/final"


def train(config: TrainConfig, *, resume: bool = False) -> Path:
    """Train as configured and record the run.

    Parameters
    ----------
    config
        The whole configuration; it is written, resolved, to `config.yaml` of the run directory.
    resume
        Continue the run in `config.output_dir` from its newest checkpoint.

    Returns
    -------
    pathlib.Path
        The run directory.

    Raises
    ------
    ConfigError
        For settings, data or a model that cannot be used; nothing has been written then.
    RunDirectoryError
        When `output_dir` already holds a run, or cannot be written.
    """
    config = expand_home(config)
    _check_inputs(config)
    run_dir = find_run_dir(config, resume=resume)
    checkpoint = last_checkpoint(run_dir) if resume else None
    with no_trace_of_a_refused_run(run_dir):
        trainer, attached = _prepare(config, run_dir, resume=resume)
        if checkpoint is not None:
            check_unfinished(checkpoint)
    from lisa_train.trainer.progress import FirstStep

    first = FirstStep()
    trainer.add_callback(first)

    def passes(error: Exception) -> bool:
        return first.begun or (isinstance(error, OSError) and is_storage_error(error))

    try:
        with attached:
            with refusals("Training cannot begin: {}.".format, passes=passes):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if config.save_final_model:
                folder = schema.ADAPTER_DIR if config.method == "lora" else FINAL_MODEL
                trainer.save_model(str(run_dir / folder))
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise RunDirectoryError(
            f"{run_dir} cannot be written any more ({error}); what was recorded is kept: free "
            "some room and resume the run, or start it elsewhere."
        ) from error
    return run_dir


def _prepare(config: TrainConfig, run_dir: Path, *, resume: bool) -> "tuple[SFTTrainer, Any]":
    """Build the trainer with LISA and the recorder attached; refuse what cannot be trained."""
    arguments = _trainer_arguments(config, run_dir)
    peft_config = lora_config(config.lora) if config.method == "lora" else None
    model, tokenizer = load_model(config)
    if config.method == "lisa":
        _check_lisa(model, config)
    from lisa_train.command.tasks.prepared import check_prepared
    from lisa_train.trainer import attach

    data = load_data(config)
    manifest = _manifest(config, data)
    trainer = _build_trainer(arguments, model, tokenizer, data, peft_config, config)
    found, said = check_prepared(trainer, config)
    _complete(manifest["dataset"], found)
    _tell(trainer, [*_about(manifest["dataset"]), *said])
    kept = keep_inputs(config, run_dir, resume=resume)
    attached = attach(
        trainer,
        lisa=config.lisa if config.method == "lisa" else None,
        record=dataclasses.replace(config.record, run_dir=str(run_dir)),
        step_in_backward=config.step_in_backward,
        eight_bit_states=config.eight_bit_states,
        manifest=manifest,
        config_yaml=to_yaml(kept),
        resume=resume,
        resume_incomplete=config.resume_incomplete,
    )
    _add_progress(trainer, config, attached)
    return trainer, attached


def _check_inputs(config: TrainConfig) -> None:
    """Refuse what can be seen to be wrong before anything heavy is loaded."""
    if config.record.run_dir is not None:
        raise ConfigError("record.run_dir is for attach(); lisa-train writes to output_dir.")
    check_model_name(config.model_name_or_path)
    check_dataset_name(config.dataset_name)
    if isinstance(config.lisa.probabilities, str):
        from lisa_analysis.plans.sampling import SamplingProbabilities

        SamplingProbabilities.load(config.lisa.probabilities)


def _check_lisa(model: "PreTrainedModel", config: TrainConfig) -> None:
    """Refuse numbers and probabilities that do not fit the model before anything is written."""
    from lisa_train.methods.lisa.checks import given_probabilities
    from lisa_train.methods.lisa.samplers import make_sampler, resolve
    from lisa_train.model.layer_map import find_layers

    layer_map = find_layers(model, config.lisa.layers)
    k = config.lisa.activated_layers
    pi = resolve(given_probabilities(config.lisa, layer_map), len(layer_map), k)
    make_sampler(config.lisa.sampling, pi, k, config.seed)


def _trainer_arguments(config: TrainConfig, run_dir: Path) -> "SFTConfig":
    """Translate the configuration to TRL's; extra `trainer_args` are checked by name."""
    import torch
    from trl import SFTConfig

    known = {f.name for f in dataclasses.fields(SFTConfig)}
    for name in config.trainer_args:
        if name not in known:
            raise ConfigError(
                f"trainer_args.{name} is not a field of TRL's SFTConfig.{suggest(name, known)}"
            )
    same_name = {
        name: getattr(config, name)
        for name in known & set(TrainConfig.__dataclass_fields__)
        if name not in ("output_dir", "trainer_args", "report_to", "trust_remote_code")
    }
    if "activation_checkpointing" in known:  # the name that transformers 6 keeps
        same_name["activation_checkpointing"] = same_name.pop("gradient_checkpointing")
    has_accelerator = torch.cuda.is_available() or torch.backends.mps.is_available()
    settings = {
        **same_name,
        # Absolute: transformers would read a leading `~` as a user's home.
        "output_dir": os.path.abspath(run_dir / schema.CHECKPOINTS_DIR),
        "report_to": list(config.report_to) or "none",
        "eval_strategy": "steps" if config.eval_steps else "no",
        "save_strategy": "steps" if config.save_steps else "no",
        "save_steps": config.save_steps or 500,
        "use_cpu": not has_accelerator,
        "disable_tqdm": True,  # the run shows one bar of its own
        "dataloader_pin_memory": has_accelerator,
        **config.trainer_args,
    }
    if config.dataset_test_split is None and not config.eval_size:
        settings["eval_on_start"] = False
    with refusals("The trainer refuses these settings: {}".format):
        return SFTConfig(**settings)


def _build_trainer(
    arguments: "SFTConfig",
    model: Any,
    tokenizer: Any,
    data: TrainingData,
    peft_config: Any,
    config: TrainConfig,
) -> "SFTTrainer":
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTTrainer

    from lisa_train.command.tasks.prepared import check_tokenizer, refused_row
    from lisa_train.trainer.losses import evaluate_per_label

    if data.held_out is None:
        arguments.eval_on_start = False

    def say(reason: str) -> str:
        row = refused_row(data, tokenizer, config)
        return row or f"The trainer refuses this combination: {reason}."

    check_tokenizer(tokenizer, data, config)
    with refusals(say):
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    trainer.remove_callback(PrinterCallback)
    evaluate_per_label(trainer)
    return trainer


def _complete(dataset: dict[str, Any], found: dict[str, Any]) -> None:
    """Count in run.json the examples that train: some are dropped when rows are cut to length."""
    for name in ("train_examples", "held_out_examples"):
        if name in found:
            key = "dropped_examples" if name.startswith("train") else "dropped_held_out_examples"
            dataset[key] = dataset.get(key, 0) + dataset[name] - found[name]
    dataset.update(found)


def _about(dataset: dict[str, Any]) -> list[str]:
    """Say what of the data is not used."""
    said = []
    if unused := dataset["unused_columns"]:
        said.append(
            f"nothing reads the columns {', '.join(map(repr, unused))} of {dataset['name']}"
        )
    for key, which in (
        ("dropped_examples", "training"), ("dropped_held_out_examples", "held-out")
    ):  # fmt: skip
        if count := dataset.get(key):
            said.append(
                f"{count} {which} examples of {dataset['name']} are dropped: no token of theirs "
                "is left to learn from (max_length, or no answer at the end)"
            )
    return said


def _tell(trainer: "SFTTrainer", said: list[str]) -> None:
    if trainer.is_world_process_zero():
        for sentence in said:
            print(f"note: {sentence}.", file=sys.stderr, flush=True)


def _add_progress(trainer: "SFTTrainer", config: TrainConfig, attached: Any) -> None:
    from lisa_train.trainer.progress import EvaluateAtEnd, ProgressBar, ProgressCell, ProgressLines

    if trainer.eval_dataset is not None:
        trainer.add_callback(EvaluateAtEnd())
    if config.progress_bar is not False:
        bar = ProgressBar if config.progress_bar or sys.stderr.isatty() else ProgressLines
        kind = ProgressCell if "ipykernel" in sys.modules else bar
        trainer.add_callback(kind(attached.latest_scalars, attached.active_layers))


def _manifest(config: TrainConfig, data: TrainingData) -> dict[str, Any]:
    """Collect the entries of run.json that only this module knows."""
    entries: dict[str, Any] = {
        "model": {"name": config.model_name_or_path},
        "dataset": data.describe(config.dataset_name),
    }
    if (command := _command()) is not None:
        entries["command"] = command
    return entries


def _command() -> str | None:
    """Command line of this process; None in a notebook or script, whose arguments are not ours."""
    program = Path(sys.argv[0])
    if program.stem == "lisa-train" or program.parent.name == "lisa_train":
        return shlex.join(["lisa-train", *sys.argv[1:]])
    return None


def summary(run_dir: Path) -> str:
    """Say in a few lines what a run did and where it is."""
    import lisa_analysis as la

    run = la.load(run_dir)
    result = run.manifest.get("result") or {}
    lines = []
    if result:
        first, last = result.get("first_held_out_loss"), result.get("last_held_out_loss")
        loss = f", held-out loss {first:.4f} → {last:.4f}" if None not in (first, last) else ""
        lines.append(f"{run.method}: {result.get('steps')} steps{loss}{_coverage(result)}.")
    lines.append(f"Run directory: {run_dir}")
    lines.append(f"Next: lisa-analyze {shlex.quote(str(run_dir))}")
    return "\n".join(lines)


def _coverage(result: dict[str, Any]) -> str:
    """Layers that no draw of a LISA run took, in words."""
    missed, visits = result.get("layers_never_drawn"), result.get("layer_visits")
    if not missed or not visits:
        return ""
    return f", {len(missed)} of {len(visits)} layers never drawn ({', '.join(map(str, missed))})"
