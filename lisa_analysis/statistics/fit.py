"""What an average over time is, and how well it is known."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Parts:
    """The earlier and the later half of a run, shape (layers,) each, on the scale of the fit.

    `error` is the standard error of one half by what varies within the halves, `degrees` its
    degrees of freedom.
    """

    early: Array
    late: Array
    error: Array
    degrees: Array


@dataclass(frozen=True, eq=False)
class Fit:
    """Scores of the columns of a series.

    Attributes
    ----------
    score, low, high
        Shape (layers,); bounds are NaN where the data are insufficient, all NaN where a layer
        was never observed. A layer of `zero` has the score 0 and no bounds.
    effect
        Shape (layers,): the score on the scale of the fit (logarithm for `log`); NaN for `zero`.
    samples
        Shape (replicates, layers) on the scale of the fit, NaN for layers without an interval;
        None when no layer has one.
    noise
        Shape (replicates, layers): deviations of the samples from `effect`, there for every layer
        with a standard error; None otherwise.
    n_eff, rho, observations
        Shape (layers,).
    within
        Standard deviation over time of a layer about its effect, pooled over layers.
    blocks
        Shape (blocks, layers): means of the adjusted series over bootstrap blocks or periods.
    length
        Rows per block (1 for periods).
    halves
        Effects from odd and from even blocks, shape (2, layers), or None.
    zero
        Shape (layers,): observed, and exactly zero every time. No average of zeros says how the
        layer compares with others, so that it takes no part in the fit.
    zeros
        Shape (layers,): observations that were exactly zero. A logarithmic fit leaves them out;
        steps at which all layers are zero (learning rate 0) are not counted.
    joint_low, joint_high
        Shape (layers,): bounds that hold for all layers at once at the stated confidence (max-t).
    error, degrees
        Shape (layers,): standard error of `effect`, and its degrees of freedom.
    departs
        Shape (layers,): layers whose memory from step to step is another than the others'.
    slow
        Shape (layers,): share of the error that comes from courses slower than a fifth of the run.
    parts
        Both halves of the run, or None where the rows are no course in time.
    fresh
        Share of an observation's variance that the next one knows nothing of.
    over_depth
        `noise` with what neighbouring layers share: for courses over depth.
    adjusted_by_visits
        Whether layers were seen in periods only (LISA).
    passing
        Share of an observation's variance that is forgotten within a fifth of the run.
    widened
        Shape (layers,): times that a layer's error is larger where all layers are judged at once,
        for the slow courses that it shares with its neighbours in depth.
    """

    score: Array
    low: Array
    high: Array
    effect: Array
    samples: Array | None
    noise: Array | None
    n_eff: Array
    rho: Array
    observations: NDArray[np.int64]
    within: float
    blocks: Array
    length: int
    halves: Array | None
    log: bool
    adjusted: str
    zero: NDArray[np.bool_]
    zeros: NDArray[np.int64]
    joint_low: Array = field(default_factory=lambda: np.zeros(0))
    joint_high: Array = field(default_factory=lambda: np.zeros(0))
    error: Array = field(default_factory=lambda: np.zeros(0))
    degrees: Array = field(default_factory=lambda: np.zeros(0))
    departs: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    slow: Array = field(default_factory=lambda: np.zeros(0))
    parts: Parts | None = None
    fresh: float = 1.0
    over_depth: Array | None = None
    adjusted_by_visits: bool = False
    passing: float = 1.0
    widened: Array = field(default_factory=lambda: np.zeros(0))

    @property
    def seen(self) -> NDArray[np.bool_]:
        """Layers that were observed, and not as zero throughout."""
        return np.isfinite(self.effect)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Layers with an interval."""
        return np.isfinite(self.low) & np.isfinite(self.high) & self.seen

    def only(self, layers: NDArray[np.bool_]) -> "Fit":
        """Return the fit of some of the layers, as it came out among all."""
        kept: dict[str, Any] = {
            f.name: value[..., layers]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), np.ndarray) and value.shape[-1:] != (0,)
        }
        if self.parts is not None:
            halves = {f.name: getattr(self.parts, f.name)[layers] for f in fields(self.parts)}
            kept["parts"] = Parts(**halves)
        return replace(self, **kept)

    def scale(self, effects: Array) -> Array:
        """Back from the scale of the fit to that of the scores."""
        return np.exp(effects) if self.log else effects
