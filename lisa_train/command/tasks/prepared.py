"""Check the rows that TRL has prepared against the model and the batches, before the first step.

A token id beyond the embedding matrix, a position beyond the table of positions: a GPU answers
them with a failed assertion somewhere else, and a data set without a batch with nothing at all.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.config import TrainConfig
from lisa_train.command.starting import reason_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer
    from trl import SFTTrainer

    from lisa_train.command.tasks.data import TrainingData

IGNORED = -100
_POSITIONS = re.compile(r"(^|\.)(wpe|\w*position\w*)$")


@dataclass(frozen=True)
class Prepared:
    """What there is to know of the rows of one part: how many, how long, how much to learn.

    Attributes
    ----------
    rows, empty
        Rows, and those without a label that counts: every label is ignored but the first, which
        nothing predicts.
    labels
        Labels that count.
    longest
        Tokens of the longest row.
    ids, label_ids
        The smallest and the largest token id, and those of the labels that are not ignored; None
        without any.
    """

    rows: int
    empty: int
    labels: int
    longest: int
    ids: tuple[int, int] | None
    label_ids: tuple[int, int] | None


def survey(dataset: "Dataset") -> Prepared:
    """Look at every row once."""
    rows = empty = labels = longest = 0
    ids_range: tuple[int, int] | None = None
    label_range: tuple[int, int] | None = None
    columns = [c for c in ("input_ids", "labels") if c in dataset.column_names]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        ids, wanted = (table[c].combine_chunks() for c in (columns[0], columns[-1]))
        lengths = np.diff(ids.offsets.to_numpy())
        ends = np.cumsum(lengths)
        targets = wanted.flatten().to_numpy(zero_copy_only=False)
        counts = targets != IGNORED
        label_range = _widened(label_range, targets[counts])
        counts[(ends - lengths)[lengths > 0]] = False
        sums = np.concatenate([[0], np.cumsum(counts)])
        per_row = sums[ends] - sums[ends - lengths]
        rows += len(lengths)
        empty += int((per_row == 0).sum())
        labels += int(per_row.sum())
        longest = max(longest, int(lengths.max(initial=0)))
        ids_range = _widened(ids_range, ids.flatten().to_numpy(zero_copy_only=False))
    return Prepared(rows, empty, labels, longest, ids_range, label_range)


def _widened(found: tuple[int, int] | None, values: "np.ndarray") -> tuple[int, int] | None:
    if not len(values):
        return found
    ends = (int(values.min()), int(values.max()))
    return ends if found is None else (min(found[0], ends[0]), max(found[1], ends[1]))


def check_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", data: "TrainingData", config: TrainConfig
) -> None:
    """`ConfigError` for signs or a template that the tokenizer lacks and the data need."""
    whose = f"the tokenizer of {config.model_name_or_path} has no"
    given = config.trainer_args
    if data.conversational:
        if not tokenizer.chat_template and not given.get("chat_template_path"):
            raise ConfigError(
                f"{config.dataset_name} holds messages, but {whose} chat template; set "
                "trainer_args.chat_template_path to a template (.jinja) or a model that has one, "
                "or give `text`."
            )
    elif data.layout != "tokens" and tokenizer.eos_token is None and not given.get("eos_token"):
        raise ConfigError(
            f"{whose} end-of-sequence token, which every example ends with; set "
            "trainer_args.eos_token to a token of its vocabulary."
        )
    signs = (tokenizer.pad_token, tokenizer.eos_token)
    if signs == (None, None) and not (given.get("pad_token") or given.get("eos_token")):
        raise ConfigError(
            f"{whose} padding token, which fills up short examples; set trainer_args.pad_token "
            "to a token of its vocabulary."
        )


def refused_row(
    data: "TrainingData", tokenizer: "PreTrainedTokenizerBase", config: TrainConfig
) -> str | None:
    """Name the first row that cannot be made into tokens, with the reason; None without one."""
    for dataset, place in ((data.train, data.places), (data.held_out, data.held_out_places)):
        if dataset is None:
            continue
        for number, row in enumerate(dataset):
            try:
                fault = _render(row, data, tokenizer, config)
            except Exception as error:
                fault = reason_of(error)
            if fault is not None:
                return f"{place(number)}: {fault}"
    return None


def _render(
    row: Any, data: "TrainingData", tokenizer: "PreTrainedTokenizerBase", config: TrainConfig
) -> str | None:
    """Do with one row what TRL does; return what is wrong where nothing is raised."""
    if data.layout == "tokens":
        return None
    if not data.conversational:
        for column in data.train.column_names:
            tokenizer(text=row[column])
        return None
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    given = {"tools": tools, **row.get("chat_template_kwargs", {})}
    turns = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    try:
        if "prompt" in row:
            tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **given)
        tokenizer.apply_chat_template(turns, **given)
    except Exception as error:
        return f"the chat template refuses it: {reason_of(error)}."
    if config.assistant_only_loss and all(turn["role"] != "assistant" for turn in turns):
        return "it has no assistant turn, and assistant_only_loss learns from nothing else."
    return None


def check_prepared(trainer: "SFTTrainer", config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    """Refuse what cannot be trained; return what was found for run.json, and what to say.

    Raises
    ------
    ConfigError
        When no label is left to learn from, no batch can be made, or the rows do not fit the
        model's vocabulary or positions.
    """
    if trainer.args.dataset_kwargs and trainer.args.dataset_kwargs.get("skip_prepare_dataset"):
        return {}, []
    train = survey(trainer.train_dataset)
    if not train.labels:
        raise ConfigError(_without_labels(train, config, "training", "to learn from") + ".")
    need_batches(trainer, train.rows, "training", trainer.args.train_batch_size, config)
    parts = [train]
    said: list[str] = []
    found = {"train_examples": train.rows, "examples_without_labels": train.empty}
    if config.packing:
        found = {"packed_sequences": train.rows}
    if trainer.eval_dataset is not None:
        held_out = survey(trainer.eval_dataset)
        unjudged = _without_labels(held_out, config, "held-out", "to be judged by")
        if not held_out.rows:
            raise ConfigError(f"{unjudged}; or set eval_size to 0.")
        if not held_out.labels:
            said.append(f"{unjudged}: there is no held-out loss")
        need_batches(trainer, held_out.rows, "held-out", trainer.args.eval_batch_size, config)
        parts.append(held_out)
        if not config.packing:
            found["held_out_examples"] = held_out.rows
    _check_vocabulary(trainer, parts, config)
    said += _check_positions(trainer.model, max(part.longest for part in parts), config)
    if train.empty and not config.packing:
        said.append(
            f"{train.empty} of {train.rows} training examples hold no token that is learned from; "
            "a step of such examples alone has no loss"
        )
    return found, said


def _without_labels(part: Prepared, config: TrainConfig, which: str, what: str) -> str:
    if config.max_length is not None and (not part.rows or part.longest >= config.max_length):
        # TRL has left such rows out: nobody can tell any more which of the two it was.
        masked = "" if part.rows else "every label is masked, or "
        advice = (
            f"{masked}what the loss is taken of lies beyond max_length {config.max_length}; raise "
            "it, or shorten the prompts"
        )
    else:
        advice = "every token is masked, or the only one of its example"
    return f"no {which} example of {config.dataset_name} has a token left {what}: {advice}"


def need_batches(
    trainer: "Trainer", rows: int, which: str, batch: int, config: TrainConfig
) -> None:
    """Refuse to train or judge nothing: `dataloader_drop_last` leaves out a batch cut short."""
    together = batch * trainer.args.world_size
    if trainer.args.dataloader_drop_last and rows < together:
        size = "train" if which == "training" else "eval"
        raise ConfigError(
            f"{config.dataset_name} has {rows} {which} examples, fewer than one batch of "
            f"{together}, and dataloader_drop_last leaves out a batch that is not full: there is "
            f"nothing to go through; lower per_device_{size}_batch_size, give more examples, or "
            "set dataloader_drop_last to false."
        )


def _check_vocabulary(
    trainer: "SFTTrainer", parts: Sequence[Prepared], config: TrainConfig
) -> None:
    embedding = trainer.model.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None) or len(embedding.weight)
    pad = trainer.processing_class.pad_token_id
    for what, token in (
        *(("token", end) for part in parts for end in part.ids or ()),
        ("padding token", pad),
    ):
        if token is not None and not 0 <= token < size:
            advice = (
                "the tokenizer is another model's, or tokens were added to it: use the model's own "
                "tokenizer, or resize the model's embeddings and save it"
                if token >= size
                else "token ids count from 0: write the padding token's, or leave such rows out"
            )
            raise ConfigError(
                f"{what} id {token} of {config.dataset_name} is outside the vocabulary of "
                f"{config.model_name_or_path}, whose embedding has {size} rows; {advice}."
            )
    # A label beyond the logits is no error on a CPU: its loss is that of a logit of 0.
    for label in (end for part in parts for end in part.label_ids or ()):
        if not 0 <= label < size:
            raise ConfigError(
                f"label {label} of {config.dataset_name} is no token of "
                f"{config.model_name_or_path}, whose embedding has {size} rows; expected token "
                f"ids in `labels`, or {IGNORED} where nothing is to be learned."
            )


def _check_positions(model: nn.Module, longest: int, config: TrainConfig) -> list[str]:
    """Refuse rows longer than a table of positions; say so where positions are computed."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0 or longest <= limit:
        return []
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    table = any(
        isinstance(module, nn.Embedding) and module is not embedding and _POSITIONS.search(name)
        for name, module in model.named_modules()
    )
    text = (
        f"the longest example of {config.dataset_name} has {longest} tokens, but "
        f"{config.model_name_or_path} has {limit} positions (max_position_embeddings)"
    )
    if table:
        raise ConfigError(f"{text}; set max_length to at most {limit}.")
    return [f"{text}: beyond them it reads what it was not trained for"]


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
