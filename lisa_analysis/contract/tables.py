"""What a table of the contract is: columns that say how they add up (stdlib only)."""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from lisa_analysis.contract.errors import LisaError

ColumnType = Literal["int64", "int32", "int16", "float32", "float64", "string", "bool"]
# How the numbers of disjoint tensors, or of the pieces of one, make the number of them together:
# their squares add (norms), they add, or each is a copy of the same number (a count of steps).
Adds = Literal["squares", "values", "copies"]
# When a number is measured: on the accumulated gradients, before clipping; on what the optimizer
# did to the weights; on weights, at recorded steps and in each census; in each census alone
# (start, checkpoints, end); in a measuring pass.
Moment = Literal["gradients", "update", "weights", "census", "probe"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Attributes
    ----------
    name, type, nullable, meaning
        Its name, storage type, whether null is allowed, and what it says.
    adds
        Of a measured column, how it adds up: ``squares``, ``values`` or ``copies``. The recorder
        merges processes by it, the analysis sums tensors to layers.
    signed
        Whether a number below zero means something; else it is damage, and read as null.
    when
        Of a built-in measured column, the moment at which it is measured.
    of_training
        Whether only a tensor that trains in the step has it: a row with such a number is one of
        training, a row without any is a census. Follows from `when`, where that is given: true of
        ``gradients`` and ``update``.
    """

    name: str
    type: ColumnType
    nullable: bool
    meaning: str
    adds: Adds | None = None
    signed: bool = False
    of_training: bool = False
    when: Moment | None = None

    def __post_init__(self) -> None:
        if self.when is not None:
            object.__setattr__(self, "of_training", self.when in ("gradients", "update"))


@dataclass(frozen=True, slots=True)
class Table:
    """A named set of columns with the file (or folder) that holds it."""

    name: str
    file: str
    meaning: str
    columns: tuple[Column, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Column names in storage order."""
        return tuple(column.name for column in self.columns)

    def __getitem__(self, name: str) -> Column:
        """Return the column called `name`; `KeyError` when there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(name)


@dataclass(frozen=True)
class FactTable(Table):
    """The table of measured numbers: every column but the keys says how it adds up.

    A column of one's own can be added (`lisa_train.Quantity` does): the writer and the reader of
    this process know it from then on. Another process that reads such a run adds it as well;
    without it the column is passed over.
    """

    KEYS: ClassVar[tuple[str, ...]] = ("step", "param_id")
    _own: tuple[str, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        for name in self.measured:
            _check_measured(self[name])

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the columns that are measured, all but the keys."""
        return tuple(name for name in self.names if name not in self.KEYS)

    def add(self, column: Column) -> Column:
        """Add a column of one's own; one that was added before may be added anew.

        Raises
        ------
        LisaError
            When a built-in column has the name, or the column does not say how it adds up.
        """
        _check_measured(column)
        if column.name in self._own:
            self.remove(column.name)
        elif column.name in self.names:
            raise LisaError(f"metrics column {column.name!r} is built in: choose another name.")
        self._set((*self.columns, column), (*self._own, column.name))
        return column

    def remove(self, name: str) -> None:
        """Take a column of one's own out again."""
        if name not in self._own:
            raise LisaError(f"metrics column {name!r} is none that was added.")
        columns = tuple(column for column in self.columns if column.name != name)
        self._set(columns, tuple(own for own in self._own if own != name))

    def _set(self, columns: tuple[Column, ...], own: tuple[str, ...]) -> None:
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "_own", own)


def _check_measured(column: Column) -> None:
    """Refuse a measured column that leaves open how it is stored or adds up."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", column.name):
        raise LisaError(
            f"metrics column {column.name!r}: give a name of small letters, digits and underscores."
        )
    if column.adds not in get_args(Adds):
        raise LisaError(
            f"metrics column {column.name!r} has adds={column.adds!r}: say how its numbers add up "
            f"over tensors and processes, one of {', '.join(get_args(Adds))}."
        )
    kind = "int32" if column.adds == "copies" else "float32"
    if column.type != kind or not column.nullable:
        raise LisaError(
            f"metrics column {column.name!r} with adds={column.adds!r} has to be nullable and of "
            f"type {kind}."
        )
    if column.signed and column.adds != "values":
        raise LisaError(f"metrics column {column.name!r}: only what adds as values can be signed.")


def to_markdown(table: Table) -> str:
    """Write a table's columns as Markdown, as README.md shows them."""
    lines = ["| column | type | null | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{c.name}` | {c.type} | {'yes' if c.nullable else 'no'} | {c.meaning} |"
        for c in table.columns
    ]
    return "\n".join(lines)
