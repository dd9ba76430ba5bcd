"""What a row of training data must look like in every layout; the first that does not is named."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.command.config import TrainConfig

if TYPE_CHECKING:
    from datasets import Dataset

BATCH = 1000  # rows looked at together


@dataclass(frozen=True)
class Layout:
    """Columns of one kind of data.

    Attributes
    ----------
    name
        ``text``, ``prompt/completion``, ``instruction/output``, ``messages`` or ``tokens``.
    needed
        Columns that every part of the data must have.
    optional
        Columns that TRL reads as well, where they are there.
    check
        Returns what is wrong with a row, in words, or None.
    """

    name: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    check: Callable[[Mapping[str, Any]], str | None]

    def columns(self, dataset: "Dataset") -> list[str]:
        """Columns of a data set that training reads."""
        return [c for c in (*self.needed, *self.optional) if c in dataset.column_names]


def text_layout(field: str) -> Layout:
    """Plain text in column `field`."""

    def check(row: Mapping[str, Any]) -> str | None:
        value = row[field]
        return None if isinstance(value, str) else _not_text(field, value)

    return Layout("text", (field,), (), check)


def check_rows(dataset: "Dataset", layout: Layout, where: Callable[[int], str]) -> None:
    """`ConfigError` for the first row that `layout` does not accept; `where` names a row."""
    chosen = dataset.select_columns(layout.columns(dataset))
    number = 0
    for batch in chosen.iter(batch_size=BATCH):
        names = list(batch)
        for values in zip(*(batch[name] for name in names), strict=True):
            fault = layout.check(dict(zip(names, values, strict=True)))
            if fault is not None:
                raise ConfigError(f"{where(number)}: {fault}")
            number += 1


def _not_text(column: str, value: Any) -> str:
    held = "nothing (null)" if value is None else type(value).__name__
    return f"column {column!r} holds {held}; expected text."


def _check_pair(row: Mapping[str, Any]) -> str | None:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return (
            check_messages("prompt", prompt)
            or check_messages("completion", completion)
            or _check_template_columns(row)
        )
    for name in ("prompt", "completion"):
        if not isinstance(row[name], str):
            return _not_text(name, row[name])[:-1] + ", or messages in both columns."
    return None


def _check_conversation(row: Mapping[str, Any]) -> str | None:
    return check_messages("messages", row["messages"]) or _check_template_columns(row)


def check_messages(column: str, messages: Any) -> str | None:
    """Return what is wrong with a list of messages, or None."""
    wanted = f"`{column}` must be a list of {{role, content}} objects"
    if not isinstance(messages, list) or not messages:
        return f"{wanted}, with at least one; it holds {str(messages)[:80]!r}."
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return f"{wanted}; message {number} is {str(message)[:80]!r}."
        if not isinstance(message["role"], str) or not message["role"]:
            return f"{wanted}; message {number} has the role {message['role']!r}."
        # A call of a tool has no content.
        if not any(value for key, value in message.items() if key not in ("role", "content")) and (
            not isinstance(message["content"], str | list)
        ):
            return f"{wanted}; message {number} has the content {message['content']!r}."
    return None


def _check_template_columns(row: Mapping[str, Any]) -> str | None:
    import json

    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            return f"column 'tools' holds text that is no JSON ({error})."
    if tools is not None and not isinstance(tools, list):
        return f"column 'tools' holds {type(tools).__name__}; expected a list of tools."
    if "chat_template_kwargs" in row and not isinstance(row["chat_template_kwargs"], dict):
        held = row["chat_template_kwargs"]
        return f"column 'chat_template_kwargs' holds {held!r}; expected an object."
    return None


def _check_instruction(row: Mapping[str, Any]) -> str | None:
    for name in ("instruction", "output"):
        if not isinstance(row[name], str):
            return _not_text(name, row[name])
    if not isinstance(row.get("input") or "", str):
        return _not_text("input", row["input"])
    return None


def instruction_as_pair(row: Mapping[str, Any], *, chat: bool) -> dict[str, Any]:
    """Put an instruction, and what it is about, as a prompt: a turn of a chat, or paragraphs."""
    asked = "\n\n".join(t for t in (row["instruction"], row.get("input")) if t)
    if not chat:
        return {"prompt": asked + "\n\n", "completion": row["output"]}
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def _check_tokens(row: Mapping[str, Any]) -> str | None:
    ids = row["input_ids"]
    if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
        return f"column 'input_ids' must be a list of token ids, it holds {str(ids)[:80]!r}."
    for name in ("labels", "completion_mask", "assistant_masks"):
        if name in row and (not isinstance(row[name], list) or len(row[name]) != len(ids)):
            return f"column {name!r} must have an entry for each of the {len(ids)} input_ids."
    return None


_TEMPLATE = ("tools", "chat_template_kwargs")
MESSAGES = Layout("messages", ("messages",), _TEMPLATE, _check_conversation)
PAIR = Layout("prompt/completion", ("prompt", "completion"), _TEMPLATE, _check_pair)
INSTRUCTION = Layout(
    "instruction/output", ("instruction", "output"), ("input",), _check_instruction
)
TOKENS = Layout(
    "tokens", ("input_ids",), ("labels", "completion_mask", "assistant_masks"), _check_tokens
)
_LAYOUTS = "`prompt` and `completion`; `instruction` and `output`; `messages`; or `input_ids`"


def layout_of(dataset: "Dataset", config: TrainConfig) -> Layout:
    """Return the layout that the columns show; TRL prefers token ids to whatever else is there."""
    columns, field = dataset.column_names, config.dataset_text_field
    if not len(dataset):
        raise ConfigError(
            f"{config.dataset_name} has no example in split {config.dataset_train_split!r}; "
            "expected at least one."
        )
    for layout in (TOKENS, MESSAGES, PAIR, INSTRUCTION):
        if set(layout.needed) <= set(columns):
            if layout is TOKENS and config.completion_only_loss:
                _need_mask(columns, "completion_mask", config)
            return layout
    if field in columns:
        if config.completion_only_loss:
            raise ConfigError(
                f"completion_only_loss is true but {config.dataset_name} is plain text; it needs "
                "`prompt` and `completion`, or `messages`."
            )
        return text_layout(field)
    raise ConfigError(
        f"{config.dataset_name} has the columns {', '.join(map(repr, columns))}; expected "
        f"`{field}`; {_LAYOUTS}. {_advice(dataset, field)}"
    )


def _advice(dataset: "Dataset", field: str) -> str:
    """Say how columns of other names are given, by what the first row holds."""
    columns = dataset.column_names
    for column, value in dataset[0].items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            said = f"Say with columns which is which, as columns: {{messages: {column}}}."
            if not {"role", "content"} <= set(value[0]):
                said += (
                    " Each message is an object of role and content; those of "
                    f"{column!r} have {', '.join(map(repr, value[0]))}: write them so."
                )
            return said
    if field not in ("text", *columns) and "text" in columns:
        return "Remove dataset_text_field, which says `text` by itself."
    wanted = [field, "prompt", "completion", "messages"]
    hint = next((s for c in columns if (s := suggest(c, wanted))), "")
    return f"Say with columns which is which, as columns: {{text: {columns[0]}}}.{hint}"


def said_of_text_field(layout: Layout, config: TrainConfig) -> tuple[str, ...]:
    """Say that a column of plain text was named and another kind of data is read."""
    field = config.dataset_text_field
    if layout.name == "text" or field == TrainConfig.dataset_text_field:
        return ()
    return (
        f"dataset_text_field is {field!r}, but {config.dataset_name} is read as {layout.name}; "
        f"columns {{text: {field}}} reads that column alone",
    )


def _need_mask(columns: Sequence[str], mask: str, config: TrainConfig) -> None:
    if mask not in columns and "labels" not in columns:
        raise ConfigError(
            f"completion_only_loss is true but {config.dataset_name} holds token ids without "
            f"{mask!r} or 'labels'; add the column."
        )
