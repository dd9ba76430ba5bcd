"""What can be measured: one entry per measured column, read by everything else in this room.

An entry is a column of the contract (name, type, meaning, how it adds up, when it is measured)
and what the recorder alone needs: a function of one's own, or the option that turns it on. Those
that are built in follow from the columns, so that nothing can be forgotten here, nor how a sum
becomes the recorded number. No torch: `RecordConfig` asks which names there are.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_analysis.contract.schema import METRICS_TABLE, Column, FactTable, Moment


@dataclass(frozen=True)
class Quantity:
    """One measured number per tensor.

    Parameters
    ----------
    column
        Its column in the metrics table: name, type, meaning, how it adds up, and whether only a
        tensor that trains has it (``gradients`` and ``update``, and no other).
    when
        ``gradients``: before clipping, of the tensors that have a gradient; ``update``: after the
        optimizer step, of the same tensors; ``weights``: after a recorded step of those, and in
        each census of all tensors; ``census``: there alone; ``probe``: in measuring passes.
    measure
        Of a quantity of one's own, a function of one tensor (of a sharded one, of the part that
        this process holds) that returns a tensor of one element: of the gradient, of the weights
        before and after the update, or of the weights. It returns what adds up: for a norm
        (``adds="squares"``) the sum of squares, of which the root is recorded. Built-in ones are
        measured several at once, by the parts of `lisa_train.measure.step.step_measure`.
    option
        Field of `RecordConfig` that turns it on; None: it is named in `RecordConfig.quantities`.

    Notes
    -----
    Only what adds up over the pieces of a tensor, over tensors and processes can be recorded: a
    maximum cannot.

    Examples
    --------
    >>> from lisa_analysis.contract.schema import Column
    >>> zeros = Column(
    ...     "grad_zeros", "float32", True, "elements of the gradient that are exactly zero",
    ...     adds="values", of_training=True,
    ... )
    >>> quantity = Quantity(zeros, "gradients", lambda gradient: (gradient == 0).sum()).register()
    >>> quantity.name in REGISTRY
    True
    >>> REGISTRY.remove("grad_zeros")

    It is recorded by ``RecordConfig(quantities=(..., "grad_zeros"))``; a process that only reads
    the run adds the column by ``METRICS_TABLE.add(zeros)``.
    """

    column: Column
    when: Moment
    measure: Callable[..., Any] | None = None
    option: str | None = None

    def __post_init__(self) -> None:
        if self.when not in get_args(Moment):
            raise ConfigError(
                f"quantity {self.name!r} has when={self.when!r}: expected one of "
                f"{', '.join(get_args(Moment))}."
            )
        trains = self.when in ("gradients", "update")
        if trains != self.column.of_training:
            raise ConfigError(
                f"quantity {self.name!r} is measured at {self.when!r}: its column needs "
                f"of_training={trains}."
            )

    @property
    def name(self) -> str:
        """Name of the column."""
        return self.column.name

    def register(self) -> "Quantity":
        """Add a quantity of one's own to those that can be recorded, and its column to the table.

        Raises
        ------
        LisaError
            When it has no `measure`, is one of measuring passes, or has the name of a built-in.
        """
        if not callable(self.measure) or self.when == "probe" or self.option is not None:
            raise ConfigError(
                f"quantity {self.name!r} cannot be registered: give it a function `measure`, no "
                "option, and another moment than 'probe'."
            )
        METRICS_TABLE.add(self.column)
        REGISTRY._found[self.name] = self
        return self


# Those that are not named in `RecordConfig.quantities`: column -> field that turns it on.
_OPTIONS = {"grad_noise": "grad_noise", "probe_grad_norm": "probe_every"}


class Quantities(Mapping[str, Quantity]):
    """Quantities by name, in the order of the metrics table."""

    def __init__(self, table: FactTable) -> None:
        columns = [table[name] for name in table.measured]
        self._found = {
            # A column without a moment is refused there.
            c.name: Quantity(c, cast(Moment, c.when), option=_OPTIONS.get(c.name))
            for c in columns
        }

    def remove(self, name: str) -> None:
        """Take a quantity of one's own out again."""
        METRICS_TABLE.remove(name)
        del self._found[name]

    def choosable(self) -> tuple[str, ...]:
        """Names that `RecordConfig.quantities` may hold."""
        return tuple(name for name, quantity in self._found.items() if quantity.option is None)

    def __getitem__(self, name: str) -> Quantity:
        if name not in self._found:
            raise KeyError(
                f"there is no quantity {name!r}, only {', '.join(self._found)}."
                f"{suggest(name, self._found)}"
            )
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


REGISTRY = Quantities(METRICS_TABLE)
