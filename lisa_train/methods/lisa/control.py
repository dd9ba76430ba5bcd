"""The placebo: the same inclusion probabilities, given to other layers (numpy)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.plans.budget import apply_control


@dataclass(frozen=True)
class Control:
    """What is done to probabilities before they are in force, see `LisaConfig.control`.

    Parameters
    ----------
    kind
        ``none``, ``permuted``, ``reversed`` or ``uniform``.
    seed
        Of the permutation.
    """

    kind: str = "none"
    seed: int = 0

    def of(
        self,
        pi: NDArray[np.float64],
        scores: NDArray[np.float64] | None = None,
        weights: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """Return the probabilities in force, shape (L,); `scores` rank what has equal ones.

        With `weights` (sizes), they change places only among those of one size.
        """
        return apply_control(pi, self.kind, self.seed, scores, weights)

    def entries(self, layers: int, weights: NDArray[np.float64] | None = None) -> dict[str, Any]:
        """Return what a run's manifest says of it beside its name.

        `control_permutation` holds, for every layer, the layer whose probability it has.
        """
        if self.kind != "permuted":
            return {}
        order = self.of(np.arange(layers, dtype=np.float64), None, weights).astype(int)
        return {"control_seed": self.seed, "control_permutation": order.tolist()}
