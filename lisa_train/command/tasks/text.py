"""`task: causal-lm`: language models on text, under TRL's SFTTrainer."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.config import TrainConfig
from lisa_train.command.starting import refusals
from lisa_train.command.tasks.data import TrainingData, load_data
from lisa_train.command.tasks.task import Loaded, Task, check_columns
from lisa_train.methods import METHODS
from lisa_train.model.source import check_model_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTConfig, SFTTrainer


class CausalLM(Task):
    """The next token."""

    name = "causal-lm"
    peft_type = "CAUSAL_LM"
    mappings: ClassVar[Mapping[str, str]] = {
        "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    }
    reads: ClassVar[Mapping[str, str]] = {
        "text": "plain text",
        "prompt": "what is given",
        "completion": "what is to follow",
        "instruction": "what is asked for",
        "input": "what it is about",
        "output": "the answer",
        "messages": "the turns of a conversation",
        "tools": "tools that the template takes",
        "chat_template_kwargs": "what else the template takes",
        "input_ids": "token ids",
        "labels": "labels of token ids",
    }

    def check(self, config: TrainConfig) -> None:
        """Refuse columns that nothing reads."""
        check_columns(config.columns, self)

    def arguments(self) -> "type[SFTConfig]":
        """Return TRL's arguments."""
        from trl import SFTConfig

        return SFTConfig

    def load(self, config: TrainConfig) -> Loaded:
        """Load model, tokenizer and data."""
        model, tokenizer = load_model(config)
        chat = bool(tokenizer.chat_template or config.trainer_args.get("chat_template_path"))
        return Loaded(model, tokenizer, load_data(config, chat=chat))

    def build_trainer(
        self, loaded: Loaded, arguments: Any, peft_config: Any, config: TrainConfig
    ) -> "SFTTrainer":
        """Build TRL's trainer."""
        return build_trainer(
            arguments, loaded.model, loaded.processor, loaded.data, peft_config, config
        )

    def survey(
        self, trainer: Any, loaded: Loaded, config: TrainConfig
    ) -> tuple[dict[str, Any], list[str]]:
        """Check the rows against the model and the batches."""
        from lisa_train.command.tasks.prepared import check_prepared

        return check_prepared(trainer, config)


def load_model(config: TrainConfig) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load model and tokenizer of a configuration.

    Raises
    ------
    ConfigError
        When there is no such model, it cannot be read, or it has no tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_model_name(config.model_name_or_path)
    source = {
        "revision": config.model_revision,
        "trust_remote_code": config.trust_remote_code,
    }
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    what = "model"

    def say(reason: str) -> str:
        return (
            f"The {what} of model_name_or_path {config.model_name_or_path!r} cannot be loaded "
            f"({reason[:200]}); give a folder written by save_pretrained, or a hub id that this "
            "machine can reach."
        )

    with refusals(say):
        model = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            **source,
        )
        what = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, **source)
    reason = METHODS[config.method].refuses_quantized
    if getattr(model, "hf_quantizer", None) is not None and reason is not None:
        raise ConfigError(
            f"{config.model_name_or_path} is quantized and method is {config.method}: {reason}."
        )
    return model, tokenizer


def build_trainer(
    arguments: "SFTConfig",
    model: Any,
    tokenizer: Any,
    data: TrainingData,
    peft_config: Any,
    config: TrainConfig,
) -> "SFTTrainer":
    """Build TRL's trainer; it makes the rows into tokens, and complaints of it name the row.

    Raises
    ------
    ConfigError
        When the tokenizer lacks what the data need, or the trainer refuses.
    """
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTTrainer

    from lisa_train.command.tasks.prepared import check_tokenizer, refused_row
    from lisa_train.trainer.losses import evaluate_per_label, take_means

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
    take_means(trainer)
    return trainer


def complete(dataset: dict[str, Any], found: dict[str, Any]) -> None:
    """Count in run.json the examples that train: some are dropped when rows are cut to length."""
    for name in ("train_examples", "held_out_examples"):
        if name in found:
            key = "dropped_examples" if name.startswith("train") else "dropped_held_out_examples"
            dataset[key] = dataset.get(key, 0) + dataset[name] - found[name]
    dataset.update(found)


def about(dataset: dict[str, Any]) -> list[str]:
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
