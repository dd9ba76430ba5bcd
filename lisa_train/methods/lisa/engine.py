"""The LISA engine: which tensors train now, and what becomes of the others. Knows no Trainer."""

import gc
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.layers import kind_of
from lisa_train.methods.lisa.checks import (
    check_optimizer,
    check_units,
    check_warmup,
    given_probabilities,
    is_schedule_free,
    refuse_adapters_and_quantization,
)
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.lisa.input_gradients import InputGradients
from lisa_train.methods.lisa.precision import ActivePrecision
from lisa_train.methods.lisa.recomputation import Recomputation
from lisa_train.methods.lisa.schedule import Draw as Draw
from lisa_train.methods.lisa.schedule import Schedule, Unit
from lisa_train.model.layer_map import LayerMap, find_layers
from lisa_train.optim.frozen_state import (
    FrozenState,
    on_load,
    start_schedule_free,
    unwrap_optimizer,
)
from lisa_train.optim.paged_state import check_paged_state
from lisa_train.optim.warmup import Warmup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What is settled before anything changes: layers, schedule, and what may train.

    `units` holds the tensors with gradients of every layer and group; `may_train` every tensor
    that can become active, by name.
    """

    config: LisaConfig
    layer_map: LayerMap
    schedule: Schedule
    units: dict[Unit, tuple[nn.Parameter, ...]]
    may_train: dict[str, nn.Parameter]

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
        _refuse_second_engine(model)
        refuse_adapters_and_quantization(model)
        layer_map = layer_map or find_layers(model, config.layers)
        probabilities = given_probabilities(config, layer_map)
        schedule = Schedule(config, layer_map.names, probabilities, seed)
        units = _units(model, layer_map)
        check_units(units, layer_map, config, schedule.inclusion_probabilities)
        chosen: list[Unit] = [*range(len(layer_map)), *config.always_active]
        chosen += list(config.group_probabilities)
        wanted = {p for unit in chosen for p in units[unit]}
        may_train = {name: p for name, p in model.named_parameters() if p in wanted}
        return cls(config, layer_map, schedule, units, may_train)

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """`ConfigError` unless `optimizer` can train all that may train."""
        check_optimizer(optimizer, self.may_train)
        check_paged_state(optimizer)
        check_warmup(optimizer, self.config)


class Lisa:
    """Trains a few layers at a time (LISA, arXiv 2403.17919, Algorithm 1) in any training loop.

    Call `begin_step` before the forward pass of every optimizer step. Between two draws only the
    drawn layers and the always-active groups require gradients; every other tensor has no
    gradient and no state in the optimizer. Closing restores every `requires_grad` flag.

    `torch.compile` compiles anew for every new set of active layers and, after 8 of them, runs
    uncompiled without a word (an error with ``fullgraph=True``): set
    `torch._dynamo.config.recompile_limit`, and beyond 256 `accumulated_recompile_limit` as well,
    above the number of draws to come.

    Parameters
    ----------
    model
        The model, with `requires_grad` set on everything that may train. What is frozen now stays
        frozen.
    optimizer
        An optimizer of all tensors that may train, each in one parameter group.
    config
        The settings.
    layer_map
        The layers; None finds them.
    seed
        Seed of the schedule where `config.seed` is None.
    total_steps
        Optimizer steps to come, for the announcement of layers that will never be drawn.
    on_draw
        Called with every `Draw`.

    Raises
    ------
    ConfigError
        When the model has adapters or a quantized base, when the numbers do not fit its layers,
        when the optimizer lacks a tensor that may train or pages its state in an unknown way, or
        when another engine is open on the model.
    ProbabilitiesError
        When the probabilities are infeasible or made for another model.

    Examples
    --------
    >>> with Lisa(model, optimizer, LisaConfig(activated_layers=2)) as engine:  # doctest: +SKIP
    ...     for step, batch in enumerate(batches):
    ...         engine.begin_step(step)
    ...         model(**batch).loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: LisaConfig,
        *,
        layer_map: LayerMap | None = None,
        seed: int = 0,
        total_steps: int | None = None,
        on_draw: Callable[[Draw], None] | None = None,
    ) -> None:
        plan = Plan.make(model, config, layer_map=layer_map, seed=seed)
        self._optimizer = unwrap_optimizer(optimizer)
        plan.check_optimizer(self._optimizer)
        self.config = config
        self.layer_map = plan.layer_map
        self._schedule = plan.schedule
        self._units = plan.units
        self._on_draw = on_draw
        if total_steps is not None:
            self._announce_coverage(total_steps)
        # From here on the model and the optimizer change; nothing above leaves a trace.
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._trainable = [p for p, flag in self._flags if flag]
        self._active: set[nn.Parameter] = set()
        self._loaded = False  # the optimizer holds a checkpoint's state, not yet sorted
        self._precision = (
            ActivePrecision(model, self._trainable, self._schedule.seed)
            if config.precision == "fp32_active"
            else None
        )
        self._recomputation = (
            Recomputation(model, self.layer_map) if config.recompute == "frozen" else None
        )
        self._state = FrozenState(self._optimizer, config.optimizer_state)
        self._schedule_free = is_schedule_free(self._optimizer)
        self._warmup = Warmup(config.warmup_steps)
        self._input_gradients = InputGradients(
            model, embeddings_train="embed" in config.always_active
        )
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_optimizer_step),
            self._optimizer.register_step_post_hook(self._after_optimizer_step),
        ]
        self._end_load_hook = on_load(self._optimizer, self._after_optimizer_load)
        self._closed = False
        _engines.add(self)

    # ------------------------------------------------------------------ what callers see

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Indices of the layers that train now; empty before the first step."""
        return self._schedule.layers

    @property
    def active_groups(self) -> tuple[str, ...]:
        """Groups that train now: the always-active ones and those drawn."""
        return (*self.config.always_active, *self._schedule.groups)

    @property
    def inclusion_probabilities(self) -> NDArray[np.float64]:
        """π of every layer, shape (L,)."""
        return self._schedule.inclusion_probabilities

    @property
    def visits(self) -> NDArray[np.int64]:
        """Draws of every layer so far, shape (L,)."""
        return self._schedule.visits.copy()

    def begin_step(self, step: int) -> None:
        """Prepare the optimizer step after `step` completed ones; draws at 0, K, 2K and so on.

        Call it once per optimizer step, before the first forward pass of its micro-batches.
        """
        if self._closed:
            raise ConfigError("this LISA engine is closed; make a new one to train on.")
        draw = self._schedule.advance(step)
        if draw is None:
            return
        self._apply()
        logger.info(
            "step %d: training layers %s; %d of %d layers visited so far",
            step, ", ".join(map(str, draw.layers)) or "none",
            int((self.visits > 0).sum()), len(self.layer_map),
        )  # fmt: skip
        if self._on_draw is not None:
            self._on_draw(draw)

    def close(self) -> None:
        """Restore every `requires_grad` flag and leave the optimizer as a plain one."""
        if self._closed:
            return
        self._closed = True
        _engines.discard(self)
        for hook in self._hooks:
            hook.remove()
        self._end_load_hook()
        self._state.close()
        if self._precision is not None:
            self._precision.close(self._schedule.index or 0)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._input_gradients.restore()
        if self._recomputation is not None:
            self._recomputation.restore()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside model and optimizer, as JSON values."""
        return self._schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, in the middle of an interval too.

        The model and the optimizer may be loaded before or after, except with
        ``precision="fp32_active"``: see `tensors`.
        """
        self._schedule.load_state_dict(state)
        if self._schedule.index is not None:
            self._apply()

    def tensors(self) -> dict[str, Any]:
        """Return the fp32 weights and optimizer state, which a bf16 model's checkpoint rounds.

        Save it beside the others with ``precision="fp32_active"``, and hand it to `load_tensors`
        after everything else is loaded.
        """
        weights = [p.detach() if p in self._active else None for p in self._trainable]
        return {"weights": weights, "optimizer": self._optimizer.state_dict()["state"]}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Take up what `tensors` returned, to the bit; call it after `load_state_dict`."""
        for parameter, weight in zip(self._trainable, tensors["weights"], strict=True):
            if weight is not None:
                parameter.copy_(weight)
        self._state.replace(tensors["optimizer"], self._active)

    def rules(self, tensors: Set[torch.Tensor]) -> bool:
        """Whether this engine is open and decides about any of `tensors`."""
        return not self._closed and any(p in tensors for p, _ in self._flags)

    # ------------------------------------------------------------------ the mechanism

    def _apply(self) -> None:
        """Let exactly the active units require gradients; clear the rest out of the optimizer."""
        units: list[Unit] = [*self._schedule.layers, *self.active_groups]
        wanted = {p for unit in units for p in self._units[unit]}
        for parameter in self._trainable:
            if parameter in wanted:
                self._activate(parameter)
            else:
                self._freeze(parameter)
        self._active = wanted
        if self._recomputation is not None:
            self._recomputation.spare(self._schedule.layers)

    def _activate(self, parameter: nn.Parameter) -> None:
        if parameter not in self._active:
            self._state.thaw(parameter)
        if self._precision is not None:
            self._precision.raise_(parameter)
        parameter.requires_grad_(True)

    def _freeze(self, parameter: nn.Parameter) -> None:
        parameter.requires_grad_(False)
        # A loop that zeroes gradients instead of dropping them would otherwise go on moving the
        # tensor by momentum and weight decay.
        parameter.grad = None
        self._state.freeze(parameter)
        if self._precision is not None:
            self._precision.lower(parameter, self._schedule.index or 0)

    def _before_optimizer_step(self, *_: Any) -> None:
        """Drop gradients that somebody gave to frozen tensors; note where a warm-up starts."""
        if self._schedule.index is None:
            raise ConfigError(
                "the optimizer steps before LISA has drawn any layer; call begin_step(step) before "
                "the forward pass of every optimizer step."
            )
        self._sort_loaded_state()
        for parameter in self._trainable:
            if parameter not in self._active:
                parameter.grad = None
            elif self._schedule_free:
                start_schedule_free(self._optimizer, parameter)
        # A tensor without a gradient does not move: one that steps inside backward is alone here.
        self._warmup.before_step(
            (p, age)
            for unit, age in self._schedule.ages().items()
            for p in self._units[unit]
            if p.grad is not None
        )

    def _after_optimizer_step(self, *_: Any) -> None:
        """Shorten the update of tensors in their warm-up."""
        self._warmup.after_step()

    def _after_optimizer_load(self, *_: Any) -> None:
        """Note that a checkpoint brought state.

        Which of it is active is known when the engine's own state is loaded, perhaps after this.
        """
        self._state.loaded()
        self._loaded = True

    def _sort_loaded_state(self) -> None:
        """Take the state of frozen tensors out of what a checkpoint brought."""
        if self._loaded:
            self._loaded = False
            for parameter in self._trainable:
                if parameter not in self._active:
                    self._state.freeze(parameter)

    def _announce_coverage(self, total_steps: int) -> None:
        """Warn of layers that a schedule of so many steps never reaches."""
        if missing := self._schedule.never_drawn(total_steps):
            logger.warning(
                "%d of %d layers (%s) will never train: %d steps with interval_steps = %d and "
                "activated_layers = %d do not reach them; use a shorter interval, more layers, or "
                "sampling='balanced' or 'cyclic'",
                len(missing), len(self.layer_map), ", ".join(map(str, missing)), total_steps,
                self.config.interval_steps, self.config.activated_layers,
            )  # fmt: skip


