"""`task: token-classification`: one class per word, as in finding names or parts of speech."""

from collections.abc import Mapping
from typing import Any, ClassVar

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.config import TrainConfig
from lisa_train.command.tasks.classes import TaskWithClasses
from lisa_train.command.tasks.data import check_parts
from lisa_train.command.tasks.rows import Layout
from lisa_train.command.tasks.scores import IGNORED
from lisa_train.command.tasks.task import Loaded
from lisa_train.command.tasks.tokens import cut_rows, longest_input, tokenized


class TokenClassification(TaskWithClasses):
    """One class per word: the first token of a word carries it, its other tokens do not count."""

    name = "token-classification"
    peft_type = "TOKEN_CLS"
    mappings: ClassVar[Mapping[str, str]] = {
        "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"
    }
    reads: ClassVar[Mapping[str, str]] = {
        "tokens": "the words of a text, as a list",
        "tags": "a class for each of them",
    }
    class_column = "tags"
    several_classes = True
    needed = ("tokens", "tags")

    def load(self, config: TrainConfig) -> Loaded:
        """Load data, model and tokenizer; the head has a row for every tag in training."""
        train, held_out = self.parts(config)
        layout = Layout("token-classification", ("tokens", "tags"), (), _check_row)
        check_parts((train, held_out), layout, config)
        classes = self.classes(train, held_out, config)
        model, new = self.load_classifier(classes, config)
        tokenizer = self.load_tokenizer(config)
        if not tokenizer.is_fast:
            raise ConfigError(
                f"the tokenizer of {config.model_name_or_path} does not tell which word a token "
                "belongs to; give a model with a fast tokenizer (tokenizer.json)."
            )
        limit = longest_input(model, tokenizer, config)

        def make(rows: dict[str, Any]) -> dict[str, Any]:
            inputs = tokenizer(
                rows["tokens"], is_split_into_words=True, truncation=limit is not None,
                max_length=limit,
            )  # fmt: skip
            inputs["labels"] = [
                _on_first_tokens(inputs.word_ids(i), [classes.number[tag] for tag in tags])
                for i, tags in enumerate(rows["tags"])
            ]
            return inputs

        rows = tokenized((train, held_out), make)
        data = self.data(train, held_out, rows, config, classes.names)
        said = [*classes.said, *cut_rows(rows, limit, config)]
        return Loaded(model, tokenizer, data, new, said)

    def collator(self, loaded: Loaded, config: TrainConfig) -> Any:
        """Fill rows up to the longest of their batch."""
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(loaded.processor)


def _on_first_tokens(words: list[int | None], tags: list[int]) -> list[int]:
    """Put the tag of each word on its first token."""
    labels, before = [], None
    for word in words:
        labels.append(IGNORED if word is None or word == before else tags[word])
        before = word
    return labels


def _check_row(row: Mapping[str, Any]) -> str | None:
    words, tags = row["tokens"], row["tags"]
    if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
        return f"column 'tokens' must be a list of words, it holds {str(words)[:80]!r}."
    if not isinstance(tags, list) or len(tags) != len(words):
        held = len(tags) if isinstance(tags, list) else repr(tags)
        return (
            f"column 'tags' must have an entry for each of the {len(words)} tokens; it has {held}."
        )
    return None
