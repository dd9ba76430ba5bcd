"""What is settled before LISA changes anything: layers, schedule, and what may train."""

import dataclasses
import gc
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer

from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.checks import (
    check_budget,
    check_optimizers,
    check_precision,
    check_units,
    check_warmup,
    given_probabilities,
    refuse_adapters_and_quantization,
    refuse_sharded_parts,
)
from lisa_train.methods.lisa.config import TOWER, LisaConfig
from lisa_train.methods.lisa.schedule import Schedule
from lisa_train.methods.lisa.stacks import stack_entries
from lisa_train.methods.lisa.units import Units
from lisa_train.model.layer_cache import known_layers
from lisa_train.model.layer_map import LayerMap, Unit
from lisa_train.model.parallel import agree_on_start, refuse_unproved, refuse_wrappers
from lisa_train.model.towers import sense_towers
from lisa_train.optim.frozen_state import optimizers_of
from lisa_train.optim.paged_state import check_paged_state


@dataclass(frozen=True)
class Plan:
    """What is settled before anything changes: layers, schedule, and what may train.

    `turns` says what takes turns, `units` holds the tensors with gradients of each of it, by its
    index, and of every group; `may_train` every tensor that can become active, by name;
    `probabilities` are those of the settings, read from their file, None for equal ones.
    """

    config: LisaConfig
    layer_map: LayerMap
    turns: Units
    schedule: Schedule
    units: dict[Unit, tuple[nn.Parameter, ...]]
    may_train: dict[str, nn.Parameter]
    probabilities: tuple[float, ...] | None

    @classmethod
    def make(
        cls,
        model: nn.Module,
        config: LisaConfig,
        *,
        layer_map: LayerMap | None = None,
        seed: int = 0,
    ) -> Self:
        """Check the model against the settings; `ConfigError` or `ProbabilitiesError`."""
        refuse_wrappers(model, "LISA")  # first: nothing in such a model is where it should be
        _refuse_second_engine(model)
        refuse_adapters_and_quantization(model)
        layer_map = layer_map or known_layers(model, config.layers)
        turns = Units.of(model, layer_map, config.by)
        probabilities = given_probabilities(config, layer_map, turns)
        units = turns.parameters(model, layer_map)
        empty = [group for group, names in layer_map.groups.items() if not names]
        empty += [] if units[TOWER] else [TOWER]
        schedule = schedule_of(config, turns, probabilities, seed, empty_groups=empty)
        drawn = [i for i in range(len(turns)) if i not in schedule.excluded]
        check_units(units, layer_map, config, drawn, may_draw_nothing=schedule.may_draw_nothing)
        chosen: list[Unit] = [*drawn, *config.always_active]
        chosen += list(config.group_probabilities)
        wanted = {p for unit in chosen for p in units[unit]}
        may_train = {name: p for name, p in model.named_parameters() if p in wanted}
        plan = cls(config, layer_map, turns, schedule, units, may_train, probabilities)
        refuse_sharded_parts(model, config)
        refuse_unproved(model, rotates=plan.rotates(model))
        return plan

    def check_optimizer(self, optimizer: Any) -> tuple[Optimizer, ...]:
        """Return the optimizers; `ConfigError` unless they can train all that may train.

        Parameters
        ----------
        optimizer
            A torch optimizer, a list of several, or a wrapper of either.
        """
        optimizers = optimizers_of(optimizer)
        check_optimizers(optimizers, self.may_train, self.config.optimizer_state)
        for held in optimizers:
            check_paged_state(held)
        check_warmup(optimizers, self.config)
        check_precision(optimizers, self.config)
        return optimizers

    def loaded_config(self) -> LisaConfig:
        """Return the settings with the probabilities of their file, which is read once."""
        learn = self.config.learn
        if learn is None:
            return dataclasses.replace(self.config, probabilities=self.probabilities)
        if self.probabilities is None:
            return self.config
        learn = dataclasses.replace(learn, prior=self.probabilities)
        return dataclasses.replace(self.config, learn=learn)

    def with_seed(self, seed: int) -> Self:
        """Return the same plan with the schedule of another seed."""
        config = dataclasses.replace(self.config, seed=seed)
        return dataclasses.replace(self, config=config, schedule=self.schedule.with_config(config))

    def settings(self) -> dict[str, Any]:
        """What has to be the same in all processes that train one model, and the seed."""
        config = dataclasses.asdict(self.config)
        config.pop("probabilities")  # perhaps the path of one file, as each machine sees it
        if self.config.learn is not None:
            config["learn"].pop("prior")  # so is this
        return config | {
            "seed": self.schedule.seed,
            "inclusion_probabilities": self.schedule.given.tolist(),
            "layer_names": list(self.turns.names),
            "tensors": list(self.may_train),
        }

    def entries(self, model: nn.Module) -> dict[str, Any]:
        """What run.json says under `lisa` beside the settings: what was found in the model."""
        found = self.turns.entries(self.schedule.control) | stack_entries(self.schedule.stacks)
        if self.units[TOWER] and TOWER not in self.config.always_active:
            found["resting_towers"] = list(sense_towers(model, self.layer_map))
        return found

    def rotates(self, model: nn.Module) -> bool:
        """Whether any tensor with gradients ever rests."""
        certain: list[Unit] = [*self.schedule.always_drawn, *self.config.always_active]
        certain += [g for g, p in self.config.group_probabilities.items() if p == 1]
        always = {p for unit in certain for p in self.units[unit]}
        return any(p.requires_grad and p not in always for p in model.parameters())


