"""The placebo: the same inclusion probabilities, given to other layers (numpy)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.plans.budget import apply_control
from lisa_analysis.plans.stacks import seed_of_stack


@dataclass(frozen=True)
class Control:
    """What is done to probabilities before they are in force, see `LisaConfig.control`.

    Parameters
    ----------
    kind
        ``none``, ``permuted``, ``reversed`` or ``uniform``.
    seed
        Of the permutation.
    stacks
        Layers of each stack that is drawn apart: probabilities change places within a stack.
    """

    kind: str = "none"
    seed: int = 0
    stacks: tuple[tuple[int, ...], ...] = ()

    def of_stack(self, number: int) -> "Control":
        """Return what is done to the probabilities of one stack alone."""
        return Control(self.kind, seed_of_stack(self.seed, number))

    def of(
        self,
        pi: NDArray[np.float64],
        scores: NDArray[np.float64] | None = None,
        weights: NDArray[np.float64] | None = None,
    ) -> NDArray[np.float64]:
        """Return the probabilities in force, shape (L,); `scores` rank what has equal ones.

        With `weights` (sizes), they change places only among those of one size.
        """
        if len(self.stacks) > 1:
            result = np.array(pi, dtype=np.float64)
            for number, layers in enumerate(self.stacks):
                inside = list(layers)
                ranks = None if scores is None else scores[inside]
                sizes = None if weights is None else weights[inside]
                result[inside] = self.of_stack(number).of(result[inside], ranks, sizes)
            return result
        return apply_control(pi, self.kind, self.seed, scores, weights)

    def entries(self, layers: int, weights: NDArray[np.float64] | None = None) -> dict[str, Any]:
        """Return what a run's manifest says of it beside its name.

        `control_permutation` holds, for every layer, the layer whose probability it has.
        """
        if self.kind != "permuted":
            return {}
        order = self.of(np.arange(layers, dtype=np.float64), None, weights).astype(int)
        return {"control_seed": self.seed, "control_permutation": order.tolist()}
