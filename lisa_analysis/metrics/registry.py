"""What a metric is, and the registry of them: `@metric` adds one, here or in a notebook."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError, suggest
from lisa_analysis.metrics.log import Measurements

Array = NDArray[np.float64]
# log: a geometric mean over steps; linear: an arithmetic mean; total: the state at the end.
Scale = Literal["log", "linear", "total"]
# The recorded optimizer steps, the measuring passes, the independent batches of a probe, the
# independent examples of an ablation, or a single look at weights on disk.
Rows = Literal["steps", "probes", "batches", "examples", "weights"]
Need = str | tuple[str, ...]
Subject = TypeVar("Subject", bound=Callable[..., Any])


@dataclass(frozen=True)
class AtStart:
    """What a metric was before training.

    Attributes
    ----------
    of
        What the metric looks at: ``weights`` or ``gradients`` (one noisy step, in which the
        embedding is of another size than the layers).
    scores
        Takes the measurements and the metric's values; returns one score per group, NaN where it
        was not measured.
    """

    of: Literal["weights", "gradients"]
    scores: Callable[[Measurements, NDArray[Any]], Array]


@dataclass(frozen=True)
class Metric:
    """One question that is put to the log of a run.

    Attributes
    ----------
    id, definition
        Its name, and one sentence that says what it is.
    scale
        ``log`` (a geometric mean over steps), ``linear`` (an arithmetic mean), or ``total`` (the
        state at the end).
    function
        Takes `Measurements` (and the other run, see `compares`); returns values of shape (rows,
        groups), NaN where a group was not observed.
    needs
        Columns that it reads; of a tuple of columns any one will do.
    at_start
        Its score at step 0, or None where it has none (nothing has changed at step 0).
    rows
        What its rows are: ``steps``, ``probes``, or independent repetitions, ``batches`` of a
        probe or ``examples`` of an ablation; of ``weights`` on disk there is one row.
    compares
        Whether it compares the run with another one.
    below_zero
        What a layer did whose score is below zero, where the metric can tell.
    levels
        Whether a linear metric's values are sizes, to be divided by what all layers share in size
        at a step. Pseudo-values, whose mean alone has a meaning, are not.
    reference
        The other run of a metric that compares.
    """

    id: str
    definition: str
    scale: Scale
    function: Callable[..., NDArray[Any]] = field(repr=False)
    needs: tuple[Need, ...] = ()
    at_start: AtStart | None = field(default=None, repr=False)
    rows: Rows = "steps"
    compares: bool = False
    below_zero: str = ""
    levels: bool = True
    reference: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, value, known in (("scale", self.scale, Scale), ("rows", self.rows, Rows)):
            if value not in get_args(known):
                raise LisaError(
                    f"importance metric {self.id!r} has {name} {value!r}: expected one of "
                    f"{', '.join(get_args(known))}."
                )

    @property
    def independent(self) -> bool:
        """Whether its rows are independent repetitions, not a course over time."""
        return self.rows in ("batches", "examples")

    @property
    def of_gradients(self) -> bool:
        """Whether it reads gradients, and so is zero where none arrives."""
        names = [name for need in self.needs for name in _either(need)]
        return any("grad_norm" in name for name in names)

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return values of shape (rows, groups); `KeyError` names a column that is missing."""
        for need in self.needs:
            if not any(data.has(name) for name in _either(need)):
                lacking = dict.fromkeys(data.lacks(name) for name in _either(need))
                raise KeyError("; ".join(lacking))
        found = self.function(data, self.reference) if self.compares else self.function(data)
        return np.asarray(found)


class UnknownMetricError(LisaError, KeyError):
    """There is no metric of this id."""

    def __str__(self) -> str:
        return str(self.args[0])


