"""`train(config)`: one run, from a `TrainConfig` to a finished run directory."""

import dataclasses
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract import schema
from lisa_analysis.contract.errors import ConfigError, RunDirectoryError, suggest
from lisa_train.command.config import TrainConfig
from lisa_train.command.model_card import write_card
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
from lisa_train.command.tasks.data import check_dataset_name
from lisa_train.command.tasks.text import about, complete
from lisa_train.command.together import LostProcessError, agreed, all_are_done, launched
from lisa_train.command.without_effect import refuse_without_effect, said_of_optim_args
from lisa_train.methods import METHODS
from lisa_train.methods.adapter_names import check_adapter_names
from lisa_train.model.source import check_model_name

if TYPE_CHECKING:
    from transformers import Trainer

    from lisa_train.command.tasks.task import Loaded
    from lisa_train.trainer import Attachment

FINAL_MODEL = f"{schema.CHECKPOINTS_DIR}/final"


def train(config: TrainConfig, *, resume: bool = False, quiet: bool = False) -> Path:
    """Train as configured and record the run.

    Parameters
    ----------
    config
        The whole configuration; it is written, resolved, to `config.yaml` of the run directory.
    resume
        Continue the run in `config.output_dir` from its newest checkpoint.
    quiet
        Show no notes and no progress, whatever `config.progress_bar` says.

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
    method = METHODS[config.method]
    _check_inputs(config)
    if resume:
        method.check_resume(config)
    else:
        refuse_without_effect(config)
    if launched() > 1:
        from lisa_train.command.tasks.task import choose_task

        # The trainer's arguments make the processes find each other: what follows is agreed on.
        arguments = choose_task(config).arguments()
        trainer_arguments(config, Path(config.output_dir or "runs"), arguments)
    run_dir, checkpoint = agreed(lambda: _place(config, resume=resume))
    try:
        with no_trace_of_a_refused_run(run_dir):
            prepared = _prepare(config, run_dir, checkpoint, quiet=quiet)
            if checkpoint is not None:
                check_unfinished(checkpoint)
            _run(prepared)
            all_are_done()
    except Exception as error:
        from lisa_train.model.parallel import lost_a_process

        if not lost_a_process(error):
            raise
        raise LostProcessError(
            f"another process ended, and this one cannot go on alone ({error}); what was "
            f"recorded in {run_dir} is kept."
        ) from error
    return run_dir


def _place(config: TrainConfig, *, resume: bool) -> tuple[Path, Path | None]:
    """Return the run directory, and the checkpoint that a resumed run goes on from."""
    run_dir = find_run_dir(config, resume=resume)
    checkpoint = last_checkpoint(run_dir) if resume else None
    return run_dir, checkpoint


def _run(prepared: "PreparedRun") -> None:
    """Do what the method does; say in a sentence where the disk refuses what it writes."""
    try:
        METHODS[prepared.config.method].run(prepared)
    except Exception as error:
        if not is_storage_error(error):
            raise
        raise RunDirectoryError(
            f"{prepared.run_dir} cannot be written any more ({error}); what was recorded is kept: "
            "free some room and resume the run, or start it elsewhere."
        ) from error


@dataclass(frozen=True)
class PreparedRun:
    """A run that can begin: nothing has been written but what repeats it.

    Attributes
    ----------
    config
        The whole configuration.
    trainer
        The trainer, with the model and the rows as tokens.
    run_dir
        The run directory; it exists.
    manifest, config_yaml
        Entries of run.json that only the command knows, and the text of config.yaml.
    checkpoint
        Where a resumed run goes on; None for a new one.
    quiet
        Whether no progress is shown.
    """

    config: TrainConfig
    trainer: "Trainer"
    run_dir: Path
    manifest: dict[str, Any]
    config_yaml: str
    checkpoint: Path | None = None
    quiet: bool = False

    def train(self) -> None:
        """Train with the recorder and what the method attaches, and save the result."""
        from lisa_train.trainer.progress import FirstStep

        config, trainer = self.config, self.trainer
        attached = self._attach()
        first = FirstStep()
        trainer.add_callback(first)

        def passes(error: Exception) -> bool:
            return first.begun or (isinstance(error, OSError) and is_storage_error(error))

        resumed = str(self.checkpoint) if self.checkpoint else None
        with attached:
            with refusals("Training cannot begin: {}.".format, passes=passes):
                trainer.train(resume_from_checkpoint=resumed)
            if config.save_final_model:
                adapters = getattr(trainer.model, "peft_config", None)
                folder = self.run_dir / (schema.ADAPTER_DIR if adapters else FINAL_MODEL)
                recorded = (self.run_dir / schema.MANIFEST).exists()
                if recorded:  # what Trainer writes beside the weights that it pushes to the hub
                    pushed = Path(trainer.args.output_dir)
                    trainer.create_model_card = lambda *_, **__: write_card(
                        self.run_dir, pushed, adapter=bool(adapters)
                    )
                plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
                if plugin is not None:  # which would leave the pieces where the checkpoints are
                    plugin.set_state_dict_type("FULL_STATE_DICT")
                partial = folder.with_name(f"{folder.name}.tmp")
                trainer.save_model(str(partial))
                if trainer.is_world_process_zero():
                    if recorded:
                        write_card(self.run_dir, partial, adapter=bool(adapters))
                    shutil.rmtree(folder, ignore_errors=True)  # of training that went on
                    partial.replace(folder)

    def _attach(self) -> "Attachment":
        from lisa_train.trainer import attach
        from lisa_train.trainer.optimizer_callbacks import AllocationCallback

        config = self.config
        if AllocationCallback.is_needed(self.trainer.model):
            self.trainer.add_callback(AllocationCallback())
        attached = attach(
            self.trainer,
            record=dataclasses.replace(config.record, run_dir=str(self.run_dir)),
            step_in_backward=config.step_in_backward,
            eight_bit_states=config.eight_bit_states,
            lr_multipliers=config.lr_multipliers,
            manifest=self.manifest,
            config_yaml=self.config_yaml,
            resume=self.checkpoint is not None,
            resume_incomplete=config.resume_incomplete,
            **METHODS[config.method].attachments(config),
        )
        _add_progress(self.trainer, config, attached, quiet=self.quiet)
        return attached


def _prepare(
    config: TrainConfig, run_dir: Path, checkpoint: Path | None, *, quiet: bool = False
) -> PreparedRun:
    """Load model and data and build the trainer; refuse what cannot be trained."""
    from lisa_train.command.tasks.task import choose_task

    method, task = METHODS[config.method], choose_task(config)
    arguments = trainer_arguments(config, run_dir, task.arguments())
    peft_config = method.peft_config(config, task.peft_type)
    loaded = task.load(config)
    method.check_model(loaded.model, config)
    method.prepare(loaded.model, config)
    manifest = _manifest(config, task.name, loaded)
    remarks = method.remarks(loaded.model, config)  # before adapters are put around the model
    trainer = task.build_trainer(loaded, arguments, peft_config, config)
    if checkpoint is None:  # a run that was recorded so can be resumed
        check_adapter_names("lora", config.lora, trainer.model)
        check_adapter_names("peft", config.peft, trainer.model)
    found, said = task.survey(trainer, loaded, config)
    complete(manifest["dataset"], found)
    notes = [*about(manifest["dataset"]), *loaded.data.said, *said, *remarks]
    notes += said_of_optim_args(trainer.args) if method.makes_steps else []
    _tell(trainer, [] if quiet else notes)
    kept = agreed(lambda: to_yaml(keep_inputs(config, run_dir, resume=checkpoint is not None)))
    return PreparedRun(config, trainer, run_dir, manifest, kept, checkpoint, quiet)


def _check_inputs(config: TrainConfig) -> None:
    """Refuse what can be seen to be wrong before anything heavy is loaded."""
    if config.record.run_dir is not None:
        raise ConfigError("record.run_dir is for attach(); lisa-train writes to output_dir.")
    check_model_name(config.model_name_or_path)
    check_dataset_name(config.dataset_name)
    if isinstance(config.lisa.probabilities, str):
        from lisa_analysis.plans.sampling import SamplingProbabilities

        SamplingProbabilities.load(config.lisa.probabilities)
    if config.lr_multipliers is not None:
        from lisa_analysis.contract.multipliers_file import read_multipliers

        read_multipliers(config.lr_multipliers)


def trainer_arguments(config: TrainConfig, run_dir: Path, arguments: Any = None) -> Any:
    """Translate the configuration to a trainer's; extra `trainer_args` are checked by name.

    `arguments` is their class, TRL's SFTConfig by default.
    """
    import torch

    if arguments is None:
        from trl import SFTConfig

        arguments = SFTConfig
    known = {f.name for f in dataclasses.fields(arguments)}
    for name in config.trainer_args:
        if name not in known:
            whose = "TRL" if arguments.__module__.startswith("trl.") else "transformers"
            raise ConfigError(
                f"trainer_args.{name} is not a field of {whose}'s {arguments.__name__}."
                + suggest(name, known)
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
        return arguments(**settings)


def _tell(trainer: "Trainer", said: list[str]) -> None:
    if trainer.is_world_process_zero():
        for sentence in said:
            print(f"note: {sentence}.", file=sys.stderr, flush=True)


def _add_progress(
    trainer: "Trainer", config: TrainConfig, attached: Any, *, quiet: bool = False
) -> None:
    from lisa_train.trainer.progress import EvaluateAtEnd, ProgressBar, ProgressCell, ProgressLines

    if trainer.eval_dataset is not None:
        trainer.add_callback(EvaluateAtEnd())
    if config.progress_bar is not False and not quiet:
        bar = ProgressBar if config.progress_bar or sys.stderr.isatty() else ProgressLines
        kind = ProgressCell if "ipykernel" in sys.modules else bar
        trainer.add_callback(kind(attached.latest_scalars, attached.active_layers))


def _manifest(config: TrainConfig, task: str, loaded: "Loaded") -> dict[str, Any]:
    """Collect the entries of run.json that only this module knows."""
    entries: dict[str, Any] = {
        "task": task,
        **METHODS[config.method].run_entries(config, loaded.model),
        "model": {"name": config.model_name_or_path},
        "dataset": loaded.data.describe(config.dataset_name),
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
        method = METHODS.get(run.method, METHODS["full"])
        lines.append(f"{run.method}: {method.outcome(result)}.")
    lines.append(f"Run directory: {run_dir}")
    lines.append(f"Next: lisa-analyze {shlex.quote(str(run_dir))}")
    return "\n".join(lines)
