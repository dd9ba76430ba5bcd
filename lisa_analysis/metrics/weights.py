"""Metrics of weights on disk: what training changed of them, and what they were before it.

Nothing of a run is needed but the files: an adapter, two checkpoints, a model alone.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics.log import Measurements
from lisa_analysis.metrics.registry import metric
from lisa_analysis.rundir.weights.adapter import Factors
from lisa_analysis.rundir.weights.changes import Changed
from lisa_analysis.rundir.weights.of_run import weights_of
from lisa_analysis.rundir.weights.spectra import cost, singular_values
from lisa_analysis.statistics.spectra import alpha_hill, effective_rank, snr

if TYPE_CHECKING:
    from lisa_analysis.rundir.run import Run

Array = NDArray[np.float64]

# Metrics that take the singular values of every matrix, and may take long.
OF_CHANGES = ("stable_rank", "effective_rank", "spectral_norm")
OF_BASE = ("spectrum_snr", "heavy_tail_alpha")
_STEP = dict[str, float]


@dataclass(eq=False)
class Weights:
    """Weights of a run and what was computed of them, each number once.

    Attributes
    ----------
    of
        param_id -> the weight and its change.
    layers
        The param_ids inside the stack: spectra are taken of these alone.
    """

    of: dict[int, Changed]
    layers: frozenset[int]
    squares: dict[str, dict[int, float]] = field(default_factory=dict)
    spectra: dict[str, dict[int, list[_STEP]]] = field(default_factory=dict)

    def sum_of_squares(self, what: str) -> dict[int, float]:
        """‖W_0‖² (``base``) or ‖ΔW‖² (``change``) of every weight."""
        if what not in self.squares:
            measure: Callable[[Changed], float] = (
                Changed.base_squares if what == "base" else Changed.squares
            )
            self.squares[what] = {number: measure(change) for number, change in self.of.items()}
        return self.squares[what]

    def figures(self, what: str) -> dict[int, list[_STEP]]:
        """What the singular values of every matrix in the layers say."""
        if what not in self.spectra:
            self.spectra[what] = {
                number: list(_figures(change, what))
                for number, change in self.of.items()
                if number in self.layers
            }
        return self.spectra[what]

    def work(self, what: str) -> float:
        """Operations that `figures` will take; 0 when it was asked before."""
        if what in self.spectra:
            return 0.0
        return float(sum(cost(m.shape) for number, change in self.of.items()
                         if number in self.layers for m in _matrices(change, what)))  # fmt: skip


def _figures(change: Changed, what: str) -> Iterator[_STEP]:
    """What the singular values of every matrix of a weight say, those too wide left out."""
    if what == "change" and isinstance(change.change, Factors):
        for values in change.change.singular_values():
            yield _of_change(values)
    for matrix in _matrices(change, what):
        found = singular_values(matrix)
        if found is not None and what == "base":
            yield {"snr": snr(found, *matrix.shape), "alpha": alpha_hill(found)}
        elif found is not None:
            yield _of_change(found)


def _matrices(change: Changed, what: str) -> list[Any]:
    known = change.before if what == "base" else change.change
    if len(change.shape) < 2 or known is None or isinstance(known, Factors):
        return []
    return list(known)


def _of_change(values: Array) -> _STEP:
    return {
        "squares": float(values @ values),
        "top": float(values.max()),
        "rank": effective_rank(values),
    }


_CACHE: weakref.WeakKeyDictionary[Any, Weights | LisaError] = weakref.WeakKeyDictionary()


def run_weights(run: "Run") -> Weights:
    """Weights behind a run, opened once.

    Raises
    ------
    LisaError
        When they cannot be found or read.
    """
    if run not in _CACHE:
        try:
            found = weights_of(run)
            frame = run.parameters
            inside = frame["param_id"][frame["layer"].notna()]
            _CACHE[run] = Weights(found, frozenset(int(number) for number in inside))
        except LisaError as error:
            _CACHE[run] = error
    kept = _CACHE[run]
    if isinstance(kept, LisaError):
        raise kept
    return kept


def change_norm(data: Measurements) -> Array:
    """‖ΔW‖ of every group, shape (groups,); NaN where none of its weights is known."""
    return np.sqrt(_total(data, run_weights(data.run).sum_of_squares("change")))


def norm_before(data: Measurements, *, changed: bool = False) -> Array:
    """‖W_0‖ of every group; of the weights alone whose change is known, if `changed`."""
    kept = run_weights(data.run)
    squares = kept.sum_of_squares("base")
    if changed:
        squares = {n: s for n, s in squares.items() if kept.of[n].change is not None}
    return np.sqrt(_total(data, squares))


@metric(
    "total",
    "‖ΔW‖, what training changed in all, from the weights before and after; of LoRA ‖s·BA‖ by r×r "
    "products.",
    needs=("weights.change",),
    rows="weights",
)
def delta_norm(data: Measurements) -> NDArray[Any]:
    """Size of the change."""
    return change_norm(data)[None]


@metric(
    "total",
    "Σ‖ΔW‖²/Σ‖ΔW‖₂² over the layer's matrices, with the spectral norm ‖·‖₂: how many directions "
    "the change has, by their size.",
    needs=("weights.change",),
    rows="weights",
)
def stable_rank(data: Measurements) -> NDArray[Any]:
    """Stable rank of the change."""
    figures = run_weights(data.run).figures("change")
    above = _total(data, {n: sum(f["squares"] for f in fs) for n, fs in figures.items() if fs})
    below = _total(data, {n: sum(f["top"] ** 2 for f in fs) for n, fs in figures.items() if fs})
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)[None]


@metric(
    "total",
    "exp of the entropy of σ_i/Σσ of the change (Roy & Vetterli 2007), mean over the layer's "
    "matrices: how many directions it has, counted evenly.",
    id="effective_rank",
    needs=("weights.change",),
    rows="weights",
)
def effective_rank_of_change(data: Measurements) -> NDArray[Any]:
    """Effective rank of the change."""
    return _mean(data, "change", "rank")


@metric(
    "total",
    "‖ΔW‖₂, the largest singular value of the change, of the layer's matrix that has the largest.",
    needs=("weights.change",),
    rows="weights",
)
def spectral_norm(data: Measurements) -> NDArray[Any]:
    """Spectral norm of the change."""
    groups = data.table.groups
    found = np.full(len(groups.names), np.nan)
    for number, figures in run_weights(data.run).figures("change").items():
        group = groups.of[number]
        if group >= 0:
            found[group] = np.fmax(found[group], max((f["top"] for f in figures), default=np.nan))
    return found[None]


@metric(
    "total",
    "What PEFT's initialisation gives ‖A‖² + ‖B‖² by formula (r/3 per linear map) over what they "
    "are: near 1 the adapter's own norm is how it was drawn, whatever the layer learned.",
    needs=("weights.adapter",),
    rows="weights",
)
def init_share(data: Measurements) -> NDArray[Any]:
    """Initialisation's share of an adapter's norm."""
    factors = {n: c.factors for n, c in run_weights(data.run).of.items() if c.factors is not None}
    start = _total(data, {n: f.initial_squares for n, f in factors.items()})
    now = _total(data, {n: f.squares for n, f in factors.items()})
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(now > 0, start / now, np.nan)[None]


@metric(
    "total",
    "Spectrum's SNR of the base weights (arXiv 2406.06623, its code): Σσ above over Σσ up to σ̂(1 + "
    "√β), over σ_max, with σ̂ = IQR(σ)/1.349 and β the shorter over the longer side; mean over the "
    "layer's matrices.",
    needs=("weights.base",),
    rows="weights",
)
def spectrum_snr(data: Measurements) -> NDArray[Any]:
    """Signal over noise of weights by the Marchenko–Pastur edge."""
    return _mean(data, "base", "snr")


@metric(
    "total",
    "Heavy-tail α of the base weights, 1 + n/Σ ln(λ_i/λ_min) over the larger half of the "
    "eigenvalues λ = σ² (Hill's estimator at the median, PL_Alpha_Hill of AlphaLoRA and "
    "TempBalance; not WeightWatcher's fitted cut); mean over the layer's matrices.",
    needs=("weights.base",),
    rows="weights",
)
def heavy_tail_alpha(data: Measurements) -> NDArray[Any]:
    """Exponent of the spectrum's tail."""
    return _mean(data, "base", "alpha")