class Metrics(Mapping[str, Metric]):
    """Metrics by id. `register` adds one; an id that is unknown is an error with a suggestion.

    Of a metric over the batches of a probe, ``"grad_signal@0"`` is the one of the probe that was
    taken after 0 optimizer steps; without a step it is that of the newest probe.
    """

    def __init__(self) -> None:
        self._found: dict[str, Metric] = {}

    def register(self, metric: Metric) -> Metric:
        """Add a metric; one of your own may be registered again, a built-in may not be replaced.

        Raises
        ------
        LisaError
            When the id is that of a built-in.
        """
        before = self._found.get(metric.id)
        if before is not None and _module(before).startswith("lisa_analysis."):
            raise LisaError(f"importance metric {metric.id!r} is built in: give yours another id.")
        self._found[metric.id] = metric
        return metric

    def remove(self, metric: str) -> None:
        """Take a metric out again."""
        del self._found[self[metric].id]

    def __getitem__(self, metric: str) -> Metric:
        name, at, step = str(metric).partition("@")
        if at and name in self._found:
            return self._at_step(self._found[name], step)
        if metric not in self._found:
            raise UnknownMetricError(
                f"importance metric {metric!r} is unknown: choose one of "
                f"{', '.join(self._found)}.{suggest(str(metric), self._found)}"
            )
        return self._found[metric]

    def _at_step(self, metric: Metric, step: str) -> Metric:
        if metric.rows != "batches" or not step.isdecimal():
            probed = ", ".join(m.id for m in self._found.values() if m.rows == "batches")
            raise UnknownMetricError(
                f"importance metric '{metric.id}@{step}': a whole number of optimizer steps behind "
                f"the @ chooses the probe of {probed}, and of no other metric."
            )
        return dataclasses.replace(
            metric,
            id=f"{metric.id}@{int(step)}",
            definition=f"{metric.definition.rstrip('.')}; probed after {int(step)} steps.",
            function=functools.partial(metric.function, step=int(step)),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        width = max(map(len, self._found), default=0)
        return "\n".join(f"{name:<{width}}  {m.definition}" for name, m in self._found.items())


METRICS = Metrics()


def metric(
    scale: Scale,
    definition: str,
    *,
    id: str | None = None,
    needs: tuple[Need, ...] = (),
    at_start: AtStart | None = None,
    rows: Rows = "steps",
    compares: bool = False,
    below_zero: str = "",
    levels: bool = True,
) -> Callable[[Subject], Any]:
    """Make a function a metric and register it under its name, see `Metric`.

    A frozen dataclass with parameters can be decorated as well: it is registered with its
    defaults, and stays a class, so that ``importance(run, GradSnr(decay=0.9))`` works.

    Examples
    --------
    >>> @metric("log", "Geometric mean over steps of ‖g_t‖₁/N.", needs=("grad_norm_l1",))
    ... def mean_gradient(log):
    ...     return log.table["grad_norm_l1"] / log.table.numel
    >>> METRICS["mean_gradient"].scale
    'log'
    >>> METRICS.remove("mean_gradient")
    """

    def register(subject: Subject) -> Any:
        made = isinstance(subject, type)
        found = Metric(
            id or subject.__name__, definition, scale, subject() if made else subject, needs,
            at_start, rows, compares, below_zero, levels,
        )  # fmt: skip
        METRICS.register(found)
        if not made:
            return found
        for name in _OWN:
            setattr(subject, name, getattr(found, name))
        return subject

    return register


# What a class or object of one's own may say of itself.
_OWN = ("id", "definition", "scale", "needs", "at_start", "rows", "below_zero", "levels")


def find_metric(metric: Any, reference: Any = None) -> Metric:
    """Metric by id, or made of a callable.

    A callable is taken with the attributes of `Metric` that it has; a plain function goes by its
    name, the first line of its docstring, and the scale ``log``.

    Raises
    ------
    LisaError
        For an unknown id, what is no metric, one that compares two runs when `reference` is
        missing, or any other when it is given.
    """
    if isinstance(metric, str):
        found = METRICS[metric]
    elif isinstance(metric, Metric):
        found = metric
    elif callable(metric) and not isinstance(metric, type):
        name = metric_name(metric)
        first_line = (getattr(metric, "__doc__", None) or name).strip().split("\n")[0]
        told: dict[str, Any] = {"definition": first_line, "scale": "log"}
        told |= {key: getattr(metric, key) for key in _OWN if hasattr(metric, key)}
        found = Metric(**told | {"id": name, "function": metric})
    else:
        raise LisaError(
            f"importance takes one metric, an id or a function, got {_what(metric)}: choose one "
            f"of {', '.join(METRICS)}."
        )
    if reference is not None:
        if not found.compares:
            names = [name for name, known in METRICS.items() if known.compares]
            raise LisaError(
                f"importance metric {found.id!r} compares no two runs: leave reference= out, or "
                f"choose one of {', '.join(names)}."
            )
        return dataclasses.replace(found, reference=reference)
    if found.compares and found.reference is None:
        raise LisaError(
            f"importance metric {found.id!r} compares two runs: pass the full fine-tuning run as "
            "reference=."
        )
    return found


def metric_name(metric: Any) -> str:
    """Return the id of a metric; a plain function goes by its own name."""
    if isinstance(metric, str):
        return metric
    return str(getattr(metric, "id", getattr(metric, "__name__", type(metric).__name__)))


def _what(value: Any) -> str:
    name = value.__name__ if isinstance(value, type) else type(value).__name__
    return f"{'the class' if isinstance(value, type) else 'a value of type'} {name}"


def _either(need: Need) -> tuple[str, ...]:
    return (need,) if isinstance(need, str) else need


def _module(metric: Metric) -> str:
    subject = metric.function
    named = subject if hasattr(subject, "__qualname__") else type(subject)
    return cast(str, named.__module__)
