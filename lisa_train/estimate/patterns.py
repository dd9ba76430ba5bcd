"""Which tensors train: all, the adapters, or LISA's units; and which draw costs the most."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lisa_analysis.contract.errors import ConfigError
from lisa_train.estimate.setting import Setting
from lisa_train.estimate.stage import Stage
from lisa_train.estimate.step import Pattern, record_step
from lisa_train.estimate.trace import ACTIVATIONS
from lisa_train.methods.lisa.checks import given_probabilities
from lisa_train.methods.lisa.plan import schedule_of
from lisa_train.methods.lisa.schedule import Draw, Schedule
from lisa_train.methods.lisa.units import Units
from lisa_train.model.layer_map import Unit

# Draws over which the mean of a schedule is taken.
_DRAWS = 256


def turns_of(stage: Stage, setting: Setting) -> Units:
    """Layers, halves or modules: what takes turns."""
    return Units.of(stage.base, stage.layer_map, setting.lisa.by)


def units_of(stage: Stage, turns: Units | None = None) -> dict[Unit, tuple[str, ...]]:
    """Names of the trainable tensors of every layer and group, as the LISA engine sees them.

    With `turns`, of what takes turns in place of the layers.
    """
    names = {id(p): name for name, p in stage.base.named_parameters()}
    turns = turns or Units.of(stage.base, stage.layer_map, "layer")
    units = turns.parameters(stage.base, stage.layer_map)
    return {unit: tuple(names[id(p)] for p in tensors) for unit, tensors in units.items()}


def plain_pattern(stage: Stage) -> Pattern:
    """Everything that requires gradients: full fine-tuning, or the adapters of LoRA."""
    return Pattern(frozenset(n for n, p in stage.model.named_parameters() if p.requires_grad))


def lisa_pattern(stage: Stage, setting: Setting, layers: Iterable[int]) -> Pattern:
    """What trains in a period with these layers (or parts) and every group that may train."""
    units = units_of(stage, turns_of(stage, setting))
    groups = (*setting.lisa.always_active, *setting.lisa.group_probabilities)
    chosen: list[Unit] = [*layers, *groups]
    active = frozenset(name for unit in chosen for name in units[unit])
    return Pattern(active, active if setting.lisa.precision == "fp32_active" else frozenset())


def drawable(stage: Stage, setting: Setting) -> tuple[int, ...]:
    """Layers that a draw may take: all but those with a probability of 0."""
    turns = turns_of(stage, setting)
    pi = given_probabilities(setting.lisa, stage.layer_map, turns)
    count = len(turns)
    # Another number of probabilities is refused where the draws are made.
    return tuple(i for i in range(count) if pi is None or len(pi) != count or pi[i] > 0)


def may_train(stage: Stage, setting: Setting) -> frozenset[str]:
    """Every tensor that LISA ever trains."""
    return lisa_pattern(stage, setting, drawable(stage, setting)).trainable


def check_layers(stage: Stage, layers: Sequence[int]) -> None:
    """Refuse indices of layers that the model does not have."""
    wrong = [i for i in layers if not 0 <= i < len(stage.layer_map)]
    if wrong:
        raise ConfigError(
            f"active_layers holds {wrong[0]}, but the model has layers 0 to "
            f"{len(stage.layer_map) - 1}."
        )


Places = tuple[tuple[int, ...], int]
"""Layers that a draw chooses among, and how many of them it takes."""


def places(schedule: Schedule, layers: Sequence[int], all_of_them: bool) -> list[Places]:
    """Return what a draw takes of each stack.

    Parameters
    ----------
    schedule
        The schedule that is estimated.
    layers
        Those that a draw may take.
    all_of_them
        Whether it may take them all.
    """
    found = []
    for stack in schedule.stacks:
        among = tuple(i for i in stack.layers if i in layers)
        found.append((among, len(among) if all_of_them else min(len(among), round(stack.k))))
    return found


@dataclass(frozen=True)
class DrawCosts:
    """Bytes that a draw adds: per layer when it trains, and when a gradient passes through it.

    Attributes
    ----------
    active, passing
        One number per layer. Below the lowest training layer, with all at rest that lies
        below the layers, a layer costs nothing.
    groups
        Bytes of a drawn group (embed, head).
    all_pass
        Whether something below the layers trains in every period (the embeddings, a norm or a
        convolution before the first layer), so that gradients pass all layers.
    """

    active: tuple[int, ...]
    passing: tuple[int, ...]
    groups: dict[str, int]
    all_pass: bool

    def of(self, layers: Collection[int], groups: Collection[str]) -> int:
        """Bytes that this draw adds."""
        all_pass = self.all_pass or "embed" in groups
        lowest = 0 if all_pass else min(layers, default=len(self.active))
        passed = sum(f for i, f in enumerate(self.passing) if i >= lowest and i not in layers)
        return passed + sum(self.active[i] for i in layers) + sum(self.groups[g] for g in groups)

    def worst(self, places: Sequence[Places], groups: Collection[str]) -> tuple[int, ...]:
        """The layers that cost the most, so many of each stack; the lowest of equal ones."""
        candidates = []
        for lowest in (i for among, k in places if k for i in among):
            found: list[int] = []
            for among, k in places:
                above = sorted((i for i in among if i >= lowest), key=self._gain)
                if lowest in above:  # it is the lowest of the draw
                    above.remove(lowest)
                    above.insert(0, lowest)
                found += above[:k]
            if len(found) == sum(k for _, k in places):
                candidates.append(tuple(sorted(found)))
        return max(candidates, key=lambda layers: self.of(layers, groups), default=())

    def _gain(self, layer: int) -> tuple[int, int]:
        return self.passing[layer] - self.active[layer], layer

    def mean(self, draws: Iterable[Draw]) -> float:
        """Mean over draws."""
        return float(np.mean([self.of(set(d.layers), d.groups) for d in draws]))


def draw_costs(stage: Stage, setting: Setting, held: Callable[[str], int]) -> DrawCosts:
    """Measure what every layer saves for backward when it trains and when it only passes.

    `held` gives the bytes of gradient, state and raised precision of a training tensor.
    """
    units = units_of(stage)
    count = len(stage.layer_map)
    everything = may_train(stage, setting) | frozenset(units["embed"])
    saved_active = _saved(stage, setting, everything)
    # With the embeddings alone training, every layer only passes the gradient on.
    lowest = units["embed"] or units[0]
    saved_passing = _saved(stage, setting, frozenset(lowest))
    active = tuple(saved_active[i] + sum(map(held, units[i])) for i in range(count))
    always = set(setting.lisa.always_active)
    resting = {n for unit in always for n in units[unit]}
    return DrawCosts(
        active,
        tuple(saved_passing[i] for i in range(count)),
        {
            group: sum(held(n) for n in units[group] if n not in resting)
            for group in setting.lisa.group_probabilities
        },
        bool(resting & set(units["embed"])) or _passes_all(stage, setting, frozenset(resting)),
    )


@dataclass(frozen=True)
class PartCosts:
    """Bytes that drawn halves or modules add, and which draws may cost the most.

    Attributes
    ----------
    each
        Bytes of every part when it alone trains: gradient, state, what its layer keeps for it.
    stacks
        Parts that are drawn among themselves, with the elements that a draw may have of them: the
        budget and one part more, by which it may be missed.
    turns
        The parts.
    """

    each: tuple[float, ...]
    stacks: tuple[tuple[frozenset[int], float], ...]
    turns: Units

    @property
    def largest(self) -> float:
        """Elements that a draw may have."""
        return sum(largest for _, largest in self.stacks)

    def candidates(self, among: Sequence[int]) -> list[tuple[int, ...]]:
        """Draws to look at: the dearest parts for their size, spread over layers and not.

        From the bottom and from the top, where backward begins.
        """
        sizes, layers = self.turns.sizes, self.turns.layers
        found = []
        for upwards in (1, -1):
            order = sorted(among, key=lambda i: (-self.each[i] / sizes[i], upwards * i))
            dear = sorted(among, key=lambda i: (-self.each[i], upwards * i))
            turn: dict[int, int] = {}
            rank = {}
            for i in order:
                rank[i] = turn[layers[i]] = turn.get(layers[i], -1) + 1
            spread = sorted(order, key=lambda i: rank[i])
            found += [self._filled(some) for some in (order, dear, spread)]
        return sorted(set(found))

    def _filled(self, order: Sequence[int]) -> tuple[int, ...]:
        chosen = []
        for inside, left in self.stacks:
            for i in order:
                if i in inside and self.turns.sizes[i] <= left:
                    chosen.append(i)
                    left -= self.turns.sizes[i]
        return tuple(sorted(chosen))

    def of(self, parts: Iterable[int]) -> float:
        """Bytes that a draw adds, were nothing shared between its parts."""
        return sum(self.each[i] for i in parts)

    def mean(self, draws: Iterable[Draw]) -> float:
        """Mean over draws."""
        return float(np.mean([self.of(d.layers) for d in draws]))


def part_costs(stage: Stage, setting: Setting, held: Callable[[str], int]) -> PartCosts:
    """Measure what the layers keep for their parts, for one part of every kind at a time."""
    turns = turns_of(stage, setting)
    units = units_of(stage, turns)
    mean = float(np.mean(turns.sizes))
    stacks = tuple(
        (frozenset(stack.layers), stack.k * mean + max(turns.sizes[i] for i in stack.layers))
        for stack in schedule_for(stage, setting).stacks
    )
    base = frozenset(units["embed"]) or frozenset(units[0])
    passing = _saved(stage, setting, base)
    kinds: dict[tuple[str, int], list[int]] = {}
    for i, (name, layer) in enumerate(zip(turns.names, turns.layers, strict=True)):
        kinds.setdefault((name[len(stage.layer_map.names[layer]) :], turns.sizes[i]), []).append(i)
    each = [0.0] * len(turns)
    for parts in kinds.values():
        saved = _saved(stage, setting, base | {n for i in parts for n in units[i]})
        for i in parts:
            layer = turns.layers[i]
            each[i] = max(0, saved[layer] - passing[layer]) + sum(map(held, units[i]))
    return PartCosts(tuple(each), stacks, turns)


def _passes_all(stage: Stage, setting: Setting, always: frozenset[str]) -> bool:
    """Whether tensors that always train lie below the layers: then the first one keeps something.

    In a stack of two parts (encoder, decoder) each has its own bottom; the first counts.
    """
    return bool(always) and _saved(stage, setting, always)[0] > 0


def _saved(stage: Stage, setting: Setting, trainable: frozenset[str]) -> list[int]:
    """Bytes that each layer keeps for backward."""
    plain = replace(setting, gradient_accumulation_steps=1)
    trace = record_step(stage, plain, Pattern(trainable), backward=False)
    kept = trace.alive(trace.marks["forward"]) & (trace.kinds == ACTIVATIONS)
    return [int(trace.bytes[kept & (trace.labels == i)].sum()) for i in range(len(stage.layer_map))]


def schedule_for(stage: Stage, setting: Setting) -> Schedule:
    """Return the schedule that the setting describes; refuses numbers that do not fit the model."""
    turns = turns_of(stage, setting)
    probabilities = given_probabilities(setting.lisa, stage.layer_map, turns)
    return schedule_of(setting.lisa, turns, probabilities, seed=0)


def some_draws(stage: Stage, setting: Setting) -> list[Draw]:
    """The first draws of the schedule that the setting describes."""
    schedule = schedule_for(stage, setting)
    steps = (n * setting.lisa.interval_steps for n in range(_DRAWS))
    return [draw for step in steps if (draw := schedule.advance(step)) is not None]
