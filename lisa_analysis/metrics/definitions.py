"""Importance metrics: small callables, each with an id and one sentence that defines it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError, suggest
from lisa_analysis.metrics.log import Measurements
from lisa_analysis.metrics.series import (
    growth_exponent,
    mean_over_steps,
    ratio,
    root,
    running_mean,
    without_common_course,
)
from lisa_analysis.metrics.step_table import StepTable, step_table

Array = NDArray[np.float64]
# log: a geometric mean over steps; linear: an arithmetic mean; total: the state at the end.
Scale = Literal["log", "linear", "total"]


class Metric(Protocol):
    """Anything with an id, a definition, a scale, and a call that gives values per step."""

    id: ClassVar[str]
    definition: ClassVar[str]
    scale: ClassVar[Scale]

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return values of shape (n, groups), NaN where a group was not observed."""


@dataclass(frozen=True)
class WeightNorm:
    """The paper's statistic."""

    id: ClassVar[str] = "weight_norm"
    definition: ClassVar[str] = (
        "Mean over steps of the norm of the trained tensors, (1/T) Σ_t ‖θ_t‖ (the LISA paper's "
        "w(ℓ)); for LoRA these are the raw A and B."
    )
    scale: ClassVar[Scale] = "linear"

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per recorded step and group."""
        return data.table["weight_norm"]


@dataclass(frozen=True)
class GradRms:
    """Gradient per element, the closest to published layer probes (GRASS)."""

    id: ClassVar[str] = "grad_rms"
    definition: ClassVar[str] = (
        "Geometric mean over steps of ‖g_t‖/√N, the root mean square of the gradient before "
        "clipping."
    )
    scale: ClassVar[Scale] = "log"

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per recorded step and group."""
        return data.table["grad_norm"] / root(data.table.numel)


@dataclass(frozen=True)
class ProbeRms:
    """Gradient per element in passes that see all layers, frozen ones too."""

    id: ClassVar[str] = "probe_rms"
    definition: ClassVar[str] = (
        "Geometric mean over measuring passes of ‖g‖/√N with all layers unfrozen: comparable "
        "between layers however a LISA run drew them (record.probe_every)."
    )
    scale: ClassVar[Scale] = "log"
    rows: ClassVar[str] = "probes"

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per measuring pass and group."""
        if not len(data.table.probe_steps):
            raise KeyError("probe_grad_norm was not recorded")
        return data.table.probe / root(data.all_numel)


@dataclass(frozen=True)
class L1Descent:
    """First-order loss decrease under Adam's sign-like step."""

    id: ClassVar[str] = "l1_descent"
    definition: ClassVar[str] = (
        "Geometric mean over steps of η_t‖g_t‖₁, the first-order loss decrease of a sign-like "
        "(Adam) step; √(2N/π)‖g_t‖ stands in for ‖g_t‖₁ where that was not recorded."
    )
    scale: ClassVar[Scale] = "log"

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per recorded step and group."""
        table = data.table
        if "grad_norm_l1" in table:
            norm = table["grad_norm_l1"]
        else:
            norm = table["grad_norm"] * root(2 * table.numel / np.pi)
        # A profile compares layers: without a logged rate the common factor is left out.
        rate = np.where(np.isfinite(data.learning_rate), data.learning_rate, np.nan)
        if not np.isfinite(rate).any():
            return norm
        return norm * rate[:, None].astype(np.float32)


@dataclass(frozen=True)
class Descent:
    """Measured first-order loss decrease; may be negative."""

    id: ClassVar[str] = "descent"
    definition: ClassVar[str] = (
        "Mean over steps of −⟨g_t, θ_{t+1} − θ_t⟩, the loss decrease that the realised step "
        "predicts; negative where a layer moved against its gradient."
    )
    scale: ClassVar[Scale] = "linear"

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per recorded step and group."""
        return data.table["descent"]