@metric(
    "total",
    "‖W_0‖ of the layer's base weights.",
    needs=("weights.base",),
    rows="weights",
)
def base_norm(data: Measurements) -> NDArray[Any]:
    """Size of the weights before training."""
    return norm_before(data)[None]


@metric(
    "total",
    "Place in its stack, from 0 at the bottom to 1 at the top: what anyone could say unseen.",
    rows="weights",
)
def depth(data: Measurements) -> NDArray[Any]:
    """Relative depth."""
    groups = data.table.groups
    stacks = [str(layer.get("stack")) for layer in data.run.manifest["layers"]]
    place: list[float] = []
    for index, stack in enumerate(stacks):
        others = [i for i, other in enumerate(stacks) if other == stack]
        place.append(others.index(index) / max(len(others) - 1, 1))
    found = np.full(len(groups.names), np.nan)
    for column, layer in enumerate(groups.layer.tolist()):
        if layer >= 0:
            found[column] = place[layer]
    return found[None]


def _total(data: Measurements, values: dict[int, float]) -> Array:
    """Sum over the weights of every group that are known; NaN for a group without any."""
    groups = data.table.groups
    total, known = np.zeros(len(groups.names)), np.zeros(len(groups.names), dtype=bool)
    for number, value in values.items():
        group = groups.of[number]
        if group >= 0 and not np.isnan(value):
            total[group] += value
            known[group] = True
    return np.where(known, total, np.nan)


def _mean(data: Measurements, what: str, figure: str) -> NDArray[Any]:
    """Mean over the matrices of every group."""
    groups = data.table.groups
    found: dict[int, list[float]] = {}
    for number, figures in run_weights(data.run).figures(what).items():
        if groups.of[number] >= 0:
            found.setdefault(int(groups.of[number]), []).extend(f[figure] for f in figures)
    means = np.full(len(groups.names), np.nan)
    for group, values in found.items():
        known = [value for value in values if np.isfinite(value)]
        if known:
            means[group] = float(np.mean(known))
    return means[None]
