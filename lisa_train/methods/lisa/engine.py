"""The LISA engine: which tensors train now, and what becomes of the others. Knows no Trainer."""

from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn
from torch.optim import Optimizer

from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.active import ActiveTensors
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.lisa.gradient_average import GradientAverage
from lisa_train.methods.lisa.gradient_reach import GradientReach
from lisa_train.methods.lisa.learning.online import Passes, learning_of
from lisa_train.methods.lisa.notices import Notices
from lisa_train.methods.lisa.plan import Plan as Plan
from lisa_train.methods.lisa.plan import agreed_plan, open_engines
from lisa_train.methods.lisa.schedule import Draw as Draw
from lisa_train.model.layer_map import LayerMap, Unit
from lisa_train.model.master_copies import exact
from lisa_train.model.run_entries import announce, joined, lisa_entries
from lisa_train.optim.schedule_free import is_schedule_free, start_schedule_free
from lisa_train.optim.warmup import Warmup
from lisa_train.optim.write_check import WriteCheck
from lisa_train.private_names import check


class Lisa:
    """Trains a few layers at a time (LISA, arXiv 2403.17919, Algorithm 1) in any training loop.

    Call `begin_step` before the forward pass of every optimizer step. Between two draws only the
    drawn layers and the always-active groups require gradients; every other tensor has no
    gradient and no state in the optimizer. Closing restores every `requires_grad` flag.

    `torch.compile` compiles anew for every new set of active layers and, after 8 of them, runs
    uncompiled without a word (an error with ``fullgraph=True``): set
    `torch._dynamo.config.recompile_limit`, and beyond 256 `accumulated_recompile_limit` as well,
    above the number of draws to come.

    In several processes every one makes an engine of its own copy of the model, at the same time,
    and all draw by the seed of the first, begin with its weights and average the gradients of what
    trains (`average_gradients`). A model that is wrapped in `DistributedDataParallel` is averaged
    by that, which needs ``find_unused_parameters=True``.

    Parameters
    ----------
    model
        The model, with `requires_grad` set on everything that may train. What is frozen now stays
        frozen.
    optimizer
        An optimizer of all tensors that may train, or a list of several (Muon for matrices,
        AdamW for the rest), or a wrapper that holds them in `optimizers`: every tensor in one
        parameter group of one of them.
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
    on_notice
        Called with every sentence that this says, at the start and later; they are logged too,
        by the first process.
    averages
        False where `DistributedDataParallel` is around `model`, and averages gradients.
    probe
        With ``learn.metric="probe"``: makes a forward and a backward pass of the model (not of
        its DDP wrapper) for a measurement that leaves no gradient. With ``"signal"``: two such
        functions, of the halves of the last batch, where a step has one micro-batch.

    Attributes
    ----------
    config : LisaConfig
        The settings, with the seed of the first process where several differ.
    layer_map : LayerMap
        The layers.
    rotates : bool
        Whether any tensor ever rests.

    Raises
    ------
    ConfigError
        When the model has adapters or a quantized base, when the numbers do not fit its layers,
        when the optimizer lacks a tensor that may train, moves all its tensors together or pages
        its state in an unknown way, when another engine is open on the model, or when the model
        is trained on several devices in a way that is not proved.
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
        on_notice: Callable[[str], None] | None = None,
        averages: bool = True,
        probe: Passes = None,
    ) -> None:
        check("model", "engine")
        plan, optimizers, seeds = agreed_plan(model, optimizer, config, layer_map, seed)
        self._schedule_free = {o for o in optimizers if is_schedule_free(o)}
        self._optimizers = optimizers
        self.config = plan.config
        self.layer_map = plan.layer_map
        self._schedule = plan.schedule
        self._turns = plan.turns
        self._units = plan.units
        self._entries = plan.entries(model)
        self._on_draw = on_draw
        self._notices = Notices(on_notice)
        self.rotates = plan.rotates(model)
        missing = () if total_steps is None else self._schedule.never_drawn(total_steps)
        self._notices.at_start(
            model, self.layer_map, self.config, self._units, self._turns, self._schedule.stacks,
            self._schedule.excluded, missing, total_steps, seeds,
        )  # fmt: skip
        seen = self._turns.measured(self._units)
        self._learning = learning_of(model, self.config, self._schedule, seen, probe)
        # From here on the model and the optimizer change; nothing above leaves a trace.
        self._average = GradientAverage(model, wanted=averages)
        seed = self._schedule.seed
        self._active = ActiveTensors(model, self.config, optimizers, self.layer_map, seed)
        self._state = self._active.state
        self._reach = GradientReach(self._units, self._turns.part_names)
        self._write_check = WriteCheck()
        self._warmup = Warmup(config.warmup_steps)
        self._active.hook(self._before_optimizer_step, self._after_optimizer_step)
        self._closed = False
        open_engines.add(self)
        announce(self)

    # ------------------------------------------------------------------ what callers see

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Indices of the layers that train now, whole or in part; empty before the first step."""
        return self._turns.layers_of(self._schedule.layers)

    @property
    def active_groups(self) -> tuple[str, ...]:
        """Groups that train now: the always-active ones and those drawn."""
        return (*self.config.always_active, *self._schedule.groups)

    @property
    def inclusion_probabilities(self) -> NDArray[np.float64]:
        """π of every layer (or part) in the present draw, shape (L,)."""
        return self._schedule.inclusion_probabilities

    @property
    def visits(self) -> NDArray[np.int64]:
        """Draws of every layer (or part) so far, shape (L,)."""
        return self._schedule.visits.copy()

    @property
    def coverage(self) -> dict[str, list[Any]]:
        """Draws of every layer so far, and what no draw took: for a run's result."""
        return self._turns.coverage(self._schedule.visits)

    def begin_step(self, step: int) -> None:
        """Prepare the optimizer step after `step` completed ones; draws at 0, K, 2K and so on.

        Call it once per optimizer step, before the first forward pass of its micro-batches. The
        number counts the steps of the whole training, over all epochs.
        """
        if self._closed:
            raise ConfigError("this LISA engine is closed; make a new one to train on.")
        self._average.begin_step()
        self.finish_step(step)
        draw = self._schedule.advance(step)
        if draw is None:
            return
        self._notices.unreached(self._reach.found())
        self._reach.start(step)
        self._apply()
        self._learning.start()
        draw = replace(
            self._turns.named(draw),
            trainable_share=self._active.share(),
            state_bytes=self._state.bytes(),
            update_factors=self._schedule.update_factors(),
        )
        self._notices.drawn(draw, self._turns)
        if self._on_draw is not None:
            self._on_draw(draw)

    def finish_step(self, step: int) -> None:
        """Take note that `step` steps are completed; learn, if a draw comes next.

        `begin_step` does it too. Called by itself, after the optimizer's step, it has a checkpoint
        of this step hold what was learned, and a measuring pass made while its batch is at hand.
        """
        self._reach.end_step(self._schedule.layers)
        self._learning.finish(step)
        self._notices.frozen(self._schedule.frozen)

    def probes_at(self, step: int) -> bool:
        """Whether `finish_step(step)` or `begin_step(step)` is to make a measuring pass."""
        return self._learning.probes_at(step)

    def learn(self, step: int, layer_scores: ArrayLike) -> None:
        """Hand the sampler what was measured of the layers, for the draws to come.

        Samplers that learn nothing ignore it. All processes call it with the same numbers.

        Parameters
        ----------
        step
            Completed optimizer steps.
        layer_scores
            One number per layer, shape (L,); NaN where none was measured.
        """
        self._schedule.learn(step, layer_scores)

    def average_gradients(self) -> None:
        """Give the active tensors the mean of all processes' gradients, once per optimizer step.

        The optimizer's step does it too: call it before, after the last backward pass, where
        gradients are looked at or clipped. All processes do, together. In one process, and where
        `DistributedDataParallel` has done it, nothing happens.
        """
        self._average.average([p for p in self._active.trainable if p in self._active.now])

    def close(self) -> None:
        """Restore every `requires_grad` flag and leave the optimizer as a plain one."""
        if self._closed:
            return
        self._closed = True
        self._reach.end_step(self._schedule.layers)
        self._notices.unreached(self._reach.found())
        open_engines.discard(self)
        self._learning.close()
        self._active.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside model and optimizer, as JSON values."""
        return self._schedule.state_dict() | self._learning.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, in the middle of a period too.

        The model and the optimizer may be loaded before or after, except with
        ``precision="fp32_active"``: see `tensors`.
        """
        self._schedule.load_state_dict(state)
        self._learning.load_state_dict(state)
        self._reach.start(self._schedule.step)
        if self._schedule.index is not None:
            self._apply()

    def tensors(self) -> dict[str, Any]:
        """Return the fp32 weights and optimizer state, which a bf16 model's checkpoint rounds.

        Save it beside the others with ``precision="fp32_active"``, and hand it to `load_tensors`
        after everything else is loaded. Where FSDP2 splits the weights, all processes call it
        together, and each gets whole tensors, which any number of processes can load.
        """
        return self._active.tensors()

    def load_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Take up what `tensors` returned, to the bit; call it after `load_state_dict`."""
        self._active.load_tensors(tensors)

    def rules(self, tensors: Set[torch.Tensor]) -> bool:
        """Whether this engine is open and decides about any of `tensors`."""
        return not self._closed and self._active.rules(tensors)

    def run_entries(self) -> dict[str, Any]:
        """Entries of a run's `run.json` that say how this engine trains."""
        return joined(lisa_entries(self.config, self._schedule.seed), {"lisa": self._entries})

    # ------------------------------------------------------------------ the mechanism

    def _apply(self) -> None:
        """Let exactly the active units require gradients; clear the rest out of the optimizer."""
        drawn: tuple[Unit, ...] = (*self._schedule.layers, *self.active_groups)
        wanted = {p for unit in drawn for p in self._units[unit]}
        self._active.choose(wanted, self.active_layers)
        self._write_check.start(self._optimizers)

    def _before_optimizer_step(
        self, optimizer: Optimizer, arguments: tuple[Any, ...] = (), named: Any = None
    ) -> None:
        """Drop gradients that somebody gave to frozen tensors; note where a warm-up starts."""
        if self._schedule.index is None:
            raise ConfigError(
                "the optimizer steps before LISA has drawn any layer; call begin_step(step) before "
                "the forward pass of every optimizer step."
            )
        self.average_gradients()
        frozen = [p for p in self._active.of[optimizer] if p not in self._active.now]
        self._state.sort_loaded(optimizer, frozen)
        for parameter in frozen:
            parameter.grad = None
        if optimizer in self._schedule_free:
            for parameter in self._active.of[optimizer]:
                if parameter in self._active.now:
                    start_schedule_free(optimizer, parameter)
        self._reach.look(self._schedule.layers)
        self._learning.before_step(optimizer, self._state.owners)
        self._write_check.before_step(optimizer, frozen)
        # A tensor without a gradient does not move: one that steps inside backward is alone here.
        self._warmup.before_step(
            (exact(p), age, self._schedule.update_factor(unit))
            for unit, age in self._schedule.ages().items()
            for p in self._units[unit]
            if p.grad is not None and self._state.owners.get(p) is optimizer
        )
        closure = (named or {}).get("closure", next(iter(arguments[1:]), None))  # after itself
        self._active.before_step(optimizer, closure)

    def _after_optimizer_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Shorten the update of tensors in their warm-up; after a draw, check the frozen ones."""
        moved = self._active.after_step(optimizer)
        self._warmup.after_step()
        self._learning.after_step(optimizer)
        self._write_check.after_step(optimizer)
        self._active.round(moved, self._schedule.step)
