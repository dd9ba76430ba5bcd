"""What an ablation says, in numbers with their precision: gain, worth and forgetting per unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_train.measure.ablation.file import AblationFile, Key
from lisa_train.measure.ablation.units import AblatedUnit

_95 = 1.959964


@dataclass(frozen=True)
class Effect:
    """A difference of two losses in nats per label, over the same examples.

    Attributes
    ----------
    value
        Σ differences / Σ labels.
    margin
        Half of its 95 % interval, over examples: they are a sample of all that could come, and
        both losses are of the same ones (ratio estimator, linearised).
    """

    value: float
    margin: float

    @property
    def above_zero(self) -> bool:
        """Whether the interval lies above zero."""
        return self.low > 0

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value - self.margin

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value + self.margin

    def __str__(self) -> str:
        return f"{self.value:+.4f} ± {self.margin:.4f}"


def effect(
    after: NDArray[np.float64], before: NDArray[np.float64], tokens: NDArray[np.integer[Any]]
) -> Effect:
    """Return `after` − `before` per label; both are sums over the labels of every example."""
    difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    labels = np.asarray(tokens, np.float64)
    value = float(difference.sum() / labels.sum())
    count = len(labels)
    if count < 2:
        return Effect(value, float("nan"))
    residuals = difference - value * labels
    error = np.sqrt(count / (count - 1) * np.square(residuals).sum()) / labels.sum()
    return Effect(value, float(_95 * error))


@dataclass(frozen=True)
class UnitEffects:
    """What one unit's change was worth.

    Attributes
    ----------
    unit
        The unit.
    reset
        Held-out loss without its change, minus that of the trained model: what it is worth where
        all the others are there.
    keep
        Held-out loss of the base, minus that with its change alone.
    forgetting
        General loss of the trained model, minus that without its change; None where no general
        text was measured.
    """

    unit: AblatedUnit
    reset: Effect
    keep: Effect
    forgetting: Effect | None

    @property
    def costs_without_gain(self) -> bool:
        """Whether it surely costs on general text, more than it can help on held-out examples.

        The interval of what it forgets lies above zero and above that of what it is missed for,
        which reaches zero: with few examples less is proposed, not more.
        """
        forgets = self.forgetting
        return (
            forgets is not None
            and not self.reset.above_zero
            and forgets.above_zero
            and forgets.low > self.reset.high
        )


@dataclass(frozen=True)
class Summary:
    """What an ablation found.

    Attributes
    ----------
    losses
        Mean loss per label of the base and of the trained model, by data.
    gain
        Held-out loss of the base minus that of the trained model.
    forgetting
        General loss of the trained model minus that of the base; None without general text.
    units
        Unit by unit.
    data
        What was measured, as in the file's metadata.
    """

    losses: Mapping[str, tuple[float, float]]
    gain: Effect
    forgetting: Effect | None
    units: tuple[UnitEffects, ...]
    data: Mapping[str, Mapping[str, Any]]

    @property
    def proposed(self) -> tuple[str, ...]:
        """Layers that could be put back: each surely costs more than it can help."""
        return tuple(
            u.unit.name
            for u in self.units
            if u.costs_without_gain and u.unit.kind is None and "-" not in u.unit.name
        )

    @property
    def precision(self) -> float:
        """Half of the 95 % interval of a unit's reset, the median over units that changed."""
        margins = [u.reset.margin for u in self.units if u.unit.parts]
        return float(np.median(margins)) if margins else float("nan")


def summarize(file: AblationFile, units: Sequence[AblatedUnit]) -> Summary:
    """Return what a file says of some units."""
    general = "general" in file.tokens and Key(None, None, "base", "general") in file.losses

    def of(mode: str, data: str, unit: AblatedUnit | None = None) -> NDArray[np.float64]:
        name, kind = (None, None) if unit is None else (unit.name, unit.kind)
        return np.asarray(file.losses[Key(name, kind, mode, data)].data)

    def between(data: str, after: NDArray[np.float64], before: NDArray[np.float64]) -> Effect:
        return effect(after, before, file.tokens[data])

    rows = []
    for unit in units:
        forgetting = None
        if general and Key(unit.name, unit.kind, "reset", "general") in file.losses:
            after = of("trained", "general")
            forgetting = between("general", after, of("reset", "general", unit))
        reset = between("held_out", of("reset", "held_out", unit), of("trained", "held_out"))
        keep = between("held_out", of("base", "held_out"), of("keep", "held_out", unit))
        rows.append(UnitEffects(unit, reset, keep, forgetting))
    names = ["held_out", *(["general"] if general else [])]
    losses = {
        name: (
            float(of("base", name).sum() / file.tokens[name].sum()),
            float(of("trained", name).sum() / file.tokens[name].sum()),
        )
        for name in names
    }
    gain = between("held_out", of("base", "held_out"), of("trained", "held_out"))
    forgetting = (
        between("general", of("trained", "general"), of("base", "general")) if general else None
    )
    return Summary(losses, gain, forgetting, tuple(rows), file.about["data"])
