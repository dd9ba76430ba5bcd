"""`lisa-train --estimate`: a configuration's memory and that of the usual methods, as a table."""

from dataclasses import fields

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.config import TrainConfig
from lisa_train.estimate.cards import Card
from lisa_train.estimate.setting import Autocast, Setting
from lisa_train.methods import sections


def setting_of(config: TrainConfig, task: str = "causal-lm") -> Setting:
    """Translate a training configuration; causal-lm's loss is that of `SFTTrainer`, in chunks.

    Raises
    ------
    ConfigError
        When the configuration leaves the length of a sequence open.
    """
    if config.max_length is None:
        raise ConfigError("max_length is null; an estimate needs the longest sequence in tokens.")
    autocast: Autocast | None = "bfloat16" if config.bf16 else None
    return Setting(
        method=config.method,
        batch_size=config.per_device_train_batch_size,
        sequence_length=config.max_length,
        dtype=config.dtype,
        autocast="float16" if config.fp16 else autocast,
        attn_implementation="eager" if config.attn_implementation == "eager" else "sdpa",
        optim=config.optim,
        eight_bit_states=config.eight_bit_states,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        chunked_loss=task == "causal-lm",
        step_in_backward=config.step_in_backward,
        lisa=config.lisa,
        lora=config.lora,
        peft=config.peft,
        select=config.select,
        **{f.name: getattr(config, f.name) for f in fields(sections())},
    )


def estimate_table(config: TrainConfig, cards: tuple[Card, ...]) -> str:
    """Return the table for `config`; reads config.json, no weights and no data."""
    setting_of(config)  # what is wrong with the settings is said before anything is loaded

    from lisa_train.command.tasks.task import choose_task, head_class
    from lisa_train.estimate.table import method_table
    from lisa_train.model.source import read_config

    source = read_config(
        config.model_name_or_path,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    task = choose_task(config)
    setting = setting_of(config, task.name)
    if task.name != "causal-lm":
        source.architectures = [head_class(task, source, config)[1]]
    return str(method_table(source, setting, cards))
