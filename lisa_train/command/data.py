"""Find, check and split the text that a run trains on; every complaint in one sentence."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.command.config import TrainConfig
from lisa_train.command.literal_path import is_alias, literal_path

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_LAYOUTS = "`text`; `prompt` and `completion`; or `messages`"


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is judged by.

    Attributes
    ----------
    train, held_out
        Datasets reduced to the columns that training reads; `held_out` is None without one.
    layout
        ``text``, ``prompt/completion`` or ``messages``.
    """

    train: "Dataset"
    held_out: "Dataset | None"
    layout: str

    def describe(self, name: str) -> dict[str, Any]:
        """Entry `dataset` of a run's manifest."""
        return {
            "name": name,
            "layout": self.layout,
            "columns": self.train.column_names,
            "train_examples": len(self.train),
            "held_out_examples": len(self.held_out) if self.held_out is not None else 0,
        }


def check_dataset_name(name: str) -> None:
    """Raise `ConfigError` for a local path that cannot be a dataset; touches no network."""
    path = Path(name)
    if path.is_dir():
        if not any(path.iterdir()):
            raise ConfigError(
                f"dataset_name {name} is an empty folder; expected a saved dataset or data files "
                f"({', '.join(_READERS)}) in it."
            )
        return
    if path.is_file():
        if path.suffix not in _READERS:
            raise ConfigError(
                f"dataset_name {name} ends in {path.suffix or 'nothing'!r}; expected a file that "
                f"ends in {', '.join(_READERS)}, or a folder."
            )
        if path.stat().st_size == 0:
            raise ConfigError(f"dataset_name {name} is an empty file; expected one example a line.")
        return
    if path.suffix in _READERS or path.is_absolute() or name.startswith((".", "~")):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(
            f"dataset_name {name} does not exist; expected a data file, a folder or a hub id."
            + suggest(path.name, siblings)
        )


def load_data(config: TrainConfig) -> TrainingData:
    """Load, check, limit and split the dataset of a configuration.

    Raises
    ------
    ConfigError
        When the data is missing, unreadable, empty, or has none of the accepted layouts.
    """
    check_dataset_name(config.dataset_name)
    splits = _read(config)
    name = config.dataset_train_split
    if name not in splits:
        raise ConfigError(
            f"{config.dataset_name} has no split {name!r}, only {', '.join(map(repr, splits))}; "
            "set dataset_train_split." + suggest(name, splits)
        )
    layout, columns = _layout(splits[name], config)
    train, held_out = _split(splits, config)
    if config.max_train_samples is not None:
        train = train.select(range(min(config.max_train_samples, len(train))))
    if held_out is not None and config.max_eval_samples is not None:
        held_out = held_out.select(range(min(config.max_eval_samples, len(held_out))))
    train, held_out = (
        None if part is None else _arrange(part.select_columns(columns), layout, config)
        for part in (train, held_out)
    )
    return TrainingData(train, held_out, layout)


def _read(config: TrainConfig) -> "DatasetDict":
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    name, path = config.dataset_name, Path(config.dataset_name)
    try:
        if not path.exists():
            return load_dataset(name, config.dataset_config)
        path = literal_path(path)
        # What is cached for a name of this process alone would never be found again.
        cache = str(path.parent / "cache") if is_alias(path) else None
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = load_from_disk(str(path))
            if not isinstance(loaded, DatasetDict):
                loaded = DatasetDict({config.dataset_train_split: loaded})
        elif path.is_file():
            loaded = load_dataset(
                _READERS[path.suffix],
                data_files={config.dataset_train_split: str(path)},
                cache_dir=cache,
            )
        else:
            loaded = load_dataset(str(path), config.dataset_config, cache_dir=cache)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ConfigError(
            f"dataset_name {name!r} is neither a file or folder here nor a dataset that the hub "
            f"gives us ({_first_line(error)}); check the spelling and the network."
        ) from error
    except Exception as error:  # the readers raise errors of many libraries for a bad file
        raise ConfigError(
            f"dataset_name {name} cannot be read ({_first_line(error)}); expected JSON lines, "
            "Parquet or a saved dataset."
        ) from error
    return loaded


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().splitlines()[0][:200] if str(cause).strip() else type(cause).__name__


def _layout(dataset: "Dataset", config: TrainConfig) -> tuple[str, list[str]]:
    """Return the layout's name and its columns, after a look at the first example."""
    if len(dataset) == 0:
        raise ConfigError(
            f"{config.dataset_name} has no example in split {config.dataset_train_split!r}; "
            "expected at least one."
        )
    columns, field = dataset.column_names, config.dataset_text_field
    if "messages" in columns:
        _check_messages(dataset[0]["messages"], config.dataset_name)
        return "messages", ["messages"]
    if "prompt" in columns and "completion" in columns:
        return "prompt/completion", ["prompt", "completion"]
    if field in columns:
        if not isinstance(dataset[0][field], str):
            raise ConfigError(
                f"column {field!r} of {config.dataset_name} holds "
                f"{type(dataset[0][field]).__name__}; expected text."
            )
        if config.completion_only_loss:
            raise ConfigError(
                f"completion_only_loss is true but {config.dataset_name} is plain text; it needs "
                "`prompt` and `completion`, or `messages`."
            )
        return "text", [field]
    hint = next(
        (s for c in columns if (s := suggest(c, [field, "prompt", "completion", "messages"]))), ""
    )
    raise ConfigError(
        f"{config.dataset_name} has the columns {', '.join(map(repr, columns))}; expected "
        f"{_LAYOUTS}. Rename a column, or set dataset_text_field to the one that holds the text."
        + hint
    )


def _check_messages(messages: Any, name: str) -> None:
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in messages)
    ):
        raise ConfigError(
            f"`messages` of {name} must be a list of {{role, content}} objects; the first example "
            f"holds {str(messages)[:80]!r}."
        )


def _split(splits: "DatasetDict", config: TrainConfig) -> "tuple[Dataset, Dataset | None]":
    train = splits[config.dataset_train_split]
    test = config.dataset_test_split
    if test and test in splits and test != config.dataset_train_split:
        return train, splits[test]
    size: float | int = config.eval_size
    if not size:
        return train, None
    count = int(size) if size >= 1 else max(1, round(size * len(train)))
    if count >= len(train):
        raise ConfigError(
            f"eval_size {config.eval_size:g} holds out {count} of {len(train)} examples of "
            f"{config.dataset_name} and leaves nothing to train on; lower it, or set it to 0."
        )
    # The seed of the split is fixed: runs that differ in `seed` are judged on the same examples.
    parts = train.train_test_split(test_size=count, seed=0)
    return parts["train"], parts["test"]


def _arrange(dataset: "Dataset", layout: str, config: TrainConfig) -> "Dataset":
    """Chat data with the loss on the last turn becomes prompt and completion, as TRL expects."""
    if layout != "messages" or not config.completion_only_loss:
        return dataset

    def cut(example: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": example["messages"][:-1], "completion": example["messages"][-1:]}

    ends_well = dataset.filter(
        lambda e: len(e["messages"]) > 1 and e["messages"][-1]["role"] == "assistant"
    )
    if len(ends_well) == 0:
        raise ConfigError(
            f"completion_only_loss is true but no conversation of {config.dataset_name} ends with "
            "an assistant turn after another turn; there is nothing to learn from."
        )
    return ends_well.map(cut, remove_columns=["messages"])
