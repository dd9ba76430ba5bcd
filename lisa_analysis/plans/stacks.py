"""How what is budgeted over layers is shared between stacks: an encoder's and a decoder's (numpy).

Layers of two stacks do not take each other's turns: each stack has its own number of layers in
every draw, and its own scores, bounds and controls.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_analysis.plans.stages import Stages, probabilities_from_scores
from lisa_analysis.plans.strength import Strength

if TYPE_CHECKING:
    from lisa_analysis.plans.evidence import Evidence

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Division:
    """Layers in stacks, and how many of each a draw takes.

    Attributes
    ----------
    paths
        Of the stacks; one, perhaps empty, where all layers are drawn together.
    places
        Positions of the layers of each.
    numbers
        Layers of each in a draw.
    """

    paths: tuple[str, ...]
    places: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, stacks: Sequence[str], k: int) -> "Division":
        """Share k between the stacks; where it is less than one of each, all are one stack."""
        paths, places = tuple(dict.fromkeys(stacks)), places_of(stacks)
        if not 1 < len(places) <= k <= len(stacks):
            return cls(("",), (tuple(range(len(stacks))),), (k,))
        return cls(paths, places, shared(k, [len(layers) for layers in places]))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def uniform(self) -> Array:
        """Uniform share of every layer, shape (L,): k/L in each stack."""
        shares = np.empty(sum(map(len, self.places)))
        for layers, number in zip(self.places, self.numbers, strict=True):
            shares[list(layers)] = number / len(layers)
        return shares

    def strengths(self, strength: Strength) -> list[Strength]:
        """Return the strength in each stack: a pool of so many is shared like the layers."""
        if len(self) == 1 or not strength.pool:
            return [strength] * len(self)
        depths = [len(layers) for layers in self.places]
        if strength.pool < len(self):
            raise ProbabilitiesError(
                f"strength is 'pool={strength.pool}': a pool of fewer layers than the {len(self)} "
                f"stacks ({', '.join(self.paths)}); make it larger."
            )
        sizes = shared(min(strength.pool, sum(depths)), depths)
        return [dataclasses.replace(strength, pool=size) for size in sizes]

    def each(self, make: Callable[[int, list[int]], Any]) -> list[Any]:
        """Call `make` with the number and the layers of every stack; a refusal names the stack."""
        found = []
        for number, (path, layers) in enumerate(zip(self.paths, self.places, strict=True)):
            try:
                found.append(make(number, list(layers)))
            except ProbabilitiesError as error:
                if len(self) == 1:
                    raise
                raise ProbabilitiesError(f"in {path}: {error}") from None
        return found

    def joined(self, parts: Sequence[Any]) -> NDArray[Any]:
        """Put values of the stacks' layers into the order of all layers."""
        values = np.empty(sum(map(len, self.places)), dtype=np.asarray(parts[0]).dtype)
        for layers, part in zip(self.places, parts, strict=True):
            values[list(layers)] = part
        return values

    def sentence(self) -> str:
        """Say how many of each stack a draw takes; empty for one stack."""
        if len(self) == 1:
            return ""
        said = ", ".join(
            f"{number} of {len(layers)} of {path}"
            for path, layers, number in zip(self.paths, self.places, self.numbers, strict=True)
        )
        return f"Each stack by itself: a draw takes {said}."


def places_of(stacks: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """Positions of the layers of every stack, in the order in which the stacks come.

    >>> places_of(["encoder", "encoder", "decoder"])
    ((0, 1), (2,))
    """
    return tuple(
        tuple(i for i, own in enumerate(stacks) if own == stack) for stack in dict.fromkeys(stacks)
    )


def shared(total: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Share a number of layers between stacks in proportion to their depths: whole, at least one.

    Every stack has one first; then one at a time goes to the stack that is furthest below its
    part, the first of equal ones, and to none more than it has layers.

    >>> shared(4, [32, 2])
    (3, 1)

    Parameters
    ----------
    total
        Layers of all stacks together.
    sizes
        Depths of the stacks.

    Raises
    ------
    ProbabilitiesError
        When there are fewer than stacks, or more than layers.
    """
    if not len(sizes) <= total <= sum(sizes):
        raise ProbabilitiesError(
            f"{total} layers cannot be shared between {len(sizes)} stacks of "
            f"{', '.join(map(str, sizes))} layers with at least one of each; give "
            f"{len(sizes)} to {sum(sizes)}."
        )
    given = [1] * len(sizes)
    parts = [total * size / sum(sizes) for size in sizes]
    while sum(given) < total:
        behind = [
            part - own if own < size else -np.inf
            for part, own, size in zip(parts, given, sizes, strict=True)
        ]
        given[int(np.argmax(behind))] += 1
    return tuple(given)


def seed_of_stack(seed: int, number: int) -> int:
    """Seed of a stack's own draws and permutation; the first one has that of the whole.

    Two stacks that drew by one seed would draw layers of the same depths together.
    """
    if number == 0:
        return seed
    key = [0x57AC, 2 * seed if seed >= 0 else -2 * seed - 1, number]
    return int(np.random.default_rng(key).integers(2**31))


def stages_by_stack(
    evidence: "Evidence", division: Division, strength: Strength, control: str | None, seed: int
) -> Stages:
    """Return the stages of each stack by itself, in the order of all layers.

    Parameters
    ----------
    evidence
        Of all layers.
    division
        The stacks, and how many layers of each a draw takes.
    strength, control, seed
        See `probabilities_from_scores`; each stack has a seed of its own.

    Raises
    ------
    ProbabilitiesError
        As there, with the path of the stack.
    """
    strengths = division.strengths(strength)

    def of_stack(number: int, layers: list[int]) -> Stages:
        own = evidence if len(division) == 1 else evidence.of_stack(layers)
        return probabilities_from_scores(
            own.score, own.low, own.high, k=division.numbers[number], strength=strengths[number],
            control=control, seed=seed_of_stack(seed, number), shrunk=own.shrunk,
        )  # fmt: skip

    found = division.each(of_stack)
    if len(found) == 1:
        return found[0]
    values = {
        name: division.joined([getattr(one, name) for one in found])
        for name in ("score", "low", "high", "safe", "power", "mixed", "pi", "known")
    }
    return Stages(**values, strength=strength)
