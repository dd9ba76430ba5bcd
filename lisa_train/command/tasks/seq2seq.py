"""`task: seq2seq-lm`: a text from a text, by an encoder and a decoder."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from lisa_train.command.config import TrainConfig
from lisa_train.command.tasks.data import check_parts
from lisa_train.command.tasks.plain_trainer import TaskWithHead
from lisa_train.command.tasks.rows import INSTRUCTION, Layout, check_rows, instruction_as_pair
from lisa_train.command.tasks.scores import IGNORED, accuracy
from lisa_train.command.tasks.task import Loaded
from lisa_train.command.tasks.tokens import cut_rows, ended, longest_input, tokenized

if TYPE_CHECKING:
    from datasets import Dataset


class Seq2SeqLM(TaskWithHead):
    """A text from a text."""

    name = "seq2seq-lm"
    peft_type = "SEQ_2_SEQ_LM"
    mappings: ClassVar[Mapping[str, str]] = {
        "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
    }
    reads: ClassVar[Mapping[str, str]] = {
        "prompt": "what is given",
        "completion": "what is to follow",
        "instruction": "what is asked for",
        "input": "what it is about",
        "output": "the answer",
    }
    needed = ("prompt", "completion")

    def arrange(self, dataset: "Dataset", config: TrainConfig) -> "Dataset":
        """Put instructions as prompts."""
        names = dataset.column_names
        if set(self.needed) <= set(names) or not set(INSTRUCTION.needed) <= set(names):
            return dataset
        kept = dataset.select_columns(INSTRUCTION.columns(dataset))
        check_rows(kept, INSTRUCTION, lambda i: f"row {i + 1} of {config.dataset_name}")
        return kept.map(partial(instruction_as_pair, chat=False), remove_columns=kept.column_names)

    def load(self, config: TrainConfig) -> Loaded:
        """Load data, model and tokenizer."""
        train, held_out = self.parts(config)
        layout = Layout(self.name, self.needed, (), _check_row)
        check_parts((train, held_out), layout, config)
        model, new = self.load_model(config, self.source(config))
        tokenizer = self.load_tokenizer(config)
        limit = longest_input(model, tokenizer, config)
        cut: dict[str, Any] = {"truncation": limit is not None, "max_length": limit}

        def make(rows: dict[str, Any]) -> dict[str, Any]:
            inputs = tokenizer([prompt.strip() for prompt in rows["prompt"]], **cut)
            answers = tokenizer(text_target=rows["completion"], **cut)["input_ids"]
            inputs["labels"] = [ended(ids, tokenizer, limit) for ids in answers]
            return inputs

        rows = tokenized((train, held_out), make)
        data = self.data(train, held_out, rows, config)
        return Loaded(model, tokenizer, data, new, cut_rows(rows, limit, config))

    def collator(self, loaded: Loaded, config: TrainConfig) -> Any:
        """Fill rows up, and make the decoder's inputs from the labels."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(loaded.processor, model=loaded.model)

    def scores(self, predicted: Any, labels: Any, loaded: Loaded) -> Mapping[str, float]:
        """Share of tokens that are predicted from the true ones before them."""
        counts = labels != IGNORED
        return {"token_accuracy": accuracy(predicted[counts], labels[counts])}


def _check_row(row: Mapping[str, Any]) -> str | None:
    for column in ("prompt", "completion"):
        if not isinstance(row[column], str) or not row[column].strip():
            held = type(row[column]).__name__ if row[column] else "nothing"
            return f"column {column!r} holds {held}; expected text."
    return None
