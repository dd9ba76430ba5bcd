"""Inclusion probabilities of layers: checked, freed of rounding, equal, or of a prior (numpy)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_analysis.plans.budget import allocate
from lisa_train.methods.lisa.config import SUM_TOLERANCE
from lisa_train.methods.lisa.learning.config import PRIORS

# Above this a layer is certain: in every draw.
CERTAIN = 1.0 - 1e-12


def check_probabilities(
    pi: ArrayLike, activated_layers: float, weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """Validate inclusion probabilities and remove the rounding from their sum.

    Parameters
    ----------
    pi
        Inclusion probabilities, shape (L,), 0 ≤ π ≤ 1, Σπ = k up to `SUM_TOLERANCE`; a layer with
        π = 0 is never drawn.
    activated_layers
        k, the number of layers of a draw.
    weights
        Sizes over their mean, shape (L,), where parts of layers are drawn: Σ π·weight = k then.

    Returns
    -------
    numpy.ndarray
        float64 of shape (L,): probabilities of 1 stay 1 (certain layers) and those of 0 stay 0, the
        others are scaled so that the sum is k to the last bit that floating point offers.

    Raises
    ------
    ProbabilitiesError
        When the vector is not one-dimensional, holds a value outside [0, 1], or does not sum to k.
    """
    values = np.array(pi, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ProbabilitiesError(
            f"inclusion probabilities must be a non-empty vector, got shape {values.shape}; give "
            "one number per layer."
        )
    bad = np.flatnonzero(~((values >= 0.0) & (values <= 1.0)))
    if bad.size:
        raise ProbabilitiesError(
            f"inclusion probability of layer {bad[0]} is {values[bad[0]]:g}, but every one must "
            "lie between 0 (the layer never trains) and 1; correct it or lower the cap."
        )
    size = np.ones(values.size) if weights is None else weights
    total = float((size * values).sum())
    if abs(total - activated_layers) > SUM_TOLERANCE:
        if weights is not None:
            raise ProbabilitiesError(
                f"inclusion probabilities train {total / values.size:.6g} of the layers' "
                f"parameters on average, but the budget is {activated_layers / values.size:.6g}: "
                "the sum of π times size must be the budget; scale them or set lisa.budget."
            )
        raise ProbabilitiesError(
            f"inclusion probabilities sum to {total:.6g}, but {activated_layers} layers are active "
            f"in each period: they must sum to {activated_layers}; scale them or set "
            "activated_layers to their sum."
        )
    certain = values >= CERTAIN
    values[certain] = 1.0
    rest = activated_layers - float(size[certain].sum())
    open_ = ~certain & (values > 0.0)
    if rest <= 1e-9 and open_.any():
        raise ProbabilitiesError(
            f"inclusion probabilities of 1 already fill all {activated_layers:g} places, so "
            f"{int(open_.sum())} layers with probabilities above 0 never train; lower some of the "
            "former, or set the latter to 0."
        )
    if open_.any():
        values[open_] *= rest / float((size * values)[open_].sum())
    return np.minimum(values, 1.0)


def equal_probabilities(layers: int, activated_layers: int) -> NDArray[np.float64]:
    """π = k/L for every layer; `ConfigError` unless 1 <= k <= L."""
    if not 1 <= activated_layers <= layers:
        raise ConfigError(
            f"activated_layers is {activated_layers}, but the model has {layers} layers; choose a "
            f"number from 1 to {layers}."
        )
    return np.full(layers, activated_layers / layers)


def resolve(
    pi: Sequence[float] | None,
    layers: int,
    k: float,
    weights: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """Inclusion probabilities of `layers` layers (or parts): the given ones, or equal ones."""
    equal = equal_probabilities(layers, int(k)) if weights is None else np.full(layers, k / layers)
    if pi is None:
        return equal
    if len(pi) != layers:
        what = "layers" if weights is None else "units (halves or modules)"
        raise ProbabilitiesError(
            f"{len(pi)} inclusion probabilities were given for a model of {layers} {what}; give "
            "one each."
        )
    return check_probabilities(pi, k, weights)


def prior_probabilities(
    prior: str | Sequence[float], layers: int, k: float, weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    """π of a prior that is one of `PRIORS` or one number per layer; shape (L,), Σπ = k.

    With the `weights` of halves or modules, Σ π·weight = k; they stand in the order of the layers.

    ``depth`` is LayerSkip's rule with half the layers' worth (arXiv 2404.16710):
    1 − (2^(l/(L−1)) − 1)/2, from 1 in the first layer to 1/2 in the last.
    """
    if isinstance(prior, str):
        assert prior in PRIORS, prior
        depth = np.arange(layers) / max(1, layers - 1)
        scores = 1.0 - (2.0**depth - 1.0) / 2.0 if prior == "depth" else np.ones(layers)
    else:
        scores = np.array(prior, dtype=np.float64)
        if scores.size != layers:
            raise ProbabilitiesError(
                f"lisa.learn.prior has {scores.size} numbers for a model of {layers} layers; give "
                "one per layer."
            )
    return allocate(scores / scores.max(), float(k), 0.0, 1.0, weights)
