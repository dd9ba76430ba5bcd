"""What of a data set is trained on and what is held out: a split of its own, or a share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.command.config import TrainConfig

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# Names that data sets give to a split that is not for training.
_HELD_OUT = ("validation", "valid", "val", "dev", "eval", "evaluation", "test")


@dataclass(frozen=True)
class Part:
    """Some rows of a split, with their numbers in it, from 0, and what is to be said of them."""

    dataset: "Dataset"
    split: str
    rows: Sequence[int]
    said: str = ""


def said_of(part: Part | None) -> tuple[str, ...]:
    """Return what is to be said of a part, as `TrainingData.said`."""
    return (part.said,) if part is not None and part.said else ()


def place(name: str, part: Part, position: int) -> str:
    """Return words that name a row of a part of the data set `name`."""
    return f"row {part.rows[position] + 1} of split {part.split!r} of {name}"


def limited(part: Part, most: int | None) -> Part:
    """Return the first rows of a part, at most so many."""
    if most is None or most >= len(part.rows):
        return part
    return replace(part, dataset=part.dataset.select(range(most)), rows=part.rows[:most])


def split_parts(splits: "DatasetDict", config: TrainConfig) -> tuple[Part, Part | None]:
    """Return what is trained on and what is held out: a split of its own, or a share."""
    name, test = config.dataset_train_split, config.dataset_test_split
    train = splits[name]
    whole = Part(train, name, range(len(train)))
    if test and has_test_split(splits, config):
        rows = range(len(splits[test]))
        return whole, Part(splits[test], test, rows, _said_of_size(config))
    size: float | int = config.eval_size
    if not size:
        return whole, None
    count = int(size) if size >= 1 else max(1, round(size * len(train)))
    if count >= len(train):
        raise ConfigError(
            f"eval_size {config.eval_size:g} holds out {count} of {len(train)} examples of "
            f"{config.dataset_name} and leaves nothing to train on; lower it, or set it to 0."
        )
    # The seed of the split is fixed: runs that differ in `seed` are judged on the same examples.
    # It depends on nothing but the length, so that the numbers are parted as the rows are.
    from datasets import Dataset

    numbers = Dataset.from_dict({"row": range(len(train))})
    chosen = numbers.train_test_split(test_size=count, seed=0)
    parts = train.train_test_split(test_size=count, seed=0)
    first, second = (Part(parts[p], name, chosen[p]["row"][:]) for p in ("train", "test"))
    return first, replace(second, said=_said_of_share(splits, config) if test else "")


def has_test_split(splits: "DatasetDict", config: TrainConfig) -> bool:
    """Whether the data have the held-out split of a configuration.

    Raises
    ------
    ConfigError
        When they lack it and it was asked for, or it is the one that is trained on; the default
        need not be there.
    """
    name, test = config.dataset_train_split, config.dataset_test_split
    if test and test in splits and test != name:
        return True
    if not test or not asks_for_test_split(config):
        return False
    if test == name:
        raise ConfigError(
            f"dataset_test_split and dataset_train_split are both {name!r}; name another split, or "
            "set dataset_test_split to null to hold out a share of that split (eval_size)."
        )
    raise ConfigError(
        f"{config.dataset_name} has no split {test!r}, only {', '.join(map(repr, splits))}; set "
        "dataset_test_split, or null to hold out a share of the training split (eval_size)."
        + suggest(test, splits)
    )


def asks_for_test_split(config: TrainConfig) -> bool:
    """Whether a configuration names the split to hold out, and not as the default does."""
    return config.dataset_test_split not in (None, "", _default("dataset_test_split"))


def _default(setting: str) -> Any:
    return TrainConfig.__dataclass_fields__[setting].default


def _said_of_size(config: TrainConfig) -> str:
    """Say that `eval_size` has no effect beside a split that is held out."""
    if config.eval_size == _default("eval_size"):
        return ""
    return (
        f"split {config.dataset_test_split!r} of {config.dataset_name} is held out, and eval_size "
        f"{config.eval_size:g} has no effect; set dataset_test_split to null to go by eval_size"
    )


def _said_of_share(splits: "DatasetDict", config: TrainConfig) -> str:
    """Say what is held out in the place of a split that the data lack."""
    size, name = config.eval_size, config.dataset_train_split
    share = f"{size:g} examples" if size >= 1 else f"{100 * size:g} %"
    lacking = f"has no split {config.dataset_test_split!r}"
    if config.dataset_test_split == name:
        lacking = f"trains on split {name!r}"
    other = next((s for s in splits if s != name and s.lower() in _HELD_OUT), None)
    advice = f"; it has split {other!r}: set dataset_test_split to {other}" if other else ""
    return (
        f"{config.dataset_name} {lacking}: {share} of split {name!r} (eval_size) are held out "
        f"instead{advice}"
    )
