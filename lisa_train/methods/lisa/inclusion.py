"""Inclusion probabilities of layers: checked, freed of rounding, or equal (numpy)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_train.methods.lisa.config import SUM_TOLERANCE

# Above this a layer is certain: in every draw.
CERTAIN = 1.0 - 1e-12


def check_probabilities(pi: ArrayLike, activated_layers: int) -> NDArray[np.float64]:
    """Validate inclusion probabilities and remove the rounding from their sum.

    Parameters
    ----------
    pi
        Inclusion probabilities, shape (L,), 0 ≤ π ≤ 1, Σπ = k up to `SUM_TOLERANCE`; a layer with
        π = 0 is never drawn.
    activated_layers
        k, the number of layers of a draw.

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
    total = float(values.sum())
    if abs(total - activated_layers) > SUM_TOLERANCE:
        raise ProbabilitiesError(
            f"inclusion probabilities sum to {total:.6g}, but {activated_layers} layers are active "
            f"in each interval: they must sum to {activated_layers}; scale them or set "
            "activated_layers to their sum."
        )
    certain = values >= CERTAIN
    values[certain] = 1.0
    rest = activated_layers - int(certain.sum())
    open_ = ~certain & (values > 0.0)
    if rest == 0 and open_.any():
        raise ProbabilitiesError(
            f"inclusion probabilities of 1 already fill all {activated_layers} places, so "
            f"{int(open_.sum())} layers with probabilities above 0 never train; lower some of the "
            "former, or set the latter to 0."
        )
    values[open_] *= rest / values[open_].sum() if rest else 1.0
    return np.minimum(values, 1.0)


def equal_probabilities(layers: int, activated_layers: int) -> NDArray[np.float64]:
    """π = k/L for every layer; `ConfigError` unless 1 <= k <= L."""
    if not 1 <= activated_layers <= layers:
        raise ConfigError(
            f"activated_layers is {activated_layers}, but the model has {layers} layers; choose a "
            f"number from 1 to {layers}."
        )
    return np.full(layers, activated_layers / layers)


def resolve(pi: Sequence[float] | None, layers: int, k: int) -> NDArray[np.float64]:
    """Inclusion probabilities of `layers` layers: the given ones, or equal ones."""
    equal = equal_probabilities(layers, k)
    if pi is None:
        return equal
    if len(pi) != layers:
        raise ProbabilitiesError(
            f"{len(pi)} inclusion probabilities were given for a model of {layers} layers; give "
            "one per layer."
        )
    return check_probabilities(pi, k)
