"""Conditional Poisson designs: elementary symmetric polynomials in logarithms, fit and draw."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_train.methods.lisa.samplers.sampler import PureSampler, register


@register
class ConditionalPoissonSampler(PureSampler):
    """Maximum-entropy design of fixed size: independent draws conditioned on their number.

    The weights w are fitted so that the inclusion probabilities are π (Tillé, *Sampling
    Algorithms*, 2006, §5.2); all sums of products are elementary symmetric polynomials, kept as
    logarithms, so that 80 layers neither overflow nor cancel.
    """

    scheme = "conditional_poisson"

    def __init__(self, pi: ArrayLike, k: int, seed: int) -> None:
        super().__init__(pi, k, seed)
        self._log_w = fit_log_weights(self.inclusion_probabilities[self._open], self._open_k)
        self._log_e = log_elementary(self._log_w, self._open_k)

    def _choose(self, index: int) -> NDArray[np.intp]:
        uniforms = self._rng(index).random(self._open.size)
        left = self._open_k
        chosen = []
        # From the last unit down: P(take i | `left` of the first i+1 units are taken) is
        # w_i e_{left-1}(first i units) / e_left(first i+1 units).
        for i in range(self._open.size - 1, -1, -1):
            if left == 0:
                break
            log_p = self._log_w[i] + self._log_e[i, left - 1] - self._log_e[i + 1, left]
            if uniforms[i] < np.exp(log_p):
                chosen.append(i)
                left -= 1
        return np.array(chosen, dtype=np.intp)


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
