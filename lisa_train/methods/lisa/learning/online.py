"""What the engine does to learn: measure at the optimizer step, hand on before a draw."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.lisa.learning.all_layers import gradients_of_all, signal_of_halves
from lisa_train.methods.lisa.learning.config import LearnConfig
from lisa_train.methods.lisa.learning.evidence import Array
from lisa_train.methods.lisa.learning.step_metrics import STEP_METRICS, Signal
from lisa_train.methods.lisa.learning.visits import Visits
from lisa_train.methods.lisa.schedule import Schedule
from lisa_train.model.parallel import processes
from lisa_train.model.sharding import is_sharded
from lisa_train.optim.policies import POLICIES

Passes = Callable[[], object] | Sequence[Callable[[], object]] | None
"""A measuring pass of the model, or two of the halves of a batch."""


class NoLearning:
    """What the engine asks around its steps where nothing is learned."""

    def before_step(self, optimizer: Optimizer, owners: Mapping[Any, Optimizer]) -> None:
        """Measure nothing."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Measure nothing."""

    def finish(self, step: int) -> None:
        """Hand on nothing."""

    def probes_at(self, step: int) -> bool:
        """Make no measuring pass."""
        return False

    def start(self) -> None:
        """Begin no visit."""

    def close(self) -> None:
        """Nothing was begun."""

    def state_dict(self) -> dict[str, Any]:
        """Return entries of the engine's state: none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take nothing from the engine's state."""