@dataclass(frozen=True)
class UpdateNorm:
    """Size of the realised step."""

    id: ClassVar[str] = "update_norm"
    definition: ClassVar[str] = (
        "Geometric mean over steps of ‖θ_{t+1} − θ_t‖, the step as realised in the stored "
        "precision."
    )
    scale: ClassVar[Scale] = "log"

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per recorded step and group."""
        return data.table["update_norm"]


@dataclass(frozen=True)
class UpdateRatio:
    """Relative size of the realised step (LARS, LAMB)."""

    id: ClassVar[str] = "update_ratio"
    definition: ClassVar[str] = (
        "Geometric mean over steps of ‖θ_{t+1} − θ_t‖/‖θ_{t+1}‖; under Adam close to lr·√N/‖θ‖, "
        "so mostly a statement about ‖θ‖."
    )
    scale: ClassVar[Scale] = "log"

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per recorded step and group."""
        return ratio(data.table["update_norm"], data.table["weight_norm"])


@dataclass(frozen=True)
class DeltaRel:
    """Relative change of the weights per activation."""

    id: ClassVar[str] = "delta_rel"
    definition: ClassVar[str] = (
        "‖ΔW‖/‖W_0‖ at the end of the run, with LISA divided by the layer's activations, weighted "
        "by their learning rates, to the power at which this run's changes grew with them "
        "(1 directed, ½ random)."
    )
    scale: ClassVar[Scale] = "total"

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per recorded step and group."""
        table = data.table
        relative = _at_the_end(data, _final_delta(data) / table.initial_base)
        if data.interval is None or not len(relative):
            return relative
        power = 1.0
        if "delta_norm" in table:
            power = growth_exponent(
                table["delta_norm"], data.exposure(), data.interval, table.groups.inside
            )
        exposure = data.exposure(power)
        return relative / np.where(exposure > 0, exposure, 1.0)


@dataclass(frozen=True)
class Directedness:
    """Net movement compared with a random walk of the same steps."""

    id: ClassVar[str] = "directedness"
    definition: ClassVar[str] = (
        "√n · ‖W_T − W_0‖ / Σ_t ‖θ_{t+1} − θ_t‖: 1 for a random walk, √n for a straight line, "
        "matched to the median n where layers trained for different numbers of steps; unrecorded "
        "steps count as average ones."
    )
    scale: ClassVar[Scale] = "total"

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per recorded step and group."""
        update = data.table["update_norm"]
        if not len(update):
            return update
        measured = np.isfinite(update)
        path = np.where(measured, update, 0).sum(axis=0, dtype=np.float64)
        n = data.active_steps[-1].astype(np.float64)
        path *= n / np.maximum(measured.sum(axis=0), 1)
        share = ratio(_final_delta(data), path) ** 2
        seen = np.isfinite(share[: data.table.groups.inside])
        common = float(np.median(n[: len(seen)][seen])) if seen.any() else 1.0
        # Steps of drift m and spread 1 give share = (m² + 1/n)/(1 + m²); the same m at `common`.
        steps = np.where(n > 1, n, np.nan)
        matched = (share * (common - 1) + 1 - common / steps) / (1 - 1 / steps)
        return _at_the_end(data, np.sqrt(np.maximum(matched, 0)))


@dataclass(frozen=True)
class GradSnr:
    """Gradient signal-to-noise from norms alone (after AdaLoRA)."""

    decay: float = 0.85
    id: ClassVar[str] = "grad_snr"
    definition: ClassVar[str] = (
        "Geometric mean over steps of Ī/Ū, the running mean of ‖g_t‖ freed from the course that "
        "all layers share, over the running mean of its absolute deviation (decay 0.85 per active "
        "step): steady gradients score high."
    )
    scale: ClassVar[Scale] = "log"

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per recorded step and group."""
        norms = without_common_course(data.table["grad_norm"], data.table.groups.inside)
        result = np.full(norms.shape, np.nan, dtype=np.float32)
        # Averages start at 0; what they lack at each age is known.
        filling = 1 - self.decay ** np.arange(1, len(norms) + 1)
        for column in range(norms.shape[1]):
            rows = np.flatnonzero(np.isfinite(norms[:, column]))
            values, age = norms[rows, column], np.arange(1, len(rows) + 1)
            filled = filling[: len(rows)]
            mean = running_mean(values, self.decay) / filled
            deviation = running_mean(np.abs(values - mean), self.decay) / filled
            # Until both averages have filled up the ratio says when the layer was first seen; a
            # deviation of the size of rounding says nothing.
            ready = (age > 2 / (1 - self.decay) + 1) & (deviation > 1e-6 * mean)
            result[rows[ready], column] = mean[ready] / deviation[ready]
        return result


@dataclass(frozen=True)
class LisaRatio:
    """The paper's sampling statistic from a LoRA and a full fine-tuning run, as printed."""

    reference: Any = field(repr=False)
    id: ClassVar[str] = "lisa_ratio"
    definition: ClassVar[str] = (
        "w_LoRA(ℓ)/w_FT(ℓ), the LISA paper's p(ℓ) as printed: mean raw adapter norm of this run "
        "over mean weight norm of the full fine-tuning run given as reference."
    )
    scale: ClassVar[Scale] = "linear"

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per recorded step and group."""
        other = _partner(data, self.reference)
        with np.errstate(invalid="ignore"):
            full = mean_over_steps(other["weight_norm"])
        return data.table["weight_norm"] / full.astype(np.float32)


@dataclass(frozen=True)
class LisaDeltaRatio:
    """The repaired form of the paper's statistic."""

    reference: Any = field(repr=False)
    id: ClassVar[str] = "lisa_delta_ratio"
    definition: ClassVar[str] = (
        "‖(α/r)BA‖/‖ΔW_FT‖ at the end of both runs: what the adapters changed over what full "
        "fine-tuning, given as reference, changed."
    )
    scale: ClassVar[Scale] = "total"

    def __call__(self, data: Measurements) -> NDArray[Any]:
        """Return one value per recorded step and group."""
        other = _partner(data, self.reference)
        if np.isnan(other.final_delta).all():
            raise KeyError(f"delta_norm was not recorded in {self.reference.run_id}")
        return _at_the_end(data, _final_delta(data) / other.final_delta)


