"""Layer effects freed from what all layers share at a step, also when few layers are observed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Effects:
    """Least-squares fit of x[t, i] = layer[i] + common[t] + residual[t, i].

    Attributes
    ----------
    layer
        Shape (layers,): layer effects on the scale of the data (a weighted mean of the common
        part is added back); NaN for layers never observed.
    common
        Shape (n,): what all layers share at a step, mean zero.
    residuals
        Shape (n, layers); NaN where not observed.
    inverse
        Shape (layers, layers): maps a sum of residuals over time to a change of `layer`.
    adjusted
        How the common part was removed: ``"steps"`` (a mean per step), ``"trend"`` (a quadratic
        in time, when the layers are never observed together) or ``"none"``.
    """

    layer: Array
    common: Array
    residuals: Array
    inverse: Array
    adjusted: str


def additive_effects(values: NDArray[np.floating], *, remove_common: bool = True) -> Effects:
    """Separate layers from the course of training.

    With every layer observed at every step the effects are plain means over time. With few
    layers active at a time (LISA), plain means would credit a layer for having been drawn early,
    when gradients were large; here a layer is compared with those that were active beside it.

    Parameters
    ----------
    values
        Shape (n, layers), usually logarithms; NaN where a layer was not observed.
    remove_common
        False keeps what all layers share (signed quantities, where layers do not scale together).

    Returns
    -------
    Effects
        The step means are eliminated exactly: the normal equations of the layers are a weighted
        graph Laplacian, solved by its pseudo-inverse. When the layers' graph is not connected
        (k = 1, or too few draws) a quadratic trend in time takes the place of the step means.
    """
    values = np.asarray(values, dtype=np.float64)
    observed = np.isfinite(values)
    seen: NDArray[np.bool_] = np.asarray(observed.any(axis=0))
    mask = observed.astype(np.float64)
    filled = np.where(observed, values, 0.0)
    counts = mask.sum(axis=0)
    if not seen.any():
        empty = np.full(values.shape[1], np.nan)
        return Effects(
            empty, np.zeros(len(values)), np.full(values.shape, np.nan),
            np.zeros((len(empty),) * 2), "none",
        )  # fmt: skip
    if remove_common and seen.sum() > 1:
        together = mask / np.maximum(mask.sum(axis=1, keepdims=True), 1)
        laplacian = np.diag(counts) - mask.T @ together
        if _connected(laplacian, seen):
            return _by_steps(filled, mask, observed, together, laplacian)
        common = _trend(filled, mask)
        adjusted = "trend"
    else:
        common = np.zeros(len(values))
        adjusted = "none"
    centred = filled - mask * common[:, None]
    level = float((mask.sum(axis=1) @ common) / counts.sum())
    layer = centred.sum(axis=0) / np.maximum(counts, 1)
    residuals = np.where(observed, centred - layer, np.nan)
    inverse = np.diag(1 / np.maximum(counts, 1))
    return Effects(
        np.where(seen, layer + level, np.nan), common - level, residuals, inverse, adjusted
    )


def _connected(laplacian: Array, seen: NDArray[np.bool_]) -> bool:
    """Whether all observed layers were compared with each other, directly or through others."""
    linked = laplacian < 0
    reached = np.zeros(len(seen), dtype=bool)
    frontier = np.zeros(len(seen), dtype=bool)
    frontier[int(np.argmax(seen))] = True
    while frontier.any():
        reached |= frontier
        frontier = linked[frontier].any(axis=0) & ~reached
    return bool(reached[seen].all())


def _laplacian_inverse(laplacian: Array, seen: NDArray[np.bool_]) -> Array:
    """Pseudo-inverse of the Laplacian of a connected graph, zero for layers never observed.

    Its null space is known to be the constant vector; shifting that one eigenvalue avoids the
    choice of a cut-off, which rounding would decide.
    """
    part = laplacian[np.ix_(seen, seen)]
    n = len(part)
    constant = np.full((n, n), 1 / n)
    shift = float(np.trace(part)) / n
    inverse = np.zeros_like(laplacian)
    inverse[np.ix_(seen, seen)] = np.linalg.inv(part + shift * constant) - constant / shift
    return inverse


def _by_steps(
    filled: Array, mask: Array, observed: NDArray[np.bool_], together: Array, laplacian: Array
) -> Effects:
    """Eliminate a free mean per step."""
    seen: NDArray[np.bool_] = np.asarray(observed.any(axis=0))
    totals = filled.sum(axis=1)
    inverse = _laplacian_inverse(laplacian, seen)
    layer = inverse @ (filled.sum(axis=0) - together.T @ totals)
    layer -= layer[seen].mean()
    size = np.maximum(mask.sum(axis=1), 1)
    common = (totals - mask @ layer) / size
    recorded = observed.any(axis=1)
    # The level of a profile is that of the average recorded step, every step counting once.
    level = float(common[recorded].mean())
    residuals = np.where(observed, filled - layer - common[:, None], np.nan)
    return Effects(
        np.where(seen, layer + level, np.nan), common - level, residuals, inverse, "steps"
    )


def _trend(filled: Array, mask: Array) -> Array:
    """Quadratic in time, shape (n,), fitted together with one level per layer."""
    n = len(filled)
    time = np.linspace(-1.0, 1.0, n) if n > 1 else np.zeros(1)
    basis = np.stack([time, time**2], axis=1)
    counts = np.maximum(mask.sum(axis=0), 1)
    level = (mask.T @ basis) / counts[:, None]
    rows = mask.sum(axis=1)
    gram = basis.T @ (rows[:, None] * basis) - level.T @ (counts[:, None] * level)
    right = basis.T @ filled.sum(axis=1) - level.T @ filled.sum(axis=0)
    return np.asarray(basis @ (np.linalg.pinv(gram, hermitian=True) @ right))
