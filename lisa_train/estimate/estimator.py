"""From one setting to bytes: which draws may cost the most, and what each of them holds."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lisa_analysis.contract.errors import ConfigError
from lisa_train.estimate.optimizers import OptimizerKind, StateBytes
from lisa_train.estimate.patterns import (
    Places,
    check_layers,
    draw_costs,
    drawable,
    lisa_pattern,
    may_train,
    part_costs,
    places,
    plain_pattern,
    schedule_for,
    some_draws,
    turns_of,
    units_of,
)
from lisa_train.estimate.result import DeviceMemory, MemoryEstimate
from lisa_train.estimate.setting import Setting
from lisa_train.estimate.spread import ParameterBytes, by_layers, sharded, whole
from lisa_train.estimate.stage import Stage
from lisa_train.estimate.step import Pattern, record_step
from lisa_train.estimate.trace import Trace
from lisa_train.methods.lisa.samplers import SAMPLERS
from lisa_train.optim.policies import POLICIES

_FP32 = 4


class Estimator:
    """Everything that one estimate shares: the model, the optimizer, bytes per tensor."""

    def __init__(self, stage: Stage, setting: Setting, kind: OptimizerKind) -> None:
        self.stage, self.setting, self.kind = stage, setting, kind
        self.parameters = dict(stage.model.named_parameters())
        self._wide = stage.wide_states(setting)
        self._pieces = setting.devices if setting.spread == "fsdp" else 1
        self._known: dict[Any, StateBytes] = {}

    def run(self) -> MemoryEstimate:
        """Return the estimate: of a rotation, of the draw that costs the most."""
        setting, stage = self.setting, self.stage
        rotation = setting.rotation
        if rotation is None:
            return self._result(plain_pattern(stage), ())
        if setting.active_layers is not None:
            if rotation.by != "layer":
                raise ConfigError(
                    f"active_layers names whole layers, but lisa.by is {rotation.by!r}; leave it "
                    "out, and the draw that costs the most is looked for."
                )
            check_layers(stage, setting.active_layers)
            return self._of_layers(setting.active_layers)
        if rotation.by != "layer":
            return self._of_parts()
        draws = some_draws(stage, setting)  # refuses numbers that do not fit the model
        costs = draw_costs(stage, setting, self._held)
        groups = tuple(rotation.group_probabilities)
        regions = self._regions()
        candidates = {costs.worst(region, groups) for region in regions}
        if setting.gradient_checkpointing:
            # Backward begins at the top, where the inputs of all layers still stand.
            candidates |= {
                tuple(i for among, k in region for i in among[len(among) - k :])
                for region in regions
            }
        worst = max(map(self._of_layers, sorted(candidates)), key=lambda result: result.total)
        if setting.devices > 1:
            return worst
        spared = max(0.0, costs.of(worst.active_layers, groups) - costs.mean(draws))
        return replace(worst, mean=int(worst.total - spared))

    @property
    def _any_size(self) -> bool:
        """Whether a draw of the rotation may take every layer."""
        rotation = self.setting.rotation
        return rotation is not None and SAMPLERS[rotation.sampling].may_draw_nothing

    def _of_parts(self) -> MemoryEstimate:
        """Of the draws of halves or modules that may cost the most, the one that does."""
        setting, stage = self.setting, self.stage
        if setting.devices > 1 and setting.spread == "fsdp":
            raise ConfigError(
                f"lisa.by is {setting.lisa.by!r}, which FSDP2 (spread='fsdp') does not train; "
                "estimate it on one device, or with spread='layers'."
            )
        draws = some_draws(stage, setting)
        costs = part_costs(stage, setting, self._held)
        among = drawable(stage, setting)
        every = self._any_size
        candidates = [among] if every else costs.candidates(among)
        results = {parts: self._result(lisa_pattern(stage, setting, parts), parts)
                   for parts in candidates}  # fmt: skip
        parts, worst = max(results.items(), key=lambda item: item[1].total)
        worst = replace(worst, active_layers=costs.turns.layers_of(parts))
        if setting.devices > 1:
            return worst
        spared = max(0.0, costs.of(parts) - costs.mean(draws))
        return replace(worst, mean=int(worst.total - spared))

    def _of_layers(self, layers: tuple[int, ...]) -> MemoryEstimate:
        return self._result(lisa_pattern(self.stage, self.setting, layers), layers)

    def _result(self, pattern: Pattern, layers: tuple[int, ...]) -> MemoryEstimate:
        setting, stage = self.setting, self.stage
        scratch = self._scratch(pattern) if setting.step_in_backward else None
        trace = record_step(stage, setting, pattern, scratch=scratch)
        kept, aside = self._with_state(pattern)
        held = [
            ParameterBytes(
                stage.label(name),
                state.device,
                state.scratch if name in pattern.trainable else 0,
                self._copy(name) if name in pattern.raised else 0,
                self._digits(name) if name in pattern.raised else 0,
            )
            for name, state in kept.items()
        ]
        devices = self._devices(trace, held)
        paged = self._paged(kept | aside)
        return MemoryEstimate(
            model=type(stage.base).__name__,
            setting=setting,
            parameters=sum(p.numel() for p in self.parameters.values()),
            trainable=sum(self.parameters[name].numel() for name in pattern.trainable),
            devices=devices,
            mean=max(device.peak for device in devices),
            host=paged + sum(state.device for state in aside.values()),
            paged=paged,
            active_layers=layers,
        )

    def _devices(self, trace: Trace, held: list[ParameterBytes]) -> tuple[DeviceMemory, ...]:
        count, layers = self.setting.devices, len(self.stage.layer_map)
        how = {"at_once": self.kind.at_once, "stepped": self.setting.step_in_backward}
        if count == 1:
            return (whole(trace, held, **how),)
        if self.setting.spread == "fsdp":
            return (sharded(trace, held, count, layers, **how),) * count
        return by_layers(trace, held, self._place, count, **how)

    def _place(self, label: int) -> int:
        """Device of a label: equally many layers on each; a tied head lies with the embedding."""
        count, layers = self.setting.devices, len(self.stage.layer_map)
        if label >= layers:
            return 0 if self.stage.layer_map.tied else count - 1
        return max(label, 0) * count // layers

    def _regions(self) -> list[list[Places]]:
        """Layers within which the worst draw is looked for: a device may get all of a stack's."""
        whole = self._places()
        if self.setting.devices == 1 or self.setting.spread == "fsdp":
            return [whole]
        found = []
        for device in range(self.setting.devices):
            region = [
                (tuple(i for i in among if self._place(i) == device), k) for among, k in whole
            ]
            enough = [len(among) >= k for among, k in region]
            if any(enough):
                found.append([
                    own if fits else every
                    for own, every, fits in zip(region, whole, enough, strict=True)
                ])  # fmt: skip
        return found or [whole]

    def _places(self) -> list[Places]:
        """Layers of each stack that a draw may take, and how many of them it takes."""
        layers = drawable(self.stage, self.setting)
        return places(schedule_for(self.stage, self.setting), layers, self._any_size)

    # ------------------------------------------------------------------ bytes of a tensor

    def _state(self, name: str, raised: bool) -> StateBytes:
        """Optimizer state of a tensor, of a device's share where it is sharded."""
        parameter = self.parameters[name]
        key = (
            self._shape(name),
            torch.float32 if raised else parameter.dtype,
            id(parameter) in self._wide,
        )
        if key not in self._known:
            self._known[key] = self.kind.state(*key)
        return self._known[key]

    def _shape(self, name: str) -> torch.Size:
        """Shape of a tensor, or of a device's share."""
        shape = self.parameters[name].shape
        if self._pieces > 1 and shape:
            return torch.Size((-(-shape[0] // self._pieces), *shape[1:]))
        return shape

    def _copy(self, name: str) -> int:
        """Bytes of the fp32 copy of a tensor, and of its gradient in fp32 in the step."""
        half = self.parameters[name].dtype == torch.bfloat16
        return math.prod(self._shape(name)) * _FP32 if half else 0

    def _digits(self, name: str) -> int:
        """Bytes that its gradient has beside bf16 while micro-batches are added up."""
        adds = self.setting.gradient_accumulation_steps > 1 and self._pieces == 1
        return self._copy(name) // 2 if adds else 0

    @property
    def _resting_state(self) -> str:
        """Where the optimizer state of a frozen tensor lies: nowhere, device or host."""
        return POLICIES[self.setting.lisa.optimizer_state].place

    def _held(self, name: str) -> int:
        """Bytes that a tensor adds when it trains: gradient, state that comes and goes, copy."""
        parameter = self.parameters[name]
        half = parameter.dtype == torch.bfloat16
        raised = half and self.setting.lisa.precision == "fp32_active"
        plain = parameter.numel() * parameter.element_size()
        state = 0 if self._resting_state == "device" else self._state(name, raised).device
        return (2 * plain + plain if raised else plain) + state

    def _with_state(self, pattern: Pattern) -> tuple[dict[str, StateBytes], dict[str, StateBytes]]:
        """State of the tensors that have it on the device, and of those offloaded to the host."""
        active = {name: self._state(name, name in pattern.raised) for name in pattern.trainable}
        if self.setting.rotation is None or self._resting_state == "nowhere":
            return active, {}
        raised = bool(pattern.raised)
        resting = {
            name: self._state(name, raised)
            for name in may_train(self.stage, self.setting) - pattern.trainable
        }
        if self._resting_state == "device":
            return active | resting, {}
        return active, resting

    def _paged(self, states: Mapping[str, StateBytes]) -> int:
        """Managed memory, which is never given back but serves state of the same size again.

        After many draws of layers of different shapes it is of each size what one draw can take.
        """
        setting = self.setting
        rotation = setting.rotation
        if rotation is None or self._resting_state != "nowhere":
            return sum(state.paged for state in states.values())
        layers = drawable(self.stage, self.setting)
        turns = turns_of(self.stage, setting)
        units = units_of(self.stage, turns)
        if setting.active_layers is not None:
            stacks = [(layers, len(setting.active_layers))]
        elif rotation.by != "layer" and not self._any_size:
            # As many of the smallest as a draw has room for.
            largest = part_costs(self.stage, setting, self._held).largest
            stacks = [(layers, int(largest // min(turns.sizes)))]
        else:
            stacks = self._places()
        rotating = {name for i in layers for name in units[i]}
        found = sum(state.paged for name, state in states.items() if name not in rotating)
        for among, k in stacks:
            in_layers: defaultdict[int, list[int]] = defaultdict(list)
            for i in among:
                sizes = Counter(
                    self._state(n, rotation.precision == "fp32_active").paged for n in units[i]
                )
                for size, tensors in sizes.items():
                    in_layers[size].append(tensors)
            found += sum(
                size * sum(sorted(tensors)[-k:]) for size, tensors in in_layers.items() if k
            )
        return found

    def _scratch(self, pattern: Pattern) -> Callable[[nn.Parameter], int]:
        """What the optimizer allocates to step one tensor."""
        sizes = {
            id(self.parameters[name]): self._state(name, name in pattern.raised).scratch
            + (self._copy(name) if name in pattern.raised else 0)
            for name in pattern.trainable
        }
        return lambda parameter: sizes[id(parameter)]
