"""Rows as tokens: made, ended, and no longer than the model takes."""

from collections.abc import Callable, Sequence
from typing import Any

from lisa_train.command.config import TrainConfig
from lisa_train.command.starting import refusals
from lisa_train.command.tasks.splits import Part


def tokenized(
    parts: Sequence[Part | None], make: Callable[[dict[str, Any]], dict[str, Any]]
) -> list[Any]:
    """Make inputs of the rows of every part; `make` gets a batch of rows as columns."""
    found: list[Any] = []
    for part in parts:
        if part is None:
            found.append(None)
            continue
        dataset = part.dataset
        with refusals("The rows cannot be made into tokens: {}.".format):
            found.append(dataset.map(make, batched=True, remove_columns=dataset.column_names))
    return found


def ended(ids: Sequence[int], tokenizer: Any, most: int | None = None) -> list[int]:
    """Return the tokens of a text with the sign that ends it, so that the model learns to stop."""
    end = tokenizer.eos_token_id
    if end is None or (len(ids) and ids[-1] == end):
        return list(ids)
    return [*(ids if most is None else ids[: most - 1]), end]


def longest_input(model: Any, tokenizer: Any, config: TrainConfig) -> int | None:
    """Return the most tokens of a row: what the settings, the tokenizer and the model allow."""
    limits = [config.max_length, tokenizer.model_max_length]
    embeddings = [
        (name, m) for name, m in model.named_modules() if name.endswith("position_embeddings")
    ]
    for _, module in embeddings:
        if getattr(module, "num_embeddings", None):
            # RoBERTa and its kin number positions from behind the padding's.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - offset)
    found = [limit for limit in limits if limit is not None and limit < 10**9]
    return min(found, default=None)


def cut_rows(parts: Sequence[Any], limit: int | None, config: TrainConfig) -> list[str]:
    """Say how many rows fill the limit: the rest of them may have been cut off."""
    if limit is None:
        return []
    full = sum(
        sum(len(ids) >= limit for ids in part["input_ids"]) for part in parts if part is not None
    )
    return [f"{full} examples of {config.dataset_name} fill {limit} tokens; what is longer is cut"
            ] if full else []  # fmt: skip
