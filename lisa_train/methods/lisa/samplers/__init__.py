"""Which layers train next: what a sampler is, and the exact schemes that are built in (numpy)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lisa_analysis.contract.folder import import_modules
from lisa_train.methods.lisa.config import SUM_TOLERANCE
from lisa_train.methods.lisa.inclusion import resolve as resolve
from lisa_train.methods.lisa.samplers.conditional_poisson import (
    ConditionalPoissonSampler as ConditionalPoissonSampler,
)
from lisa_train.methods.lisa.samplers.sampler import SAMPLERS as SAMPLERS
from lisa_train.methods.lisa.samplers.sampler import PureSampler as PureSampler
from lisa_train.methods.lisa.samplers.sampler import Sampler as Sampler
from lisa_train.methods.lisa.samplers.sampler import register as register
from lisa_train.methods.lisa.samplers.sampler import seed_word as seed_word
from lisa_train.methods.lisa.samplers.schemes import BalancedSampler as BalancedSampler
from lisa_train.methods.lisa.samplers.schemes import BernoulliSampler as BernoulliSampler
from lisa_train.methods.lisa.samplers.schemes import CyclicSampler as CyclicSampler
from lisa_train.methods.lisa.samplers.schemes import SystematicSampler as SystematicSampler
from lisa_train.methods.lisa.samplers.schemes import UniformSampler as UniformSampler
from lisa_train.methods.lisa.samplers.within_budget import BudgetSampler as BudgetSampler

import_modules(__name__, __path__)  # one in a file of its own registers itself


def make_sampler(
    sampling: str,
    pi: ArrayLike,
    k: float,
    seed: int,
    weights: NDArray[np.float64] | None = None,
) -> Sampler:
    """Build the sampler called `sampling`.

    Parameters
    ----------
    sampling
        One of `SAMPLERS`. ``uniform`` with unequal probabilities becomes ``systematic``, whose
        draws are the same to the bit when the probabilities are equal.
    pi
        Inclusion probabilities, shape (L,), Σπ = k.
    k
        Layers per draw.
    seed
        Seed of the schedule.
    weights
        Sizes over their mean where parts of layers are drawn: see `Sampler`.
    """
    if weights is not None:
        kind = BudgetSampler if sampling == "uniform" else SAMPLERS[sampling]
        return kind(pi, k, seed, weights)
    if sampling == "uniform" and np.ptp(np.asarray(pi, dtype=np.float64)) > SUM_TOLERANCE:
        sampling = "systematic"
    return SAMPLERS[sampling](pi, k, seed)


def never_drawn(sampler: Sampler, draws: int) -> tuple[int, ...]:
    """Layers that none of the first `draws` draws takes although it could have.

    None are known of a sampler that learns: what it will draw is not settled.
    """
    if sampler.learns:
        return ()
    missing = set(range(sampler.inclusion_probabilities.size)) - set(sampler.excluded())
    for index in range(draws):
        missing.difference_update(sampler.draw(index))
        if not missing:
            break
    return tuple(sorted(missing))