# Every engine that is not closed yet; see `_refuse_second_engine`.
_engines: "weakref.WeakSet[Lisa]" = weakref.WeakSet()


def _refuse_second_engine(model: nn.Module) -> None:
    """`ConfigError` when an open engine rules a tensor of the model: each would undo the other."""
    tensors = set(model.parameters())
    if any(engine.rules(tensors) for engine in _engines):
        gc.collect()  # an engine and its hooks refer to each other, and may be garbage already
    if any(engine.rules(tensors) for engine in _engines):
        raise ConfigError(
            "another LISA engine is open on this model, and the two would freeze each other's "
            "layers; close it first (engine.close(), or use it in a with block)."
        )


def _units(model: nn.Module, layer_map: LayerMap) -> dict[Unit, tuple[nn.Parameter, ...]]:
    """Return the tensors with gradients of every layer and group.

    A matrix that is embedding and head at once belongs to both: it trains when either does.
    """
    parameters = dict(model.named_parameters())

    def pick(names: Iterable[str]) -> tuple[nn.Parameter, ...]:
        return tuple(parameters[n] for n in names if parameters[n].requires_grad)

    units: dict[Unit, tuple[nn.Parameter, ...]] = {
        **{i: pick(names) for i, names in enumerate(layer_map.layers)},
        **{group: pick(names) for group, names in layer_map.groups.items()},
    }
    shared = [
        owner for name, owner in layer_map.tied.items() if kind_of(name, layer_path=None) == "head"
    ]
    units["head"] = tuple(dict.fromkeys((*units["head"], *pick(shared))))
    return units
