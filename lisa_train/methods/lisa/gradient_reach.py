"""Whether the drawn layers get gradients at all: a model may skip one, or the loss not reach it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Unreached:
    """Layers of a draw that steps of its period left without any gradient.

    `layers` gives, for each of them, in how many of the `steps` since step `since` that was so;
    where parts of layers take turns, it counts parts, and `names` has what they are called.
    """

    since: int
    steps: int
    layers: Mapping[int, int]
    names: Sequence[str] | None = None

    def __str__(self) -> str:
        called = "layer {}".format if self.names is None else self.names.__getitem__
        which = ", ".join(f"{called(i)} in {n}" for i, n in sorted(self.layers.items()))
        what = "layers" if self.names is None else "parts of layers"
        return (
            f"drawn {what} had no gradient and did not move: {which} of the {self.steps} steps "
            f"after step {self.since} (the model skipped them, or the loss did not reach them)"
        )


class GradientReach:
    """Counts the optimizer steps in which a drawn layer has no gradient in any tensor.

    A gradient of zeros is one: a loop that zeroes gradients instead of dropping them hides what
    this looks for.

    Parameters
    ----------
    units
        Tensors of every layer, or of every part that takes turns.
    names
        What the parts are called; None for whole layers.
    """

    def __init__(
        self,
        units: Mapping[int | str, Sequence[torch.Tensor]],
        names: Sequence[str] | None = None,
    ) -> None:
        self._units = units
        self._names = names
        self._reached: set[int] = set()
        self._stepping = False
        self.start(0)

    def start(self, step: int) -> None:
        """Begin a period after `step` completed steps."""
        self._since, self._steps = step, 0
        self._missed: dict[int, int] = {}

    def look(self, layers: Sequence[int]) -> None:
        """Look at the gradients just before an optimizer uses them; several may, one by one."""
        self._stepping = True
        for layer in layers:
            if layer not in self._reached and any(p.grad is not None for p in self._units[layer]):
                self._reached.add(layer)

    def end_step(self, layers: Sequence[int]) -> None:
        """Count the step that was looked at since the last call, if there was one."""
        if self._stepping:
            self._steps += 1
            for layer in layers:
                if layer not in self._reached:
                    self._missed[layer] = self._missed.get(layer, 0) + 1
        self._reached.clear()
        self._stepping = False

    def found(self) -> Unreached | None:
        """Return what the period so far shows; None when every layer always had a gradient."""
        if not self._missed:
            return None
        return Unreached(self._since, self._steps, dict(self._missed), self._names)
