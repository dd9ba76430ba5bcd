"""Models with a head of their own under transformers' Trainer: what every such task shares."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.config import TrainConfig
from lisa_train.command.starting import refusals
from lisa_train.command.tasks.data import TrainingData, read_splits
from lisa_train.command.tasks.scores import with_meaning
from lisa_train.command.tasks.splits import Part, limited, place, said_of, split_parts
from lisa_train.command.tasks.task import (
    Loaded,
    Task,
    check_columns,
    head_class,
    refuse_settings_of_text,
)
from lisa_train.methods import METHODS
from lisa_train.methods.adapter_heads import train_heads_whole
from lisa_train.model.source import read_config

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, Trainer, TrainingArguments


class TaskWithHead(Task):
    """A task whose model transformers gives a head for, trained by transformers' Trainer.

    A subclass says which columns its rows need, makes inputs of them, and judges predictions.

    Attributes
    ----------
    needed
        Columns that every row must have.
    """

    needed: ClassVar[tuple[str, ...]]

    def check(self, config: TrainConfig) -> None:
        """Refuse settings of causal language models, and columns that nothing reads."""
        refuse_settings_of_text(config, self)
        check_columns(config.columns, self)

    def arguments(self) -> "type[TrainingArguments]":
        """Return transformers' arguments."""
        from transformers import TrainingArguments

        return TrainingArguments

    # ------------------------------------------------------------------ data

    def splits(self, config: TrainConfig) -> Any:
        """Read the data, with the columns named as `columns` says."""
        return read_splits(config)

    def arrange(self, dataset: "Dataset", config: TrainConfig) -> "Dataset":
        """Return the rows of a split in the columns that the task needs."""
        return dataset

    def parts(self, config: TrainConfig) -> tuple[Part, Part | None]:
        """Read the data, part them, and check that every part has its columns and a row."""
        splits = self.splits(config)
        for name in splits:
            splits[name] = self.arrange(splits[name], config)
        whole = splits[config.dataset_train_split]
        missing = [column for column in self.needed if column not in whole.column_names]
        if missing:
            named = [w for c in missing for w in _likely(c, whole.column_names)]
            hint = f", as columns: {{{missing[0]}: {named[0]}}}" if named else ""
            raise ConfigError(
                f"{config.dataset_name} has the columns "
                f"{', '.join(map(repr, whole.column_names))}, and task {self.name} reads "
                f"{' and '.join(map(repr, self.needed))}; say with columns which is which{hint}."
            )
        train, held_out = split_parts(splits, config)
        train = limited(train, config.max_train_samples)
        held_out = None if held_out is None else limited(held_out, config.max_eval_samples)
        for part in (train, held_out):
            if part is None:
                continue
            if not len(part.dataset):
                raise ConfigError(
                    f"{config.dataset_name} has no example in split {part.split!r}; expected at "
                    "least one."
                )
            lacking = [c for c in self.needed if c not in part.dataset.column_names]
            if lacking:
                raise ConfigError(
                    f"split {part.split!r} of {config.dataset_name} has no column {lacking[0]!r}, "
                    f"which split {config.dataset_train_split!r} has; give both the same columns."
                )
        return train, held_out

    def data(
        self, train: Part, held_out: Part | None, prepared: Sequence[Any], config: TrainConfig,
        labels: tuple[str, ...] = (),
    ) -> TrainingData:  # fmt: skip
        """Return prepared rows with what run.json says of them."""
        columns = train.dataset.column_names
        return TrainingData(
            prepared[0],
            prepared[1],
            self.name,
            unused=tuple(sorted(set(columns) - set(self.reads))),
            places=partial(place, config.dataset_name, train),
            held_out_places=partial(place, config.dataset_name, held_out or train),
            labels=labels,
            said=said_of(held_out),
        )

    # ------------------------------------------------------------------ model

    def source(self, config: TrainConfig) -> "PretrainedConfig":
        """Read the model's config.json."""
        return read_config(
            config.model_name_or_path,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )

    def has_trained_head(self, source: "PretrainedConfig", config: TrainConfig) -> bool:
        """Whether the model was saved with a head for this task."""
        _, name = head_class(self, source, config)
        return name in (getattr(source, "architectures", None) or ())

    def load_model(
        self, config: TrainConfig, source: "PretrainedConfig", **changes: Any
    ) -> tuple[Any, tuple[str, ...]]:
        """Load the model with a head for the task; return it and the tensors that are new.

        New tensors start as the run's seed gives them.
        """
        import torch
        import transformers

        auto_class, _ = head_class(self, source, config)
        dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        transformers.set_seed(config.seed)
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()  # that a head is new is said by the task
        try:
            with refusals(partial(cannot_be_loaded, "model", config)):
                model, info = getattr(transformers, auto_class).from_pretrained(
                    config.model_name_or_path,
                    dtype=dtype,
                    attn_implementation=config.attn_implementation,
                    revision=config.model_revision,
                    trust_remote_code=config.trust_remote_code,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **changes,
                )
        finally:
            transformers.logging.set_verbosity(level)
        reason = METHODS[config.method].refuses_quantized
        if getattr(model, "hf_quantizer", None) is not None and reason is not None:
            raise ConfigError(
                f"{config.model_name_or_path} is quantized and method is {config.method}: {reason}."
            )
        changed = [key[0] for key in info.get("mismatched_keys") or ()]
        return model, tuple(sorted({*info.get("missing_keys", ()), *changed}))

    def load_tokenizer(self, config: TrainConfig) -> Any:
        """Load the tokenizer, with something to fill up short rows with."""
        from transformers import AutoTokenizer

        with refusals(partial(cannot_be_loaded, "tokenizer", config)):
            tokenizer = AutoTokenizer.from_pretrained(
                config.model_name_or_path,
                revision=config.model_revision,
                trust_remote_code=config.trust_remote_code,
            )
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ConfigError(
                    f"the tokenizer of {config.model_name_or_path} has no padding token, which "
                    "fills up short examples, and no end-of-sequence token in its place; add one "
                    "and save the tokenizer."
                )
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    # ------------------------------------------------------------------ trainer

    def collator(self, loaded: Loaded, config: TrainConfig) -> Any:
        """Return what makes a batch of rows."""
        raise NotImplementedError

    def predictions(self, logits: Any, labels: Any) -> Any:
        """Return what is kept of a batch's logits to judge them: the likeliest classes."""
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)

    def scores(self, predicted: Any, labels: Any, loaded: Loaded) -> Mapping[str, float]:
        """Judge the predictions of the held-out part."""
        raise NotImplementedError

    def trainer_class(self) -> "type[Trainer]":
        """Return the trainer's class."""
        from transformers import Trainer

        return Trainer

    def build_trainer(
        self, loaded: Loaded, arguments: Any, peft_config: Any, config: TrainConfig
    ) -> "Trainer":
        """Put the adapters on and build the trainer."""
        from transformers.trainer_callback import PrinterCallback

        from lisa_train.trainer.losses import evaluate_per_label, take_means

        arguments.label_names = ["labels"]
        arguments.remove_unused_columns = False
        if arguments.gradient_checkpointing_kwargs is None:
            arguments.gradient_checkpointing_kwargs = {"use_reentrant": False}
        if loaded.data.held_out is None:
            arguments.eval_on_start = False
        model = _with_adapters(loaded, peft_config, config)
        with refusals("The trainer refuses this combination: {}.".format):
            trainer = self.trainer_class()(
                model=model,
                args=arguments,
                train_dataset=loaded.data.train,
                eval_dataset=loaded.data.held_out,
                processing_class=loaded.processor,
                data_collator=self.collator(loaded, config),
                compute_metrics=partial(self._judge, loaded),
                preprocess_logits_for_metrics=self.predictions,
            )
        trainer.remove_callback(PrinterCallback)
        evaluate_per_label(trainer)
        take_means(trainer)
        return trainer

    def _judge(self, loaded: Loaded, output: Any) -> dict[str, float]:
        predicted, labels = np.asarray(output.predictions), np.asarray(output.label_ids)
        return with_meaning(self.scores(predicted, labels, loaded), self.name)

    def survey(
        self, trainer: Any, loaded: Loaded, config: TrainConfig
    ) -> tuple[dict[str, Any], list[str]]:
        """Refuse rows that make no batch; say that a new head rests."""
        from lisa_train.command.tasks.prepared import need_batches

        need_batches(
            trainer, len(loaded.data.train), "training", trainer.args.train_batch_size, config
        )
        if loaded.data.held_out is not None:
            need_batches(
                trainer, len(loaded.data.held_out), "held-out", trainer.args.eval_batch_size, config
            )
        said = list(loaded.said)
        trains = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        resting = [name for name in loaded.new if not any(name in full for full in trains)]
        adapters = hasattr(trainer.model, "peft_config")
        setting = METHODS[config.method].head_setting
        if resting and not adapters and setting is not None:
            said.append(
                f"{resting[0]} is new and does not train: what is selected learns for a head that "
                f"stays at random; add head to {setting}"
            )
        return {}, said