class Learning(NoLearning):
    """Measures the layers that train and hands the numbers to the schedule.

    Parameters
    ----------
    model
        The model.
    settings
        What to learn from.
    schedule
        The schedule of a sampler that learns.
    units
        Tensors of every layer.
    loses_state
        Whether a layer that is frozen loses its optimizer state.
    probe
        For the metric ``probe``: makes a forward and a backward pass of the model. For ``signal``,
        two of them, of the halves of a batch, in place of micro-batches.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: LearnConfig,
        schedule: Schedule,
        units: Mapping[Any, Sequence[nn.Parameter]],
        *,
        loses_state: bool,
        probe: Passes,
    ) -> None:
        self._model = model
        self._schedule = schedule
        self._units = units
        self._layers = schedule.visits.size
        self._loses_state = loses_state
        self._probe = None if isinstance(probe, Sequence) else probe
        self._halves = probe if isinstance(probe, Sequence) else None
        self._probe_every = settings.probe_every
        # The draw before which a measuring pass was made last.
        self._probed = 0
        self._visits: Visits | None = None
        self._sizes = [sum(p.numel() for p in units[i]) for i in range(self._layers)]
        split = [is_sharded(p) for i in range(self._layers) for p in units[i]]
        if any(split):
            _refuse_split(settings.metric, split, halves=self._halves is not None)
        if self._halves is not None and (settings.metric != "signal" or len(self._halves) != 2):
            raise ConfigError(
                f"the engine got {len(self._halves)} functions as `probe` and lisa.learn.metric is "
                f"{settings.metric!r}: give two, of the halves of a batch, for 'signal', one for "
                "'probe', and none otherwise."
            )
        if self._probe is not None and settings.metric != "probe":
            raise ConfigError(
                "the engine got one function as `probe`, a pass of the model, and "
                f"lisa.learn.metric is {settings.metric!r}, which would never call it; set the "
                "metric to 'probe', or leave `probe` out."
            )
        if settings.metric == "probe":
            if probe is None:
                raise ConfigError(
                    "lisa.learn.metric is 'probe', whose measuring passes need data: give the "
                    "engine `probe`, a function that makes a forward and a backward pass "
                    "(lt.attach does), or choose 'grad_rms'."
                )
        elif self._halves is None:
            metric = STEP_METRICS[settings.metric]()
            metric.watch({i: units[i] for i in range(self._layers)})
            self._visits = Visits(metric, units, self._layers, sharded=any(split))

    # ------------------------------------------------------------------ around a step

    def before_step(self, optimizer: Optimizer, owners: Mapping[Any, Optimizer]) -> None:
        """Measure the gradients of the drawn layers that an optimizer is about to use."""
        if self._visits is None:
            return
        found = {
            layer: [
                p for p in self._units[layer] if p.grad is not None and owners.get(p) is optimizer
            ]
            for layer in self._schedule.layers
        }
        self._visits.before_step(optimizer, {i: some for i, some in found.items() if some})

    def after_step(self, optimizer: Optimizer) -> None:
        """Measure what the step did."""
        if self._visits is not None:
            self._visits.after_step(optimizer)

    # ------------------------------------------------------------------ between draws

    def finish(self, step: int) -> None:
        """Close the step that is made; before a draw, hand on what its visits showed."""
        if self._visits is not None:
            self._visits.end_step()
        if not self._schedule.draws_at(step):
            return
        if self._visits is not None:
            shown = self._visits.take()
            if shown is not None:
                self._schedule.learn(step, _of_the_first(shown))
        elif self._halves is not None and self.probes_at(step):
            self._probed = self._schedule.draw_of(step)
            products = signal_of_halves(
                self._model, self._units, self._layers, self._schedule.layers, self._halves
            )
            shown = products.copy()
            for i in np.flatnonzero(np.isfinite(products)):
                shown[i] = Signal().of_visit(products[[i]], self._sizes[i])
            self._schedule.learn(step, _of_the_first(shown))
        elif self._probe is not None and self.probes_at(step):
            self._probed = self._schedule.draw_of(step)
            shown = gradients_of_all(self._model, self._units, self._layers, self._probe)
            self._schedule.learn(step, shown)

    def probes_at(self, step: int) -> bool:
        """Whether a measuring pass is due after `step` completed steps."""
        if self._visits is not None or not self._schedule.draws_at(step):
            return False
        draw = self._schedule.draw_of(step)
        if self._halves is not None:
            return draw != self._probed
        return draw // self._probe_every > self._probed // self._probe_every

    def start(self) -> None:
        """Begin the visits of a draw that was made."""
        if self._visits is not None:
            new = {unit for unit, age in self._schedule.ages().items() if age == 0}
            layers = {i for i in self._schedule.layers if i in new}
            self._visits.start(layers if self._loses_state else ())

    def close(self) -> None:
        """Stop measuring."""
        if self._visits is not None:
            self._visits.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what is measured and not handed on yet, as JSON values of the engine's state."""
        visits = None if self._visits is None else self._visits.state_dict()
        return {"learning": {"probed": self._probed, "visits": visits}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned, out of the engine's state."""
        learning = state["learning"]
        self._probed = int(learning["probed"])
        if self._visits is not None:
            self._visits.load_state_dict(learning["visits"])


def learning_of(
    model: nn.Module,
    config: LisaConfig,
    schedule: Schedule,
    units: Mapping[Any, Sequence[nn.Parameter]],
    probe: Passes,
) -> NoLearning:
    """Return what learns by `config.learn`, or what learns nothing, see `Learning`."""
    if config.learn is None:
        if probe is not None:
            raise ConfigError(
                "the engine got `probe` and lisa.learn is None, so that nothing is learned from "
                "it; set lisa.learn, or leave `probe` out."
            )
        return NoLearning()
    loses_state = POLICIES[config.optimizer_state].place == "nowhere"
    return Learning(model, config.learn, schedule, units, loses_state=loses_state, probe=probe)


def _refuse_split(metric: str, split: Sequence[bool], *, halves: bool) -> None:
    """`ConfigError` for what is not measured of tensors that FSDP2 splits over processes."""
    if not all(split):
        raise ConfigError(
            f"lisa.learn.metric is {metric!r} with layers of which FSDP2 splits some tensors over "
            "processes and others not, whose parts do not add up; let it split all, or train with "
            "DDP."
        )
    if metric == "signal" and not halves:
        raise ConfigError(
            "lisa.learn.metric is 'signal' from micro-batches with weights that FSDP2 splits over "
            "processes, which adds micro-batches up before anybody sees their gradients; let a "
            "step have one (gradient_accumulation_steps: 1), whose halves are compared, give the "
            "engine two functions as `probe`, choose 'grad_rms', or train with DDP."
        )


def _of_the_first(values: Array) -> Array:
    """Numbers of the first process, in all of them: gradients may differ in their last bit."""
    if processes() == 1:
        return values
    said = [values.tolist()]
    dist.broadcast_object_list(said, src=0)
    return np.array(said[0])
