"""Find, check and arrange the text that a run trains on; every complaint in one sentence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.command.config import TrainConfig
from lisa_train.command.starting import is_our_fault
from lisa_train.command.tasks.literal_paths import is_alias, literal_path
from lisa_train.command.tasks.rows import (
    INSTRUCTION,
    MESSAGES,
    Layout,
    check_rows,
    instruction_as_pair,
    layout_of,
    said_of_text_field,
)
from lisa_train.command.tasks.splits import Part, limited, place, said_of, split_parts
from lisa_train.command.together import first_goes_first

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_READERS = {
    ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
# pandas takes words such as NA, None and null for nothing; in a table of text they are words.
_AS_WRITTEN = {"keep_default_na": False, "na_values": [""]}


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is judged by.

    Attributes
    ----------
    train, held_out
        Datasets reduced to the columns that training reads; `held_out` is None without one.
    layout
        ``text``, ``prompt/completion``, ``messages`` or ``tokens``.
    unused
        Columns of the data that nothing reads.
    dropped
        Rows of the training part that cannot be learned from.
    places, held_out_places
        Words that name a row of `train` and `held_out`, by its position in it.
    labels
        Names of the classes, in a classification.
    said
        What a person should know of how the data were split, each without its full stop.
    """

    train: "Dataset"
    held_out: "Dataset | None"
    layout: str
    unused: tuple[str, ...] = ()
    dropped: int = 0
    places: Callable[[int], str] = "row {}".format
    held_out_places: Callable[[int], str] = "held-out row {}".format
    labels: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    @property
    def conversational(self) -> bool:
        """Whether the rows hold messages, which a chat template makes into text."""
        columns = self.train.column_names
        return "messages" in columns or (
            "prompt" in columns and isinstance(self.train[0]["prompt"], list)
        )

    def describe(self, name: str) -> dict[str, Any]:
        """Entry `dataset` of a run's manifest, before the rows are cut to their length."""
        labels = {"labels": list(self.labels)} if self.labels else {}
        return {
            "name": name,
            "layout": self.layout,
            **labels,
            "columns": self.train.column_names,
            "unused_columns": list(self.unused),
            "train_examples": len(self.train),
            "held_out_examples": len(self.held_out) if self.held_out is not None else 0,
            "dropped_examples": self.dropped,
        }


def check_dataset_name(name: str) -> None:
    """Raise `ConfigError` for a local path that cannot be a dataset; touches no network."""
    if not name:
        raise ConfigError("dataset_name is empty; expected a data file, a folder or a hub id.")
    path = Path(name)
    if path.is_dir():
        if not any(path.iterdir()):
            raise ConfigError(
                f"dataset_name {name} is an empty folder; expected a saved dataset or data files "
                f"({', '.join(_READERS)}) in it."
            )
        return
    if path.is_file():
        if path.suffix.lower() not in _READERS:
            raise ConfigError(
                f"dataset_name {name} ends in {path.suffix or 'nothing'!r}; expected a file that "
                f"ends in {', '.join(_READERS)}, or a folder."
            )
        if path.stat().st_size == 0:
            raise ConfigError(f"dataset_name {name} is an empty file; expected one example a line.")
        return
    if path.suffix.lower() in _READERS or path.is_absolute() or name.startswith((".", "~")):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(
            f"dataset_name {name} does not exist; expected a data file, a folder or a hub id."
            + suggest(path.name, siblings)
        )


def load_data(config: TrainConfig, *, chat: bool = False) -> TrainingData:
    """Load, check, limit and split the dataset of a configuration.

    `chat`: the model has a chat template, by which instructions are put to it.

    Raises
    ------
    ConfigError
        When the data is missing, unreadable, empty, or has none of the accepted layouts.
    """
    splits = read_splits(config)
    name = config.dataset_train_split
    layout = layout_of(splits[name], config)
    first = splits[name].select(range(1))  # before the data is found too small to be split
    _check_part(Part(first, name, range(1)), layout, config)
    parts = split_parts(splits, config)
    train = limited(parts[0], config.max_train_samples)
    held_out = None if parts[1] is None else limited(parts[1], config.max_eval_samples)
    check_parts((train, held_out), layout, config)
    unused = sorted(set(train.dataset.column_names) - set(layout.columns(train.dataset)))
    kept = _arrange(train, layout, config, chat)
    judged = None if held_out is None else _arrange(held_out, layout, config, chat)
    return TrainingData(
        kept.dataset,
        None if judged is None else judged.dataset,
        layout.name,
        unused=tuple(unused),
        dropped=len(train.rows) - len(kept.rows),
        places=partial(place, config.dataset_name, kept),
        held_out_places=partial(place, config.dataset_name, judged or kept),
        said=(*said_of(held_out), *said_of_text_field(layout, config)),
    )