def _with_adapters(loaded: Loaded, peft_config: Any, config: TrainConfig) -> Any:
    """Put adapters around the model; a head that is new trains whole beside them."""
    if peft_config is None:
        return loaded.model
    from peft import get_peft_model

    train_heads_whole(peft_config, loaded.model, loaded.new)
    with refusals("PEFT refuses this combination: {}.".format):
        return get_peft_model(loaded.model, peft_config)


def _likely(column: str, columns: Sequence[str]) -> list[str]:
    """Columns that are likely meant by `column`."""
    kin = {
        "label": ("intent", "class", "category", "target", "sentiment", "labels"),
        "text": ("sentence", "content", "review", "utterance", "question", "document"),
        "tokens": ("words",),
        "tags": ("ner_tags", "pos_tags", "labels", "chunk_tags"),
        "image": ("img", "pixel_values", "file_name", "path"),
        "audio": ("file", "path", "file_name"),
    }
    return [c for c in columns if c.lower() in kin.get(column, ())]


def cannot_be_loaded(what: str, config: TrainConfig, reason: str) -> str:
    """Say that a part of a model cannot be loaded."""
    return (
        f"The {what} of model_name_or_path {config.model_name_or_path!r} cannot be loaded "
        f"({reason[:200]}); give a folder written by save_pretrained, or a hub id that this "
        "machine can reach."
    )
