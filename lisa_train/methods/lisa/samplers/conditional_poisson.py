"""Conditional Poisson designs: elementary symmetric polynomials in logarithms, and their fit."""

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import ProbabilitiesError


def log_elementary(log_w: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Logarithms of e_j of the first i weights, shape (n+1, k+1); e_0 = 1, e_j = 0 for j > i."""
    table = np.full((log_w.size + 1, k + 1), -np.inf)
    table[:, 0] = 0.0
    for i, weight in enumerate(log_w):
        table[i + 1, 1:] = np.logaddexp(table[i, 1:], weight + table[i, :-1])
    return table


def inclusion_probabilities(log_w: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Inclusion probabilities w_i e_{k-1}(others) / e_k(all) of the conditional Poisson design."""
    before = log_elementary(log_w, k)[:-1, :k]
    after = log_elementary(log_w[::-1], k)[-2::-1, :k]
    # e_{k-1} without unit i is a convolution of what precedes and what follows it: only sums of
    # positive terms, unlike the usual recursion, which subtracts.
    others = np.logaddexp.reduce(before + after[:, ::-1], axis=1)
    total = log_elementary(log_w, k)[-1, k]
    return np.exp(log_w + others - total)


def fit_log_weights(pi: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Weights whose conditional Poisson design of size `k` has the inclusion probabilities `pi`."""
    if pi.size == 0:
        return np.empty(0)
    target = np.log(pi) - np.log1p(-pi)
    log_w = target.copy()
    damping = 1.0 - 1.0 / pi.size
    for _ in range(500):
        reached = np.clip(inclusion_probabilities(log_w, k), 1e-300, 1.0 - 1e-16)
        if np.max(np.abs(reached - pi)) < 1e-12:
            return log_w
        # Newton's step of the equal-probability design, where conditioning on the size multiplies
        # the response of the log-odds by n/(n-1): right to first order for any π.
        log_w += damping * (target - (np.log(reached) - np.log1p(-reached)))
        log_w -= log_w.mean()
    error = np.max(np.abs(inclusion_probabilities(log_w, k) - pi))
    raise ProbabilitiesError(
        f"conditional Poisson weights for {pi.size} layers and {k} per draw did not converge "
        f"(error {error:.2g}); use sampling='systematic'."
    )