def read_splits(config: TrainConfig) -> "DatasetDict":
    """Read the data of a configuration, with the columns named as `columns` says.

    Raises
    ------
    ConfigError
        When they are missing or cannot be read, or have not the split or the columns named.
    """
    check_dataset_name(config.dataset_name)
    with first_goes_first():  # the others find what it has put into the cache
        splits = _read(config)
    name = config.dataset_train_split
    if name not in splits:
        raise ConfigError(
            f"{config.dataset_name} has no split {name!r}, only {', '.join(map(repr, splits))}; "
            "set dataset_train_split." + suggest(name, splits)
        )
    for part in splits if config.columns else ():
        splits[part] = _renamed(splits[part], part, config)
    return splits


def _renamed(dataset: "Dataset", split: str, config: TrainConfig) -> "Dataset":
    columns = dataset.column_names
    for wanted, given in config.columns.items():
        if given not in columns:
            raise ConfigError(
                f"columns.{wanted} is {given!r}, but split {split!r} of {config.dataset_name} has "
                f"the columns {', '.join(map(repr, columns))}.{suggest(given, columns)}"
            )
    taken = [w for w, g in config.columns.items() if w in columns and w != g]
    dataset = dataset.remove_columns([c for c in taken if c not in config.columns.values()])
    return dataset.rename_columns({g: w for w, g in config.columns.items() if g != w})


def check_parts(parts: Sequence[Part | None], layout: Layout, config: TrainConfig) -> None:
    """Refuse parts that lack a column or have no row, and the first row that does not fit."""
    for part in parts:
        if part is not None:
            _check_part(part, layout, config)


def _check_part(part: Part, layout: Layout, config: TrainConfig) -> None:
    missing = [c for c in layout.needed if c not in part.dataset.column_names]
    if missing:
        raise ConfigError(
            f"split {part.split!r} of {config.dataset_name} has no column {missing[0]!r}, which "
            f"split {config.dataset_train_split!r} has; give both the same columns."
        )
    if not len(part.dataset):
        raise ConfigError(
            f"{config.dataset_name} has no example in split {part.split!r}; expected at least one."
        )
    check_rows(part.dataset, layout, partial(place, config.dataset_name, part))


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
            suffix = path.suffix.lower()
            loaded = load_dataset(
                _READERS[suffix],
                data_files={config.dataset_train_split: str(path)},
                cache_dir=cache,
                **(_AS_WRITTEN if _READERS[suffix] == "csv" else {}),
                **({"sep": "\t"} if suffix == ".tsv" else {}),
            )
        else:
            loaded = load_dataset(
                str(path),
                config.dataset_config,
                cache_dir=cache,
                **(_AS_WRITTEN if _holds_tables_alone(path) else {}),
            )
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ConfigError(
            f"dataset_name {name!r} is neither a file or folder here nor a dataset that the hub "
            f"gives us ({_first_line(error)}); check the spelling and the network."
        ) from error
    except Exception as error:  # the readers raise errors of many libraries for a bad file
        if is_our_fault(error):
            raise
        raise ConfigError(f"dataset_name {name} {_unreadable(error)}") from error
    return loaded


def _holds_tables_alone(folder: Path) -> bool:
    """Whether a folder has nothing but CSV and TSV files, and no card that says how to read it."""
    kinds = {file.suffix.lower() for file in folder.rglob("*") if file.is_file()}
    return bool(kinds) and kinds <= {suffix for suffix in _READERS if _READERS[suffix] == "csv"}


def _unreadable(error: Exception) -> str:
    reason = _first_line(error)
    if "corresponds to no data" in reason:
        return "has no example; expected at least one."
    if isinstance(error.__cause__ or error, UnicodeDecodeError):
        return f"is not written in UTF-8 ({reason}); save it in that encoding."
    return f"cannot be read ({reason}); expected JSON lines, CSV, Parquet or a saved dataset."


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return str(cause).strip().splitlines()[0][:200] if str(cause).strip() else type(cause).__name__


def _arrange(part: Part, layout: Layout, config: TrainConfig, chat: bool) -> Part:
    """Instructions, and chat data with the loss on the last turn, become prompt and completion."""
    dataset = part.dataset.select_columns(layout.columns(part.dataset))
    if layout is INSTRUCTION:
        pairs = dataset.map(
            partial(instruction_as_pair, chat=chat), remove_columns=dataset.column_names
        )
        return Part(pairs, part.split, part.rows)
    if layout is not MESSAGES or not config.completion_only_loss:
        return Part(dataset, part.split, part.rows)

    def cut(example: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": example["messages"][:-1], "completion": example["messages"][-1:]}

    chosen = [
        i
        for i, messages in enumerate(dataset["messages"])
        if len(messages) > 1 and messages[-1]["role"] == "assistant"
    ]
    if not chosen:
        raise ConfigError(
            f"completion_only_loss is true but no conversation in split {part.split!r} of "
            f"{config.dataset_name} ends with an assistant turn after another turn; there is "
            "nothing to learn from."
        )
    cut_short = dataset.select(chosen).map(cut, remove_columns=["messages"])
    return Part(cut_short, part.split, [part.rows[i] for i in chosen])
