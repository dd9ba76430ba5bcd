"""What classifications share: labels, their names and numbers, the head for them, its scores."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.config import TrainConfig
from lisa_train.command.tasks.plain_trainer import TaskWithHead
from lisa_train.command.tasks.scores import class_scores
from lisa_train.command.tasks.splits import Part, place
from lisa_train.command.tasks.task import Loaded

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class TaskWithClasses(TaskWithHead):
    """A task whose head has a row for every class in training.

    Attributes
    ----------
    class_column
        Column of the data that holds the class of a row.
    several_classes
        A row holds a list of classes, and not one.
    learned
        Names of the classes that a trained model tells apart, where it is measured on other data;
        None finds them in the data.
    """

    class_column: ClassVar[str]
    several_classes: ClassVar[bool] = False
    learned: tuple[str, ...] | None = None

    def learned_classes(self, config: TrainConfig) -> tuple[str, ...]:
        """Return the classes of a finished run by its own data, in the order of their numbers."""
        train, held_out = self.parts(config)
        return self.classes(train, held_out, config).names

    def classes(self, train: Part, held_out: Part | None, config: TrainConfig) -> "Classes":
        """Find the classes of the training part, and check the labels of both parts."""
        if self.learned is not None:
            return numbered(
                train, self.class_column, self.learned, config,
                place=partial(place, config.dataset_name), several=self.several_classes,
            )  # fmt: skip
        source = self.source(config)
        return find_classes(
            train, held_out, self.class_column, source, config,
            trained_head=self.has_trained_head(source, config),
            place=partial(place, config.dataset_name), several=self.several_classes,
        )  # fmt: skip

    def load_classifier(
        self, classes: "Classes", config: TrainConfig
    ) -> tuple[Any, tuple[str, ...]]:
        """Load the model with a head for these classes; return it and the tensors that are new."""
        names = dict(enumerate(classes.names))
        return self.load_model(
            config,
            self.source(config),
            id2label=names,
            label2id={name: i for i, name in names.items()},
        )

    def scores(self, predicted: Any, labels: Any, loaded: Loaded) -> Mapping[str, float]:
        """Accuracy and macro-F1, over the labels that count."""
        return class_scores(predicted, labels)


@dataclass(frozen=True)
class Classes:
    """The classes of a task, in the order of their numbers.

    Attributes
    ----------
    names
        Name of every class.
    number
        Number of each value that a label may have in the data.
    said
        What a person should know of them.
    """

    names: tuple[str, ...]
    number: dict[Any, int]
    said: tuple[str, ...] = ()


def find_classes(
    train: Part,
    held_out: Part | None,
    column: str,
    source: "PretrainedConfig",
    config: TrainConfig,
    *,
    trained_head: bool,
    place: Callable[[Part, int], str],
    several: bool = False,
) -> Classes:
    """Find the classes of the training part, and check the labels of both parts.

    Parameters
    ----------
    train, held_out
        Parts of the data.
    column
        Column of the labels.
    source
        The model's configuration: the classes of a head that was trained already.
    config
        The run's settings.
    trained_head
        Whether the model comes with a head for the task.
    place
        Words for a row of a part.
    several
        A row holds a list of labels, and not one.

    Raises
    ------
    ConfigError
        For a label that is missing or is no class, for fewer than two classes, and for a held-out
        label that the training part does not have.
    """
    declared = _declared(train.dataset.features[column])
    counts = _counted(train, column, declared, place, several)
    values, names = _called(counts, declared)
    if len(counts) < 2:
        [only] = [names[values.index(v)] for v in counts] or ["none"]
        raise ConfigError(
            f"every training example of {config.dataset_name} has the one label {only!r} in column "
            f"{column!r}; a classification needs two or more."
        )
    if held_out is not None:
        called = dict(zip(values, names, strict=True))
        known = {value: called[value] for value in counts}
        for row, labels in enumerate(_listed(held_out.dataset[column], several)):
            for label in labels:
                _check_label(label, column, declared, place(held_out, row))
                _check_trained(label, known, called, place(held_out, row))
    said = []
    empty = [name for value, name in zip(values, names, strict=True) if value not in counts]
    if empty:
        said.append(
            f"no training example of {config.dataset_name} has the label {_listing(empty)}: the "
            "head has a row for it that only learns not to predict it"
        )
    own = [str(source.id2label[i]) for i in sorted(source.id2label)] if trained_head else []
    number = _rows_of_head(own, values, names, declared)
    if number is not None:
        return Classes(tuple(own), number, tuple(said))
    if trained_head:
        said.append(
            f"the head of {config.model_name_or_path} is for {_listing(own)} and the data are "
            f"labelled {_listing(names)}: the head starts anew"
        )
    return Classes(tuple(names), {value: i for i, value in enumerate(values)}, tuple(said))


def numbered(
    part: Part,
    column: str,
    learned: Sequence[str],
    config: TrainConfig,
    *,
    place: Callable[[Part, int], str],
    several: bool = False,
) -> Classes:
    """Number the labels of other data as the head of a trained model does.

    Parameters
    ----------
    part
        The data; not every class need be there.
    column
        Column of the labels.
    learned
        The classes of the head, in the order of their numbers.
    config
        The run's settings.
    place
        Words for a row of a part.
    several
        A row holds a list of labels, and not one.

    Raises
    ------
    ConfigError
        For a label that is missing, is no class, or is none of the head's.
    """
    declared = _declared(part.dataset.features[column])
    counts = _counted(part, column, declared, place, several)
    there = [pair for pair in zip(*_called(counts, declared), strict=True) if pair[0] in counts]
    values, names = [value for value, _ in there], [name for _, name in there]
    number = _rows_of_head(learned, values, names, declared)
    if number is None:
        other = [name for name in names if name not in learned]
        raise ConfigError(
            f"{config.dataset_name} is labelled {_listing(other)} in column {column!r}, which the "
            f"trained head does not know; its classes are {_listing(learned)}."
        )
    return Classes(tuple(learned), number)


def _counted(
    part: Part,
    column: str,
    declared: Sequence[str],
    place: Callable[[Part, int], str],
    several: bool,
) -> Counter[Any]:
    """How often each label occurs; every one is checked."""
    counts: Counter[Any] = Counter()
    for row, labels in enumerate(_listed(part.dataset[column], several)):
        for label in labels:
            _check_label(label, column, declared, place(part, row))
            counts[label] += 1
    return counts


def _called(counts: Counter[Any], declared: Sequence[str]) -> tuple[list[Any], list[str]]:
    """Labels in the order of their numbers, and their names."""
    values = list(range(len(declared))) if declared else sorted(counts, key=_order)
    return values, list(declared) if declared else [str(value) for value in values]


def _rows_of_head(
    own: Sequence[str], values: Sequence[Any], names: Sequence[str], declared: Sequence[str]
) -> dict[Any, int] | None:
    """Row of each value in a trained head, whose classes are `own`; None if it is no match."""
    if set(names) <= set(own):
        return {value: own.index(name) for value, name in zip(values, names, strict=True)}
    if not declared and own and all(v in range(len(own)) for v in values):
        return {value: int(value) for value in values}
    return None


def _declared(feature: Any) -> list[str]:
    """Names of the classes, where the data set declares them."""
    while not hasattr(feature, "names") and hasattr(feature, "feature"):
        feature = feature.feature
    return list(getattr(feature, "names", None) or [])


def _listed(column: Iterable[Any], several: bool) -> Iterable[Sequence[Any]]:
    return column if several else ([value] for value in column)


def _check_label(label: Any, column: str, declared: Sequence[str], where: str) -> None:
    if isinstance(label, bool | str) or (isinstance(label, int) and not declared):
        if label != "":
            return
    elif isinstance(label, int) and 0 <= label < len(declared):
        return
    if label is None or label == "" or (isinstance(label, int) and label < 0):
        raise ConfigError(
            f"{where}: column {column!r} holds no label ({label!r}); label the row or leave it out."
        )
    raise ConfigError(
        f"{where}: column {column!r} holds {label!r}, which is no class; expected a name or a "
        f"whole number{f' below {len(declared)}' if declared else ''}."
    )


def _check_trained(
    label: Any, known: Mapping[Any, str], called: Mapping[Any, str], where: str
) -> None:
    """Refuse a held-out label that no training example has; `called` are all, by their names."""
    if label not in known:
        raise ConfigError(
            f"{where}: label {called.get(label, label)!r} has no training example, so that "
            "nothing can predict it; give it some, or leave such rows out (the labels "
            f"in training are {_listing([*known.values()])})."
        )


def _order(value: Any) -> tuple[str, Any]:
    return (type(value).__name__, value)


def _listing(names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(str(name)) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
