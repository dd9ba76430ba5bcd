"""`estimate_memory`: peak bytes of a training step, from shapes alone."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Never

import torch
from torch import nn

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.estimate.optimizers import OptimizerKind, StateBytes, optimizer_kind
from lisa_train.estimate.patterns import (
    check_layers,
    draw_costs,
    drawable,
    lisa_pattern,
    may_train,
    part_costs,
    plain_pattern,
    some_draws,
    turns_of,
    units_of,
)
from lisa_train.estimate.result import DeviceMemory, MemoryEstimate
from lisa_train.estimate.setting import Attention, Autocast, DType, Setting, Spread
from lisa_train.estimate.spread import Held, by_layers, sharded, whole
from lisa_train.estimate.stage import Stage
from lisa_train.estimate.step import Pattern, record_step
from lisa_train.estimate.trace import Trace
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.select.config import SelectConfig
from lisa_train.optim.policies import POLICIES
from lisa_train.private_names import check

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def estimate_memory(
    model_or_config: "nn.Module | PretrainedConfig | str | Path",
    method: str = "lisa",
    *,
    batch_size: int = 1,
    sequence_length: int = 1024,
    dtype: DType = "auto",
    autocast: Autocast | None = None,
    attn_implementation: Attention = "sdpa",
    optim: str = "adamw_torch_fused",
    eight_bit_states: tuple[str, ...] | None = None,
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    chunked_loss: bool = False,
    step_in_backward: bool = False,
    lisa: LisaConfig | None = None,
    lora: Mapping[str, Any] | None = None,
    peft: Mapping[str, Any] | None = None,
    select: SelectConfig | None = None,
    autocast_adapter_dtype: bool = True,
    active_layers: tuple[int, ...] | None = None,
    devices: int = 1,
    spread: Spread = "fsdp",
    **unknown: Never,
) -> MemoryEstimate:
    """Predict the peak memory of a training step; no weights, data or GPU are needed.

    One step of the real model runs on tensors that have a shape but no data, and every storage
    is followed from birth to death, so that any architecture counts as it computes. The peak is
    the largest of three: the forward pass (weights, optimizer state, what backward needs), the
    backward pass (gradients come while activations go), and the optimizer step (gradients, and
    what the optimizer allocates for its arithmetic). It is that of a step in the middle of
    training: the optimizer state is there from the start.

    Sequences are full, without padding, and the attention mask is the model's own; attention is
    taken to run in the flash kernel where `attn_implementation` is ``sdpa``. Left out: the CUDA
    context, workspaces of kernels and the allocator's fragmentation, for which `allowance` adds
    0.6 GB and 5 % of gradients and activations (assumed, not measured).

    Parameters
    ----------
    model_or_config
        A module, a transformers configuration, or a folder or hub id (only its config.json is
        read). The class is that of `architectures`, else the one for causal language modelling.
    method
        ``full``, ``lora``, ``lisa``, ``peft``, ``select``, or another of `lisa_train.METHODS`.
    batch_size, sequence_length
        Sequences per device and forward pass, and their tokens.
    dtype
        Of the weights; ``auto`` takes the configuration's or the module's.
    autocast
        ``bfloat16`` or ``float16`` to compute under autocast; None computes in the weights' type.
    attn_implementation
        ``sdpa`` or ``eager``.
    optim
        Optimizer, as transformers names it.
    eight_bit_states
        As in `TrainConfig`: the groups with 8-bit state; None as transformers does it.
    gradient_checkpointing
        Recompute each layer in backward.
    gradient_accumulation_steps
        Above 1, gradients already stand during the forward pass.
    chunked_loss
        TRL's fused head (`SFTTrainer`'s default): the logits never stand whole.
    step_in_backward
        Each gradient is used and freed as soon as it is there.
    lisa
        A `LisaConfig` (None: its defaults): layers, always-active groups, probabilities of
        embeddings and head, `optimizer_state`, `precision`.
    lora
        Fields of PEFT's `LoraConfig`, over the defaults of `lisa-train`.
    peft
        With ``peft``: `peft_type` and the fields of that type's configuration.
    select
        With ``select``: a `SelectConfig`, what trains.
    autocast_adapter_dtype
        As PEFT's: adapters of a half-precision model are held in fp32.
    active_layers
        LISA's layers of the interval; None takes those that cost the most.
    devices, spread
        Number of devices, and how a model is spread over them: ``fsdp`` shards every tensor
        (FSDP2, each device with its own batch), ``layers`` puts equally many layers on each.
    **unknown
        Nothing else is taken; a name that is misspelt is answered with the nearest one.

    Returns
    -------
    MemoryEstimate

    Raises
    ------
    ConfigError
        For a setting, an optimizer or a model that cannot be estimated.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> estimate_memory(LlamaConfig(), "lisa", dtype="bfloat16").total < 24e9
    True
    """
    if unknown:
        raise _unknown(next(iter(unknown)))
    wanted = Setting(
        method=method,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=dtype,
        autocast=autocast,
        attn_implementation=attn_implementation,
        optim=optim,
        eight_bit_states=eight_bit_states,
        gradient_checkpointing=gradient_checkpointing,
        gradient_accumulation_steps=gradient_accumulation_steps,
        chunked_loss=chunked_loss,
        step_in_backward=step_in_backward,
        lisa=lisa or LisaConfig(),
        lora=lora or {},
        peft=peft or {},
        select=select or SelectConfig(),
        autocast_adapter_dtype=autocast_adapter_dtype,
        active_layers=active_layers,
        devices=devices,
        spread=spread,
    )
    return estimate(model_or_config, wanted)


def estimate(
    source: "Stage | nn.Module | PretrainedConfig | str | Path", setting: Setting
) -> MemoryEstimate:
    """Predict the peak memory of one `Setting`; see `estimate_memory`.

    A `Stage` may serve several settings that differ in the method alone, LoRA excepted.
    """
    check("estimate")
    kind = optimizer_kind(setting.optim)
    stage = source if isinstance(source, Stage) else Stage(source, setting)
    return _Estimator(stage, setting, kind).run()


def _unknown(name: str) -> ConfigError:
    known = [f.name for f in fields(Setting)]
    return ConfigError(f"estimate_memory has no setting {name!r}.{suggest(name, known)}")


class _Estimator:
    """Everything that one estimate shares: the model, the optimizer, bytes per tensor."""

    def __init__(self, stage: Stage, setting: Setting, kind: OptimizerKind) -> None:
        self.stage, self.setting, self.kind = stage, setting, kind
        self.parameters = dict(stage.model.named_parameters())
        self._wide = stage.wide_states(setting)
        self._shards = setting.devices if setting.spread == "fsdp" else 1
        self._known: dict[Any, StateBytes] = {}

    def run(self) -> MemoryEstimate:
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
        every = rotation.sampling == "bernoulli"
        k = len(drawable(stage, setting)) if every else rotation.activated_layers
        groups = tuple(rotation.group_probabilities)
        candidates = {costs.worst(k, among, groups) for among in self._regions(k)}
        if setting.gradient_checkpointing:
            # Backward begins at the top, where the inputs of all layers still stand.
            candidates |= {tuple(among[-k:]) for among in self._regions(k)}
        worst = max(map(self._of_layers, sorted(candidates)), key=lambda result: result.total)
        if setting.devices > 1:
            return worst
        spared = max(0.0, costs.of(worst.active_layers, groups) - costs.mean(draws))
        return replace(worst, mean=int(worst.total - spared))

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
        every = setting.lisa.sampling == "bernoulli"
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
            Held(stage.label(name), state.device, state.scratch if name in pattern.trainable else 0)
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

    def _devices(self, trace: Trace, held: list[Held]) -> tuple[DeviceMemory, ...]:
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

    def _regions(self, k: int) -> list[list[int]]:
        """Sets of layers within which the worst draw is looked for: a device may get all of it."""
        layers = list(drawable(self.stage, self.setting))
        if self.setting.devices == 1 or self.setting.spread == "fsdp":
            return [layers]
        regions = [
            [i for i in layers if self._place(i) == device]
            for device in range(self.setting.devices)
        ]
        return [region for region in regions if len(region) >= k] or [layers]

    # ------------------------------------------------------------------ bytes of a tensor

    def _state(self, name: str, raised: bool) -> StateBytes:
        """Optimizer state of a tensor, of a device's share where it is sharded."""
        parameter = self.parameters[name]
        shape = parameter.shape
        if self._shards > 1 and shape:
            shape = torch.Size((-(-shape[0] // self._shards), *shape[1:]))
        key = (
            shape,
            torch.float32 if raised else parameter.dtype,
            id(parameter) in self._wide,
        )
        if key not in self._known:
            self._known[key] = self.kind.state(*key)
        return self._known[key]

    @property
    def _resting_state(self) -> str:
        """Where the optimizer state of a frozen tensor lies: nowhere, device or host."""
        return POLICIES[self.setting.lisa.optimizer_state].place

    def _held(self, name: str) -> int:
        """Bytes that a tensor adds when it trains: gradient, state that comes and goes, fp32."""
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
        k = len(layers) if rotation.sampling == "bernoulli" else rotation.activated_layers
        if setting.active_layers is not None:
            k = len(setting.active_layers)
        turns = turns_of(self.stage, setting)
        units = units_of(self.stage, turns)
        if rotation.by != "layer" and rotation.sampling != "bernoulli":
            # As many of the smallest as a draw has room for.
            largest = part_costs(self.stage, setting, self._held).largest
            k = int(largest // min(turns.sizes))
        rotating = {name for i in layers for name in units[i]}
        found = sum(state.paged for name, state in states.items() if name not in rotating)
        in_layers: defaultdict[int, list[int]] = defaultdict(list)
        for i in layers:
            sizes = Counter(
                self._state(name, rotation.precision == "fp32_active").paged for name in units[i]
            )
            for size, tensors in sizes.items():
                in_layers[size].append(tensors)
        return found + sum(
            size * sum(sorted(tensors)[-k:]) for size, tensors in in_layers.items() if k
        )

    def _scratch(self, pattern: Pattern) -> Callable[[nn.Parameter], int]:
        """What the optimizer allocates to step one tensor."""
        sizes = {
            id(self.parameters[name]): self._state(name, name in pattern.raised).scratch
            for name in pattern.trainable
        }
        return lambda parameter: sizes[id(parameter)]
