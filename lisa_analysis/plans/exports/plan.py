"""Plan: a profile, as an export takes it: its layers, shares over them, and the chosen ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError, ProbabilitiesError
from lisa_analysis.plans.budget import Control, seed_of_control
from lisa_analysis.plans.evidence import Evidence
from lisa_analysis.plans.exports.modules import ModelModules
from lisa_analysis.plans.stages import Stages, multiples_from_scores
from lisa_analysis.plans.strength import Strength

if TYPE_CHECKING:
    from lisa_analysis.profiles.profile import ImportanceProfile

Array = NDArray[np.float64]

_NUMBERED = re.compile(r"(?P<stack>.+)\.(?P<index>\d+)")


@dataclass(frozen=True)
class Layer:
    """One layer: its name (`model.layers.3`), the list that holds it, and its index in that."""

    name: str
    stack: str
    index: int


@dataclass(frozen=True, eq=False)
class Plan:
    """What an export is made from.

    Attributes
    ----------
    profile
        A profile by layer.
    evidence
        Its scores with bounds, or why it is undecided.
    strength, control, seed
        See `lisa_analysis.sampling_probabilities`; a strength of None is the usual one of what is
        made: 1 for shares, the layers above the mean for a choice.
    model
        Modules and shapes of the model, None where no run was given.
    """

    profile: "ImportanceProfile"
    evidence: Evidence
    strength: float | str | None = None
    control: Control | None = None
    seed: int = 0
    model: ModelModules | None = None

    @classmethod
    def of(
        cls,
        profile: "ImportanceProfile",
        *,
        run: Any = None,
        strength: float | str | None = None,
        control: Control | None = "none",
        seed: int | None = None,
        use_intervals: bool = True,
    ) -> "Plan":
        """Check everything that all exports share; see `lisa_analysis.export`."""
        evidence = Evidence.of(profile, use_intervals)
        if profile.by != "layer":
            raise ProbabilitiesError(f"exports need a profile by layer, got one by {profile.by}.")
        if strength is not None:
            strength = Strength.read(strength)
        model = None if run is None else ModelModules.of(run, tuple(profile.layers["name"]))
        if model is not None:  # of weights without a head the profile has shorter names
            named = profile.layers.assign(name=list(model.layer_names))
            profile = replace(profile, layers=named)
        seed = seed_of_control(control, seed)
        return cls(profile, evidence, strength, None if control == "none" else control, seed, model)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Layers in the order of the profile.

        Raises
        ------
        LisaError
            When a name says neither list nor index.
        """
        found = []
        for name in map(str, self.profile.layers["name"]):
            parts = _NUMBERED.fullmatch(name)
            if parts is None:
                raise LisaError(
                    f"layer {name!r} is no path of a model as 'model.layers.3': give the profile "
                    "the names of the model's layers (from_scores(..., names=[...]))."
                )
            found.append(Layer(name, parts["stack"], int(parts["index"])))
        return tuple(found)

    @property
    def stacks(self) -> tuple[str, ...]:
        """Lists of layers in the order of the profile: one, or encoder and decoder."""
        return tuple(dict.fromkeys(layer.stack for layer in self.layers))

    @property
    def undecided(self) -> str:
        """Why everything is uniform; empty where it follows the scores."""
        return self.evidence.undecided

    def multiples(self, *, mean: float = 1.0, most: float = float("inf")) -> Stages:
        """Shares over layers by the stages of the probabilities, of a given mean.

        Parameters
        ----------
        mean, most
            Mean of the shares, and their upper end. An undecided profile gives the mean to all,
            a pool too: it needs layers that stand out.
        """
        given = 1.0 if self.strength is None else self.strength
        return self._stages(0.0 if self.undecided else given, mean, most)

    def chosen(self, layers: int | None) -> NDArray[np.bool_]:
        """Which layers are chosen: the best ones, or all of an undecided profile.

        Parameters
        ----------
        layers
            How many; None takes those that stand above the mean with their whole interval.

        Raises
        ------
        ProbabilitiesError
            When none does, fewer layers are known than asked for, or the strength says another
            number: of a pool its own, of 0 all.
        """
        if layers is not None and (isinstance(layers, bool) or not isinstance(layers, int)):
            raise ProbabilitiesError(f"layers is {layers!r}: expected a whole number.")
        if layers is not None and not 1 <= layers <= len(self.layers):
            raise ProbabilitiesError(
                f"layers is {layers}: expected a number from 1 to {len(self.layers)}."
            )
        pool = self.strength if isinstance(self.strength, str) else None
        if layers is not None and (pool is not None or self.strength == 0):
            said = "strength 0, which is all of them" if pool is None else f"strength {pool!r}"
            raise ProbabilitiesError(f"layers is {layers} and {said}: both say how many; give one.")
        if self.undecided or self.strength == 0:
            return np.ones(len(self.layers), dtype=bool)
        # Any other power chooses no layers: which are the best does not depend on it.
        chosen = pool or ("pool" if layers is None else f"pool={layers}")
        return np.asarray(self._stages(chosen, 1.0, float("inf")).pi > 0)

    @property
    def strength_words(self) -> tuple[str, ...]:
        """What a number as strength means for a choice of layers; empty for the usual one."""
        if self.undecided or isinstance(self.strength, str) or self.strength in (None, 1):
            return ()
        if self.strength == 0:
            return ("A strength of 0 is uniform: all layers.",)
        return (
            f"A strength of {self.strength:g} changes nothing here: which layers are the best does "
            "not depend on it, and how many is said by layers or a pool.",
        )

    def _stages(self, strength: float | str, mean: float, most: float) -> Stages:
        return multiples_from_scores(
            self.evidence.score, self.evidence.low, self.evidence.high, mean=mean, most=most,
            strength=strength, control=self.control, seed=self.seed,
            shrunk=self.evidence.shrunk,
        )  # fmt: skip

    def names(self, chosen: NDArray[np.bool_]) -> list[str]:
        """Names of chosen layers."""
        return [layer.name for layer, take in zip(self.layers, chosen, strict=True) if take]

    def modules_of(self, target_modules: Any) -> tuple[str, ...]:
        """Names that `target_modules` of PEFT would match, by default all matrices of the layers.

        Raises
        ------
        LisaError
            When no run says which modules there are and none are given, or the model has no such.
        """
        if isinstance(target_modules, str):
            target_modules = [part for part in re.split(r"[+,\s]+", target_modules) if part]
        if self.model is None:
            if not target_modules:
                raise LisaError(
                    "which modules the layers have is not known: give run= (the run directory of "
                    "the profile) or target_modules, as ['q_proj', 'v_proj']."
                )
            return tuple(map(str, target_modules))
        return self.model.leaves(target_modules)


def joined(values: Sequence[Any]) -> str:
    """``a, b and c``."""
    words = [str(value) for value in values]
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else "".join(words)
