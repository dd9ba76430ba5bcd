"""What is believed of layers before anything is measured (numpy)."""

from collections.abc import Sequence

import numpy as np

from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_analysis.plans.budget import allocate
from lisa_train.methods.lisa.learning.config import PRIORS
from lisa_train.methods.lisa.learning.evidence import Array


def prior_probabilities(
    prior: str | Sequence[float], layers: int, k: float, weights: Array | None = None
) -> Array:
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
