"""Draws from several stacks, each by a sampler of its own (numpy)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.samplers.sampler import Sampler


class StackedSampler(Sampler):
    """An encoder's and a decoder's layers drawn apart: every draw has its number of each.

    Whatever holds for the schemes of the stacks holds for all layers: π are exact, draws are
    independent between the stacks, and each continues from its own state.

    Parameters
    ----------
    stacks
        Layers of every stack, in their order, with the sampler that draws among them.
    seed
        Seed of the schedule.
    """

    scheme = "stacks"

    def __init__(self, stacks: Sequence[tuple[Sequence[int], Sampler]], seed: int) -> None:
        # Every sampler has checked its own π.
        self._stacks = [(np.array(layers, dtype=np.intp), one) for layers, one in stacks]
        self._samplers = [one for _, one in self._stacks]
        self.inclusion_probabilities = self._joined(
            [one.inclusion_probabilities for one in self._samplers]
        )
        self.inclusion_probabilities.flags.writeable = False
        self.k = sum(one.k for one in self._samplers)
        self.weights = None
        self.seed = int(seed)
        self.may_draw_nothing = any(one.may_draw_nothing for one in self._samplers)

    def probabilities(self, index: int) -> NDArray[np.float64]:
        """π by which draw `index` is taken, shape (L,)."""
        return self._joined([one.probabilities(index) for one in self._samplers])

    def scores(self, index: int) -> NDArray[np.float64] | None:
        """Scores that the π of draw `index` is made from; NaN in stacks that have none yet."""
        found = [one.scores(index) for one in self._samplers]
        if all(scores is None for scores in found):
            return None
        return self._joined(
            [
                np.full(len(layers), np.nan) if scores is None else scores
                for (layers, _), scores in zip(self._stacks, found, strict=True)
            ]
        )

    def draw(self, index: int) -> tuple[int, ...]:
        """Layer indices of draw `index`, sorted."""
        return self._layers([one.draw(index) for one in self._samplers])

    def learn(self, step: int, layer_scores: NDArray[np.float64]) -> None:
        """Give every stack what was measured of its own layers."""
        for layers, one in self._stacks:
            one.learn(step, layer_scores[layers])

    @property
    def learns(self) -> bool:
        """Whether the later draws of any stack depend on what is still to be learned."""
        return any(one.learns for one in self._samplers)

    @property
    def frozen(self) -> str | None:
        """Why a stack that learns has stopped; None while all go on."""
        found = (getattr(one, "frozen", None) for one in self._samplers)
        return next((reason for reason in found if reason is not None), None)

    def always_drawn(self) -> tuple[int, ...]:
        """Layers that are certain to be in every draw to come."""
        return self._layers([one.always_drawn() for one in self._samplers])

    def excluded(self) -> tuple[int, ...]:
        """Layers that no draw ever takes."""
        return self._layers([one.excluded() for one in self._samplers])

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all stacks, as JSON values."""
        return {
            "scheme": self.scheme,
            "stacks": [[layers.tolist(), one.state_dict()] for layers, one in self._stacks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved schedule; one of other stacks or settings is a `ConfigError`."""
        saved = state.get("stacks", [])
        if [layers for layers, _ in saved] != [layers.tolist() for layers, _ in self._stacks]:
            raise ConfigError(
                f"the saved layer schedule draws from {len(saved) or 'one'} stacks of layers, this "
                f"run from {len(self._stacks)}; resume with the settings that it was saved with."
            )
        for one, (_, own) in zip(self._samplers, saved, strict=True):
            one.load_state_dict(own)

    def _joined(self, parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        values = np.empty(sum(len(layers) for layers, _ in self._stacks))
        for (layers, _), part in zip(self._stacks, parts, strict=True):
            values[layers] = part
        return values

    def _layers(self, parts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        found = [
            layers[np.array(part, dtype=np.intp)]
            for (layers, _), part in zip(self._stacks, parts, strict=True)
        ]
        return tuple(np.sort(np.concatenate(found)).tolist())
