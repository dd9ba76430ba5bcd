"""The LISA engine: which tensors train now, and what becomes of the others. Knows no Trainer."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lisa_analysis.errors import ConfigError
from lisa_analysis.layers import kind_of
from lisa_train.config import LisaConfig
from lisa_train.input_gradients import stop_input_gradients
from lisa_train.layermap import LayerMap, find_layers, unwrap
from lisa_train.optimizer_state import FrozenState, start_schedule_free, unwrap_optimizer
from lisa_train.preconditions import (
    check_optimizer,
    check_warmup,
    given_probabilities,
    is_schedule_free,
    refuse_adapters_and_quantization,
)
from lisa_train.samplers import make_sampler, never_drawn, resolve, seed_word
from lisa_train.warmup import Warmup

logger = logging.getLogger(__name__)

Unit = int | str  # a layer's index, or the name of a group


@dataclass(frozen=True)
class Draw:
    """One draw: it rules the optimizer steps `step`+1 … up to the next draw.

    `visits` counts the draws of every layer so far, this one included; `groups` are the groups
    (embed, head) that were drawn beside the layers.
    """

    step: int
    index: int
    layers: tuple[int, ...]
    inclusion_probabilities: tuple[float, ...]
    visits: tuple[int, ...]
    groups: tuple[str, ...] = ()


class Lisa:
    """Trains a few layers at a time (LISA, arXiv 2403.17919, Algorithm 1) in any training loop.

    Call `begin_step` before the forward pass of every optimizer step. Between two draws only the
    drawn layers and the always-active groups require gradients; every other tensor has no
    gradient and no state in the optimizer. Closing restores every `requires_grad` flag.

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
        or when the optimizer lacks a tensor that may train.
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
        refuse_adapters_and_quantization(model)
        self.config = config
        self.layer_map = layer_map or find_layers(model, config.layers)
        self._model = model
        self._on_draw = on_draw
        self._optimizer = unwrap_optimizer(optimizer)
        n_layers = len(self.layer_map)
        pi = resolve(given_probabilities(config, self.layer_map), n_layers, config.activated_layers)
        self._seed = seed if config.seed is None else config.seed
        self._sampler = make_sampler(config.sampling, pi, config.activated_layers, self._seed)
        self._units = _units(model, self.layer_map, config)
        self._check_units()
        check_optimizer(self._optimizer, self._may_train())
        check_warmup(self._optimizer, config)
        if total_steps is not None:
            self._announce_coverage(total_steps)
        # From here on the model and the optimizer change; nothing above may leave a trace.
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._trainable = [p for p, flag in self._flags if flag]
        self._state = FrozenState(self._optimizer, config.optimizer_state)
        self._warmup = Warmup(config.warmup_steps)
        self._input_grads = stop_input_gradients(model)
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before_optimizer_step),
            self._optimizer.register_step_post_hook(self._after_optimizer_step),
            self._optimizer.register_load_state_dict_post_hook(self._after_optimizer_load),
        ]
        self._schedule_free = is_schedule_free(self._optimizer)
        self._index: int | None = None
        self._step = 0
        self._layers: tuple[int, ...] = ()
        self._groups: tuple[str, ...] = ()
        self._active: set[torch.Tensor] = set()
        self._activated_at: dict[Unit, int] = {}
        self._visits = np.zeros(n_layers, dtype=np.int64)
        self._closed = False

    # ------------------------------------------------------------------ what callers see

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Indices of the layers that train now; empty before the first step."""
        return self._layers

    @property
    def active_groups(self) -> tuple[str, ...]:
        """Groups that train now: the always-active ones and those drawn."""
        return (*self.config.always_active, *self._groups)

    @property
    def inclusion_probabilities(self) -> NDArray[np.float64]:
        """π of every layer, shape (L,)."""
        return self._sampler.inclusion_probabilities

    @property
    def visits(self) -> NDArray[np.int64]:
        """Draws of every layer so far, shape (L,)."""
        return self._visits.copy()

    def begin_step(self, step: int) -> None:
        """Prepare the optimizer step after `step` completed ones; draws at 0, K, 2K and so on.

        Call it once per optimizer step, before the first forward pass of its micro-batches.
        """
        if self._closed:
            raise ConfigError("this LISA engine is closed; make a new one to train on.")
        if step < 0:
            raise ConfigError(f"step counts completed optimizer steps from 0, got {step}.")
        self._step = step
        index = step // self.config.interval_steps
        if index == self._index:
            return
        before = set(self._drawn_units())
        self._index = index
        self._layers = self._sampler.draw(index)
        self._groups = self._draw_groups(index)
        self._activated_at = {
            unit: self._activated_at.get(unit, step) if unit in before else step
            for unit in self._drawn_units()
        }
        self._visits[list(self._layers)] += 1
        self._apply()
        self._report()

    def close(self) -> None:
        """Restore every `requires_grad` flag and leave the optimizer as a plain one."""
        if self._closed:
            return
        self._closed = True
        for hook in self._hooks:
            hook.remove()
        self._state.close()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        if self._input_grads:
            unwrap(self._model).enable_input_require_grads()

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
        return {
            "version": 1,
            "index": self._index,
            "step": self._step,
            "layers": list(self._layers),
            "groups": list(self._groups),
            "visits": self._visits.tolist(),
            "activated_at": {str(unit): step for unit, step in self._activated_at.items()},
            "interval_steps": self.config.interval_steps,
            "layer_names": list(self.layer_map.names),
            "sampler": self._sampler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, in the middle of an interval too.

        Load the model and the optimizer first or after, in any order.
        """
        if list(state["layer_names"]) != list(self.layer_map.names):
            raise ConfigError(
                f"the saved LISA state is of {len(state['layer_names'])} layers "
                f"({state['layer_names'][0]} …), this model has {len(self.layer_map)} "
                f"({self.layer_map.names[0]} …); resume with the model that it was saved with."
            )
        if state["interval_steps"] != self.config.interval_steps:
            raise ConfigError(
                f"the saved LISA state has interval_steps = {state['interval_steps']}, this run "
                f"{self.config.interval_steps}; resume with the setting that it was saved with."
            )
        self._sampler.load_state_dict(state["sampler"])
        self._index = state["index"]
        self._step = int(state["step"])
        self._layers = tuple(int(i) for i in state["layers"])
        self._groups = tuple(state["groups"])
        self._visits = np.array(state["visits"], dtype=np.int64)
        self._activated_at = {
            int(unit) if unit.isdigit() else unit: int(step)
            for unit, step in state["activated_at"].items()
        }
        if self._index is not None:
            self._apply()

    # ------------------------------------------------------------------ the mechanism

    def _apply(self) -> None:
        """Let exactly the active units require gradients; clear the rest out of the optimizer."""
        wanted = {p for unit in self._active_units() for p in self._units.get(unit, ())}
        for parameter in self._trainable:
            if parameter in wanted:
                if parameter not in self._active:
                    self._state.thaw(parameter)
                parameter.requires_grad_(True)
            else:
                parameter.requires_grad_(False)
                # A loop that zeroes gradients instead of dropping them would otherwise go on
                # moving the tensor by momentum and weight decay.
                parameter.grad = None
                self._state.freeze(parameter)
        self._active = wanted

    def _before_optimizer_step(self, *_: Any) -> None:
        """Drop gradients that somebody gave to frozen tensors; note where a warm-up starts."""
        for parameter in self._trainable:
            if parameter not in self._active:
                parameter.grad = None
            elif self._schedule_free:
                start_schedule_free(self._optimizer, parameter)
        self._warmup.before_step(
            (p, self._step - at)
            for unit, at in self._activated_at.items()
            for p in self._units[unit]
        )

    def _after_optimizer_step(self, *_: Any) -> None:
        """Shorten the update of tensors in their warm-up."""
        self._warmup.after_step()

    def _after_optimizer_load(self, *_: Any) -> None:
        """Sort the state that a checkpoint brought into active and frozen."""
        self._state.forget()
        if self._index is not None:
            for parameter in self._trainable:
                if parameter not in self._active:
                    self._state.freeze(parameter)

    def _drawn_units(self) -> tuple[Unit, ...]:
        return (*self._layers, *self._groups)

    def _active_units(self) -> tuple[Unit, ...]:
        return (*self._layers, *self.active_groups)

    def _draw_groups(self, index: int) -> tuple[str, ...]:
        """Groups with a probability of their own that draw `index` takes."""
        drawn = []
        for stream, (group, probability) in enumerate(self.config.group_probabilities.items()):
            key = [0x115B + stream, seed_word(self._seed), index]
            if np.random.default_rng(key).random() < probability:
                drawn.append(group)
        return tuple(drawn)

    def _report(self) -> None:
        """Log the draw and tell the listener."""
        assert self._index is not None
        seen = int((self._visits > 0).sum())
        logger.info(
            "step %d: training layers %s; %d of %d layers visited so far",
            self._step, ", ".join(map(str, self._layers)) or "none", seen, self._visits.size,
        )  # fmt: skip
        if self._on_draw is not None:
            self._on_draw(
                Draw(
                    self._step,
                    self._index,
                    self._layers,
                    tuple(self.inclusion_probabilities.tolist()),
                    tuple(self._visits.tolist()),
                    self._groups,
                )
            )

    def _may_train(self) -> dict[str, torch.Tensor]:
        """Return every tensor that can become active, by name."""
        units = [*range(len(self.layer_map)), *self.config.always_active]
        units += list(self.config.group_probabilities)
        wanted = {p for unit in units for p in self._units.get(unit, ())}
        return {name: p for name, p in self._model.named_parameters() if p in wanted}

    def _check_units(self) -> None:
        """Refuse what would leave an interval, or a layer, with nothing to train."""
        for i, name in enumerate(self.layer_map.names):
            if not self._units[i]:
                raise ConfigError(
                    f"layer {name} has no parameter that requires gradients, so drawing it would "
                    "train nothing; unfreeze the model (requires_grad_(True)) before LISA starts."
                )
        if self.config.head_probability is not None and not self.layer_map.groups["head"]:
            raise ConfigError(
                f"head_probability is {self.config.head_probability:g}, but this model's head is "
                "its embedding matrix (tied): set embed_probability instead."
            )
        always = any(self._units.get(group) for group in self.config.always_active)
        if self.config.sampling == "bernoulli" and not always:
            raise ConfigError(
                f"sampling='bernoulli' draws no layer at all in some intervals, and always_active "
                f"= {list(self.config.always_active)} trains nothing in this model; keep a group "
                "active or use sampling='uniform'."
            )

    def _announce_coverage(self, total_steps: int) -> None:
        draws = -(-total_steps // self.config.interval_steps)
        if missing := never_drawn(self._sampler, draws):
            logger.warning(
                "%d of %d layers (%s) will never train: %d steps make %d draws of %d layers; use "
                "a shorter interval_steps, more activated_layers, or sampling='balanced' or "
                "'cyclic'",
                len(missing), len(self.layer_map), ", ".join(map(str, missing)), total_steps,
                draws, self.config.activated_layers,
            )  # fmt: skip


def _units(
    model: nn.Module, layer_map: LayerMap, config: LisaConfig
) -> dict[Unit, tuple[torch.Tensor, ...]]:
    """Return the tensors with gradients of every layer and group.

    A matrix that is embedding and head at once belongs to both: it trains when either does.
    """
    parameters = dict(model.named_parameters())

    def pick(names: Iterable[str]) -> tuple[torch.Tensor, ...]:
        return tuple(parameters[n] for n in names if parameters[n].requires_grad)

    units: dict[Unit, tuple[torch.Tensor, ...]] = {
        i: pick(names) for i, names in enumerate(layer_map.layers)
    }
    for group, names in layer_map.groups.items():
        units[group] = pick(names)
    shared = [
        owner for name, owner in layer_map.tied.items() if kind_of(name, layer_path=None) == "head"
    ]
    units["head"] = tuple(dict.fromkeys((*units["head"], *pick(shared))))
    return units
