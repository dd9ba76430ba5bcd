"""What independent batches agree on: signal ‖E g‖² and noise tr Σ, with intervals (numpy only).

Of N independent batch gradients g_b at fixed weights, ‖g_b‖² has the mean ‖E g‖² + tr Σ: a small
batch makes up most of it. Products of different batches have the mean ‖E g‖² alone. With
a_b = ⟨g_b, mean of the others⟩ the average of a_b over the batches is the U-statistic

    U = 2 / (N (N − 1)) Σ_{b<c} ⟨g_b, g_c⟩,

unbiased for ‖E g‖² (McCandlish et al., arXiv 1812.06162, appendix A, use two batch sizes for the
same quantity). Everything here is additive over tensors, so that a layer's numbers are sums.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.statistics.bootstrap import t_quantile

Array = NDArray[np.float64]

# Two batches give one product, and no idea of how it would vary.
MIN_BATCHES = 3


@dataclass(frozen=True)
class Signal:
    """Signal and noise of the columns of a probe.

    Attributes
    ----------
    signal, noise
        Shape (columns,): unbiased ‖E g‖² and tr Σ of one batch. A signal below zero is a small
        one: the estimate is unbiased, not positive.
    error
        Shape (columns,): jackknife standard error of `signal`; NaN below three batches. Where
        there is no signal at all it is 1.4 times too large, never too small.
    low, high
        Shape (columns,): bounds of `signal` by Student's t with N − 1 degrees of freedom.
    values
        Shape (batches, columns): the jackknife's pseudo-values, independent repetitions of which
        `signal` is the mean.
    """

    signal: Array
    noise: Array
    error: Array
    low: Array
    high: Array
    values: Array


def signal_and_noise(squares: Array, agreement: Array, confidence: float = 0.95) -> Signal:
    """Estimate signal and noise from the numbers of single batches.

    Parameters
    ----------
    squares
        Shape (batches, columns): ‖g_b‖², summed over the tensors of a column.
    agreement
        Shape (batches, columns): ⟨g_b, mean of the other batches' gradients⟩, summed likewise.
    confidence
        Of the bounds.
    """
    n = len(squares)
    signal = agreement.mean(axis=0)
    noise = np.maximum(squares.mean(axis=0) - signal, 0.0)
    unknown = np.full(squares.shape[1], np.nan)
    if n < MIN_BATCHES:
        return Signal(signal, noise, unknown, unknown, unknown, np.empty((0, squares.shape[1])))
    # Leaving batch b out gives U_(b) = (N U − 2 a_b) / (N − 2).
    without = (n * signal - 2 * agreement) / (n - 2)
    error = np.sqrt((n - 1) / n * np.square(without - signal).sum(axis=0))
    half = float(t_quantile(0.5 + confidence / 2, n - 1)) * error
    values = n * signal - (n - 1) * without
    return Signal(signal, noise, error, signal - half, signal + half, values)
