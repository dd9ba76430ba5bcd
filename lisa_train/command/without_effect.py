"""Settings of a run that begins which beside its others would have no effect: refused by name.

A run that was recorded with such settings can still be resumed and ablated.
"""

import copy
from pathlib import Path
from typing import Any

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.config import TrainConfig
from lisa_train.command.together import launched
from lisa_train.methods import METHODS

# Schedules of transformers that leave `warmup_steps` aside.
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
# Optimizers that warm up by themselves, whatever the schedule.
_WARM_UP_THEMSELVES = "schedule_free"
# Fields of TrainingArguments that only other scripts read -> what to do instead.
_OF_OTHER_SCRIPTS = {
    "resume_from_checkpoint": "continue a run with --resume",
    "model_init_kwargs": "dtype, attn_implementation and model_revision are settings of their own",
    "do_train": "remove it",
    "do_eval": "evaluations follow eval_steps, eval_size and dataset_test_split",
    "do_predict": "remove it",
}


def refuse_without_effect(config: TrainConfig) -> None:
    """Raise `ConfigError` for a setting that would be ignored; a probe says what it ignores."""
    _refuse_of_inputs(config)
    if not METHODS[config.method].makes_steps:
        return
    schedule = config.lr_scheduler_type
    warms_up = schedule not in _WITHOUT_WARMUP or config.optim.startswith(_WARM_UP_THEMSELVES)
    if config.warmup_steps and not warms_up:
        raise ConfigError(
            f"warmup_steps is {config.warmup_steps:g} but lr_scheduler_type is {schedule}, which "
            "does not warm up; set it to one that does (constant_with_warmup, linear, cosine), or "
            "warmup_steps to 0 (recipes set it)."
        )
    if config.save_total_limit is not None and config.save_steps is None:
        raise ConfigError(
            f"save_total_limit is {config.save_total_limit} but save_steps is null: there are no "
            "checkpoints to keep; set save_steps, or remove save_total_limit."
        )
    config.record.check_micro_batches(
        gradient_accumulation_steps=config.gradient_accumulation_steps, processes=launched()
    )
    if config.record.report_layers and not config.report_to:
        raise ConfigError(
            "record.report_layers is true but report_to names no tracker to show the layers; set "
            "report_to (tensorboard), or remove record.report_layers."
        )


def _refuse_of_inputs(config: TrainConfig) -> None:
    """Refuse what says something of a hub id where a folder or file is read, and the like."""
    if config.model_revision is not None and Path(config.model_name_or_path).is_dir():
        raise ConfigError(
            f"model_revision is {config.model_revision} but model_name_or_path "
            f"{config.model_name_or_path} is a folder, which has no revisions; remove it."
        )
    if config.dataset_config is not None and Path(config.dataset_name).is_file():
        raise ConfigError(
            f"dataset_config is {config.dataset_config} but dataset_name {config.dataset_name} is "
            "a file, which has no configurations; remove it."
        )
    for name, advice in _OF_OTHER_SCRIPTS.items():
        if config.trainer_args.get(name) is not None:
            raise ConfigError(f"trainer_args.{name} has no effect here: {advice}.")


def said_of_optim_args(arguments: Any) -> list[str]:
    """Say which of `optim_args` the optimizer does not read; transformers passes over them."""
    from transformers import Trainer

    given = [pair for pair in str(arguments.optim_args or "").replace(" ", "").split(",") if pair]

    def settings(pairs: list[str]) -> Any:
        changed = copy.copy(arguments)
        changed.optim_args = ",".join(pairs) or None
        return Trainer.get_optimizer_cls_and_kwargs(changed)

    try:
        whole = settings(given)
        unread = [p for p in given if settings([q for q in given if q != p]) == whole]
    except Exception:
        return []  # an optimizer that is not installed, a pair without `=`: said when it is made
    optim = getattr(arguments.optim, "value", arguments.optim)
    return [f"optim_args {pair} changes nothing of optim {optim}" for pair in unread]