METRICS: dict[str, Callable[..., Metric]] = {
    cls.id: cls
    for cls in (
        UpdateNorm,
        GradRms,
        ProbeRms,
        L1Descent,
        Descent,
        DeltaRel,
        UpdateRatio,
        Directedness,
        GradSnr,
        WeightNorm,
        LisaRatio,
        LisaDeltaRatio,
    )
}
_TWO_RUNS = (LisaRatio.id, LisaDeltaRatio.id)


def find_metric(metric: str | Metric, reference: Any = None) -> Metric:
    """Metric by id, or the callable itself.

    Raises
    ------
    LisaError
        For an unknown id, or one that compares two runs when `reference` is missing.
    """
    if not isinstance(metric, str):
        return metric
    if metric not in METRICS:
        raise LisaError(
            f"importance metric {metric!r} is unknown: choose one of {', '.join(METRICS)}."
            f"{suggest(metric, METRICS)}"
        )
    if metric not in _TWO_RUNS:
        return METRICS[metric]()
    if reference is None:
        raise LisaError(
            f"importance metric {metric!r} compares two runs: pass the full fine-tuning run as "
            "reference=."
        )
    return METRICS[metric](reference)


def metric_name(metric: Any) -> str:
    """Return the id of a metric; a plain function goes by its own name."""
    if isinstance(metric, str):
        return metric
    return str(getattr(metric, "id", getattr(metric, "__name__", type(metric).__name__)))


def _partner(data: Measurements, reference: Any) -> StepTable:
    """Table of the other run, its columns in the order of this run's groups."""
    own = data.table.groups
    other = step_table(reference, own.level)
    if other.groups.names[: other.groups.inside] != own.names[: own.inside]:
        raise LisaError(
            f"runs {data.run.run_id} and {reference.run_id} have different layers "
            f"({own.inside} and {other.groups.inside}): compare runs of one model."
        )
    order = [
        other.groups.names.index(name) if name in other.groups.names else -1 for name in own.names
    ]
    reordered = {
        column: np.where(np.array(order) >= 0, values[:, order], np.nan)
        for column, values in other.measures.items()
    }
    delta = np.where(np.array(order) >= 0, other.final_delta[order], np.nan)
    return dataclasses.replace(other, groups=own, measures=reordered, final_delta=delta)


def _final_delta(data: Measurements) -> Array:
    """‖W_T − W_0‖ of every group; `KeyError` when no step and no census measured it."""
    if np.isnan(data.table.final_delta).all():
        raise KeyError("delta_norm was not recorded (for weights, record.base_delta)")
    return data.table.final_delta


def _at_the_end(data: Measurements, values: Array) -> NDArray[Any]:
    """Values of the end of the run as a series that knows nothing before it."""
    series = np.full(data.table.trained.shape, np.nan, dtype=np.float32)
    series[-1:] = values
    return series
