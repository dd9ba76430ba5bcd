"""The course of a run as a mixture of decays: fitted to its power by frequency.

A course that is stationary and reversible has an autocovariance that is a mixture of decays ρᵏ
with weights that are not negative, the strictest of the sequences by which Geyer (1992, "Practical
Markov chain Monte Carlo") ends an empirical one. The mixture is fitted here to the power of the
layers' residuals by frequency, pooled over layers, and not to lags: white noise with a slow course
(every log of norms) shows at the lowest frequencies long before a lag by lag sum sees it, and
the mean of a run that is short beside its course needs no correction of its own.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

DECAYS = 24
BANDS = 40
# A band of many frequencies counts like one of these, or the fast ones would decide the fit.
MOST_IN_BAND = 20
ITERATIONS = 400
# What lasts longer than this share of the run cannot be told from a difference between layers.
SLOW = 0.2
# A run shows less than there is of a course as slow as that: its share is raised by so much.
ALLOWANCE = 0.5
# A decay below this leaves nothing worth speaking of to the next row.
FORGOTTEN = 0.1


@dataclass(frozen=True, eq=False)
class Mixture:
    """A course as a sum of decays.

    Attributes
    ----------
    decays
        Shape (decays,): ρ of each, from 0 on.
    weights
        Shape (decays,): share of the variance that each has; they sum to one.
    power
        Shape (bands,): expected power of a layer of variance 1, by band of frequencies.
    error
        Shape (decays,): n · Var(mean) of a course of that decay alone.
    rows
        Number of rows n.
    """

    decays: Array
    weights: Array
    power: Array
    error: Array
    rows: int

    @property
    def stretch(self) -> float:
        """N · Var(mean) of a layer of variance 1, see `Persistence`."""
        return float(self.weights @ self.error) * (1 + ALLOWANCE * self.slow)

    @property
    def shares(self) -> Array:
        """Of the variance of a mean, by decay."""
        parts = self.weights * self.error
        return np.asarray(parts / parts.sum())

    @property
    def slow(self) -> float:
        """Share of the variance of a mean from courses slower than a fifth of the run."""
        lasting = (1 + self.decays) / (1 - self.decays) > SLOW * self.rows
        return float(self.shares[lasting].sum())

    @property
    def fresh(self) -> float:
        """Share of an observation's variance that the next one knows nothing of."""
        return float(self.weights[self.decays < FORGOTTEN].sum())

    @property
    def passing(self) -> float:
        """Share of it that is forgotten within a fifth of the run."""
        lasting = (1 + self.decays) / (1 - self.decays) > SLOW * self.rows
        return float(self.weights[~lasting].sum())

    @property
    def pieces(self) -> float:
        """Independent pieces of the course in the run."""
        lasting = (1 + self.decays) / (1 - self.decays)
        return self.rows / float(self.shares @ lasting)

    @property
    def told(self) -> float:
        """Degrees of freedom of the variance of a mean, by how well waves tell the slow courses.

        A wave whose power is to a share f that of the slow courses tells their size, on a
        logarithm, with the information f²/2: courses hidden in noise are told by less than the
        pieces that they fall into. 2/cv² with the parts of slow and of other courses apart.
        """
        lasting = (1 + self.decays) / (1 - self.decays)
        slowly = lasting > SLOW * self.rows
        slow, rest = self.slow, float((self.shares * lasting)[~slowly].sum())
        _, power, _ = _model(self.rows)
        share = (power[:, slowly] @ self.weights[slowly]) / self.power
        waves = float(_bands(self.rows)[1] @ share**2)
        varies = (1 - slow) * rest / self.rows + (slow**2 / waves if waves > 0 else 0.0)
        return 1 / varies if varies > 0 else float("inf")

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the variance per row, 1/(1 + 2 Σ ρ_k²)."""
        squares = self.weights @ (1 / (1 - np.outer(self.decays, self.decays))) @ self.weights
        return 1 / float(2 * squares - 1)

    def of_decays(self, decays: Array) -> tuple[Array, Array]:
        """Power by band, (bands, decays), and n · Var(mean) of courses of variance 1."""
        return _of_decays(decays, self.rows)


def cosines(filled: Array) -> Array:
    """Orthonormal cosine transform (DCT-II) of every column without the mean, (n − 1, columns)."""
    n = len(filled)
    whole = np.fft.rfft(np.concatenate([filled, filled[::-1]]), axis=0)[1:n]
    turn = np.exp(-0.5j * np.pi * np.arange(1, n) / n)[:, None]
    return np.asarray((whole * turn).real / np.sqrt(2 * n))


@lru_cache(maxsize=64)
def _model(n: int) -> tuple[Array, Array, Array]:
    """Decays of the mixture, their expected power by band, n · Var(mean) of each."""
    decays = np.exp(-np.concatenate([[np.inf], 1 / np.geomspace(0.3, n / 2, DECAYS)]))
    return decays, *_of_decays(decays, n)


def _of_decays(decays: Array, n: int) -> tuple[Array, Array]:
    frequency = np.pi * np.arange(1, n) / n
    power = (1 - decays**2) / (1 + decays**2 - 2 * np.outer(np.cos(frequency), decays))
    error = (1 + decays) / (1 - decays) - 2 * decays * (1 - decays**n) / (n * (1 - decays) ** 2)
    return banded(power, n)[0], np.asarray(error)


@lru_cache(maxsize=64)
def _bands(n: int) -> tuple[NDArray[np.int64], Array]:
    """First frequency and size of every band."""
    first = np.unique(np.round(np.geomspace(1, n, BANDS)).astype(np.int64))[:-1] - 1
    return first, np.diff(np.append(first, n - 1)).astype(np.float64)


def banded(power: Array, n: int) -> tuple[Array, Array]:
    """Mean power of every column by band, (bands, columns), and frequencies in it, (bands, 1)."""
    first, size = _bands(n)
    return np.add.reduceat(power, first, axis=0) / size[:, None], size[:, None]


def fit(relative: Array, n: int) -> Mixture:
    """Fit the mixture of one spectrum, (n − 1,); see `fits`."""
    return fits(relative[:, None], n)[0]


def fits(relative: Array, n: int) -> list[Mixture]:
    """Fit weights that are not negative, by Whittle's likelihood of power in bands of frequencies.

    `relative` is the power of every column over its variance, (n − 1, columns) from n rows.

    The steps are multiplicative (expectation–maximisation of a mixture of variances), from equal
    weights: where frequencies do not decide, the decays share.
    """
    decays, power, error = _model(n)
    found, size = banded(relative, n)
    count = np.minimum(size, MOST_IN_BAND)
    weights = np.full((len(decays), relative.shape[1]), 1 / len(decays))
    for _ in range(ITERATIONS):
        expected = np.maximum(power @ weights, 1e-300)
        weights = weights * (power.T @ (count * found / expected**2))
        weights /= np.maximum(power.T @ (count / expected), 1e-300)
    expected = power @ weights
    return [
        Mixture(decays, column / column.sum(), spectrum, error, n)
        for column, spectrum in zip(weights.T, expected.T, strict=True)
    ]


def expected_power(mixture: Mixture) -> Array:
    """Expected power by frequency of a layer of variance 1."""
    _, size = _bands(mixture.rows)
    return np.repeat(mixture.power, size.astype(np.int64))[: mixture.rows - 1]


def lowest(mixture: Mixture, share: float = 0.5) -> int:
    """Frequencies at which the course that decides the error of a mean stands out."""
    power = expected_power(mixture)
    high = power >= power[0] * share
    return max(2, int(np.argmin(high)) if not high.all() else len(high))