def schedule_of(
    config: LisaConfig,
    turns: Units,
    probabilities: Sequence[float] | None,
    seed: int,
    *,
    empty_groups: Collection[str] = (),
) -> Schedule:
    """Return the schedule by which layers, halves or modules take turns."""
    budget = None
    if config.by != "layer":
        check_budget(config, turns)
        whole = config.activated_layers / turns.count
        budget = whole if config.budget is None else config.budget
    return Schedule(
        config, turns.names, probabilities, seed,
        empty_groups=empty_groups, weights=turns.weights, budget=budget, stacks=turns.stacks,
    )  # fmt: skip


def agreed_plan(
    model: nn.Module, optimizer: Any, config: LisaConfig, layer_map: LayerMap | None, seed: int
) -> tuple[Plan, tuple[Optimizer, ...], list[int]]:
    """Return the plan, the optimizers, and the seeds that all processes came with."""
    plan: Plan | None = None
    optimizers: tuple[Optimizer, ...] = ()
    problem: Exception | None = None
    try:
        plan = Plan.make(model, config, layer_map=layer_map, seed=seed)
        optimizers = plan.check_optimizer(optimizer)
    except Exception as error:
        problem = error  # said to the other processes before it is raised
    agreed, seeds = agree_on_start(plan.settings() if plan is not None else None, problem)
    if problem is not None:
        raise problem
    assert plan is not None
    assert agreed is not None
    if agreed["seed"] != plan.schedule.seed:
        plan = plan.with_seed(agreed["seed"])
    return plan, optimizers, seeds


# Every engine that is not closed yet; see `_refuse_second_engine`.
open_engines: weakref.WeakSet[Any] = weakref.WeakSet()


def _refuse_second_engine(model: nn.Module) -> None:
    """`ConfigError` when an open engine rules a tensor of the model: each would undo the other."""
    tensors = set(model.parameters())
    if any(engine.rules(tensors) for engine in open_engines):
        gc.collect()  # an engine and its hooks refer to each other, and may be garbage already
    if any(engine.rules(tensors) for engine in open_engines):
        raise ConfigError(
            "another LISA engine is open on this model, and the two would freeze each other's "
            "layers; close it first (engine.close(), or use it in a with block)."
        )
