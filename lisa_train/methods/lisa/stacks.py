"""Which stacks of layers are drawn apart, how many layers of each, and what draws them (numpy)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_analysis.plans.stacks import places_of, seed_of_stack, shared
from lisa_analysis.plans.strength import Strength
from lisa_train.methods.lisa.config import SUM_TOLERANCE, LisaConfig
from lisa_train.methods.lisa.control import Control
from lisa_train.methods.lisa.inclusion import prior_probabilities, resolve
from lisa_train.methods.lisa.learning.config import LearnConfig
from lisa_train.methods.lisa.learning.sampler import LearnedSampler
from lisa_train.methods.lisa.samplers import SAMPLERS, Sampler, make_sampler
from lisa_train.methods.lisa.samplers.of_stacks import StackedSampler

Array = NDArray[np.float64]


@dataclass(frozen=True)
class DrawnStack:
    """Layers (or halves or modules) that are drawn among themselves.

    Attributes
    ----------
    path
        Of the stack, as ``model.encoder.layers``; empty where all layers are drawn together.
    layers
        Their indices.
    k
        How many of them a draw takes; of halves and modules a budget in parts of mean size.
    """

    path: str
    layers: tuple[int, ...]
    k: float


def drawn_stacks(
    config: LisaConfig,
    stacks: Sequence[str],
    probabilities: Sequence[float] | None,
    k: float,
    weights: Array | None,
) -> tuple[DrawnStack, ...]:
    """Return the stacks that are drawn apart, or one of all layers.

    Parameters
    ----------
    config
        The settings.
    stacks
        Path of the stack that each layer (or part) is in.
    probabilities
        Inclusion probabilities, or the prior's numbers where they are learned; None for equal ones.
    k, weights
        See `Schedule`.

    Raises
    ------
    ConfigError
        When there are fewer layers in a draw than stacks.
    ProbabilitiesError
        When the probabilities do not give every stack a whole number of layers.
    """
    places = places_of(stacks)
    if config.stacks == "together" or len(places) < 2:
        return (DrawnStack("", tuple(range(len(stacks))), k),)
    paths = tuple(dict.fromkeys(stacks))
    given = None if config.learn is not None else probabilities
    pi = resolve(given, len(stacks), k, weights)  # refuses what does not fit the whole
    numbers: list[float]
    if weights is not None:
        numbers = [float(weights[list(layers)] @ pi[list(layers)]) for layers in places]
    elif given is not None:
        sums = [float(pi[list(layers)].sum()) for layers in places]
        numbers = sums if SAMPLERS[config.sampling].may_draw_nothing else _whole(sums, paths)
    else:
        if k < len(places):
            raise ConfigError(
                f"activated_layers is {k}, but the model has {len(places)} stacks of layers "
                f"({', '.join(paths)}), and every draw takes at least one layer of each; set it to "
                f"{len(places)} or more, or lisa.stacks to 'together'."
            )
        numbers = list(shared(int(k), [len(layers) for layers in places]))
    return tuple(map(DrawnStack, paths, places, numbers))


def _whole(sums: Sequence[float], paths: Sequence[str]) -> list[float]:
    """Whole numbers that the sums of π are; `ProbabilitiesError` where one is none."""
    for total, path in zip(sums, paths, strict=True):
        if abs(total - round(total)) > SUM_TOLERANCE:
            said = ", ".join(f"{s:.4g} in {p}" for s, p in zip(sums, paths, strict=True))
            raise ProbabilitiesError(
                f"inclusion probabilities sum to {said}, but every draw takes a whole number of "
                f"layers of each stack: make the file anew (lisa-analyze --probabilities shares "
                f"activated_layers between the stacks), scale those of {path}, or set lisa.stacks "
                "to 'together'."
            )
    return [round(total) for total in sums]


def stack_entries(stacks: Sequence[DrawnStack]) -> dict[str, Any]:
    """Return what a run's manifest says: how many layers, or how large a budget, of each stack."""
    if len(stacks) < 2:
        return {}
    return {"activated_of_stack": {stack.path: stack.k for stack in stacks}}


