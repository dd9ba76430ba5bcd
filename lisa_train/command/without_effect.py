"""Settings of a run that begins which beside its others would have no effect: refused by name.

A run that was recorded with such settings can still be resumed and ablated.
"""

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.config import TrainConfig
from lisa_train.command.together import launched
from lisa_train.methods import METHODS

# Schedules of transformers that leave `warmup_steps` aside.
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
# Optimizers that warm up by themselves, whatever the schedule.
_WARM_UP_THEMSELVES = "schedule_free"


def refuse_without_effect(config: TrainConfig) -> None:
    """Raise `ConfigError` for a setting that would be ignored; a probe says what it ignores."""
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
