"""`task: text-classification`: one class per text, or per pair of texts."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lisa_train.command.config import TrainConfig
from lisa_train.command.tasks.classes import TaskWithClasses
from lisa_train.command.tasks.data import check_parts
from lisa_train.command.tasks.rows import Layout
from lisa_train.command.tasks.task import Loaded
from lisa_train.command.tasks.tokens import cut_rows, longest_input, tokenized


class TextClassification(TaskWithClasses):
    """One class per text."""

    name = "text-classification"
    peft_type = "SEQ_CLS"
    mappings: ClassVar[Mapping[str, str]] = {
        "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    }
    reads: ClassVar[Mapping[str, str]] = {
        "text": "the text",
        "text_pair": "a second text, where there is one",
        "label": "its class: a name or a number",
    }
    class_column = "label"
    needed = ("text", "label")

    def load(self, config: TrainConfig) -> Loaded:
        """Load data, model and tokenizer; the head has a row for every label in training."""
        train, held_out = self.parts(config)
        layout = Layout("text-classification", ("text",), ("text_pair",), _check_row)
        check_parts((train, held_out), layout, config)
        classes = self.classes(train, held_out, config)
        model, new = self.load_classifier(classes, config)
        tokenizer = self.load_tokenizer(config)
        model.config.pad_token_id = tokenizer.pad_token_id
        limit = longest_input(model, tokenizer, config)
        pair = "text_pair" in train.dataset.column_names

        def make(rows: dict[str, Any]) -> dict[str, Any]:
            texts = [rows["text"], rows["text_pair"]] if pair else [rows["text"]]
            inputs = tokenizer(*texts, truncation=limit is not None, max_length=limit)
            inputs["labels"] = [classes.number[label] for label in rows["label"]]
            return inputs

        rows = tokenized((train, held_out), make)
        data = self.data(train, held_out, rows, config, classes.names)
        said = [*classes.said, *cut_rows(rows, limit, config)]
        return Loaded(model, tokenizer, data, new, said)

    def collator(self, loaded: Loaded, config: TrainConfig) -> Any:
        """Fill rows up to the longest of their batch."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(loaded.processor)


def _check_row(row: Mapping[str, Any]) -> str | None:
    for column, value in row.items():
        if not isinstance(value, str) or not value.strip():
            held = "nothing" if value is None or isinstance(value, str) else type(value).__name__
            return f"column {column!r} holds {held}; expected text."
    return None
