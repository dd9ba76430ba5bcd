"""What uniform sampling would give layers, beside which their probabilities stand (numpy)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def even_shares(pi: Array, stacks: Sequence[str]) -> Array:
    """Return what uniform sampling of the same number of layers gives each, shape (L,).

    Where the π of every stack sum to a whole number above 0, that number is the stack's own.
    """
    own = np.array(stacks)
    sums = {stack: float(pi[own == stack].sum()) for stack in dict.fromkeys(stacks)}
    if any(abs(total - round(total)) > 1e-5 or round(total) < 1 for total in sums.values()):
        return np.full(len(pi), pi.sum() / len(pi))
    depth = {stack: list(stacks).count(stack) for stack in sums}
    return np.array([sums[stack] / depth[stack] for stack in stacks])