def sampler_of(
    config: LisaConfig,
    stacks: Sequence[DrawnStack],
    probabilities: Sequence[float] | None,
    control: Control,
    seed: int,
    weights: Array | None,
) -> tuple[Array, Sampler]:
    """Return π of the settings, before the control, and what draws by them.

    Parameters
    ----------
    config, probabilities, weights
        As in `drawn_stacks`.
    stacks
        What it returned.
    control
        What is done to π.
    seed
        Seed of the schedule.
    """
    count = sum(len(stack.layers) for stack in stacks)
    full = all(stack.k == len(stack.layers) for stack in stacks)
    if len(stacks) == 1 or (config.learn is not None and full):  # the latter is refused
        k = sum(stack.k for stack in stacks)
        return _of_one(config, count, k, probabilities, control, seed, weights)
    prior = probabilities
    if config.learn is not None and prior is None and not isinstance(config.learn.prior, str):
        prior = config.learn.prior
    if prior is not None and len(prior) != count:
        raise ProbabilitiesError(
            f"lisa.learn.prior has {len(prior)} numbers for a model of {count} layers; give one "
            "per layer."
        )
    given = np.empty(count)
    samplers: list[tuple[tuple[int, ...], Sampler]] = []
    settings = _in_stacks(config, stacks)
    for number, (stack, own) in enumerate(zip(stacks, settings, strict=True)):
        chosen = list(stack.layers)
        given[chosen], sampler = _of_one(
            own, len(chosen), stack.k, None if prior is None else [prior[i] for i in chosen],
            control.of_stack(number), seed_of_stack(seed, number),
            None if weights is None else weights[chosen], first=chosen[0],
        )  # fmt: skip
        samplers.append((stack.layers, sampler))
    return given, StackedSampler(samplers, seed)


def _of_one(
    config: LisaConfig,
    count: int,
    k: float,
    probabilities: Sequence[float] | None,
    control: Control,
    seed: int,
    weights: Array | None,
    first: int | None = None,
) -> tuple[Array, Sampler]:
    """π and sampler of layers that are drawn among themselves; `first` is the first of a stack."""
    learn = config.learn
    if learn is not None and not (first is not None and k == count):
        given = prior_probabilities(probabilities or learn.prior, count, k, weights)
        return given, LearnedSampler(given, k, seed, learn, control, weights, first=first or 0)
    if learn is not None:  # a stack of which every layer trains in every draw
        probabilities = None
    if weights is not None and probabilities is None:
        given = np.full(count, k / float(weights.sum()))
    elif first is not None and probabilities is not None and weights is None:
        given = np.array(probabilities, dtype=np.float64)  # checked as a part of the whole
    else:
        given = resolve(probabilities, count, k, weights)
    # What is never drawn is no case for a scheme of its own.
    sampling = config.sampling if k else "uniform"
    return given, make_sampler(sampling, control.of(given, None, weights), k, seed, weights)


def _in_stacks(config: LisaConfig, stacks: Sequence[DrawnStack]) -> list[LisaConfig]:
    """Return the settings of each stack: a pool of so many layers is shared like the layers."""
    learn: LearnConfig | None = config.learn
    pool = None if learn is None else Strength.of(learn.strength).pool
    if learn is None or not pool:
        return [config] * len(stacks)
    if pool < len(stacks):
        raise ConfigError(
            f"lisa.learn.strength is {learn.strength!r}, a pool of fewer layers than there are "
            f"stacks ({len(stacks)}); make it larger, or set lisa.stacks to 'together'."
        )
    depths = [len(stack.layers) for stack in stacks]
    return [
        dataclasses.replace(config, learn=dataclasses.replace(learn, strength=f"pool={size}"))
        for size in shared(min(pool, sum(depths)), depths)
    ]
