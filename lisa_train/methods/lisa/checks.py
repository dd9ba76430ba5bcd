"""What must hold before LISA starts: plain weights, complete optimizers, fitting numbers."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lisa_analysis.contract.errors import ConfigError, ProbabilitiesError
from lisa_analysis.contract.layers import canonical_name, role_of, same_layers
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.lisa.learning.config import PRIORS
from lisa_train.methods.lisa.units import Units
from lisa_train.model.layer_map import LayerMap
from lisa_train.model.module_tree import unwrap
from lisa_train.model.sharding import is_sharded
from lisa_train.optim.frozen_state import tensors_of
from lisa_train.optim.policies import POLICIES
from lisa_train.optim.schedule_free import is_schedule_free


def refuse_adapters_and_quantization(model: nn.Module) -> None:
    """`ConfigError` for a model whose own weights cannot train: PEFT adapters, quantized base."""
    kind = type(unwrap(model)).__name__
    adapters = next((n for n, _ in model.named_parameters() if role_of(n) != "base"), None)
    if adapters is not None or hasattr(model, "peft_config"):
        raise ConfigError(
            f"LISA trains the weights of the model itself, but {kind} carries PEFT adapters"
            f"{f' ({adapters})' if adapters else ''}; merge them first (merge_and_unload()), or "
            "train them without LISA."
        )
    packed = next(
        (n for n, p in model.named_parameters()
         if not p.is_floating_point() or hasattr(p, "quant_state")), None,
    )  # fmt: skip
    if packed is not None or getattr(unwrap(model), "is_quantized", False):
        raise ConfigError(
            f"LISA trains the weights of the model itself, but those of {kind} are quantized"
            f"{f' ({packed})' if packed else ''} and cannot train; load the model without "
            "quantization, or train adapters (method 'lora')."
        )


def check_optimizers(
    optimizers: Sequence[Any], tensors: Mapping[str, torch.Tensor], policy: str
) -> None:
    """`ConfigError` unless every one of `tensors` is in exactly one parameter group of all.

    Nor may an optimizer step in a way that frozen tensors, or state that is let go, would spoil.
    """
    if not optimizers:
        raise ConfigError("LISA got an empty list of optimizers; give it those that train.")
    counts: dict[torch.Tensor, int] = {}
    for optimizer in optimizers:
        _refuse_unfollowable(optimizer, policy)
        for parameter in tensors_of(optimizer):
            counts[parameter] = counts.get(parameter, 0) + 1
    them = "the optimizer lacks" if len(optimizers) == 1 else "the optimizers lack"
    missing = [name for name, p in tensors.items() if p not in counts]
    if missing:
        raise ConfigError(
            f"{them} {len(missing)} of the {len(tensors)} tensors that LISA may train "
            f"({_first(missing)}), so they would never move; build it from all parameters of the "
            "model, before anything is frozen, or give a list of optimizers that have them all."
        )
    twice = [name for name, p in tensors.items() if counts[p] > 1]
    if twice:
        where = "of the optimizer" if len(optimizers) == 1 else "of the optimizers"
        raise ConfigError(
            f"{len(twice)} tensors are in more than one parameter group {where} "
            f"({_first(twice)}); give each to one group."
        )


def _first(names: Sequence[str]) -> str:
    return "first: " + ", ".join(canonical_name(name) for name in names[:3])


def _refuse_unfollowable(optimizer: Any, policy: str) -> None:
    """`ConfigError` for an optimizer whose steps LISA cannot follow tensor by tensor."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"LISA needs a torch.optim.Optimizer whose steps it can follow, got {kind}; train "
            "without DeepSpeed and similar engines."
        )
    if hasattr(optimizer, "optimizer_dict") or hasattr(optimizer, "fused_backward"):
        raise ConfigError(
            f"{kind} steps inside the backward pass by itself, where LISA cannot follow; choose "
            "another optimizer (and step_in_backward to free every gradient at once)."
        )
    hidden = next((n for n, v in vars(optimizer).items() if _has_optimizer(v)), None)
    if hidden is not None:
        raise ConfigError(
            f"{kind} steps through another optimizer (its {hidden!r}), whose state LISA would "
            "neither find nor free; give LISA that optimizer itself, or choose one without a "
            "second inside."
        )
    if _needs_closure(optimizer):
        raise ConfigError(
            f"{kind} moves all its tensors together along one direction, made from their earlier "
            "gradients, so that frozen layers would move as well; choose one that treats its "
            "tensors one by one, as AdamW or Muon."
        )
    if {"d", "k"} <= optimizer.param_groups[0].keys():  # Prodigy, D-Adaptation
        raise ConfigError(
            f"{kind} estimates one step size from how far all its tensors have come together, "
            "which layers that rest falsify; choose an optimizer with a learning rate of its own."
        )
    if POLICIES[policy].place != "nowhere":
        return
    if isinstance(optimizer, torch.optim.ASGD):
        raise ConfigError(
            f"{kind} holds the averaged weights in its state, which optimizer_state={policy!r} "
            "throws away whenever a layer is frozen; set optimizer_state to 'keep' or 'offload'."
        )
    if any(g.get("relative_step") and g.get("warmup_init") for g in optimizer.param_groups):
        raise ConfigError(
            f"{kind} with warmup_init starts every tensor at a learning rate near zero, and "
            f"optimizer_state={policy!r} would start it anew at every activation; set warmup_init "
            "to False or optimizer_state to 'keep' or 'offload'."
        )


def _has_optimizer(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    parts = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(part, torch.optim.Optimizer) for part in parts)


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step` cannot do without a closure, as line searches (L-BFGS) cannot."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def check_units(
    units: Mapping[int | str, Sequence[torch.Tensor]],
    layer_map: LayerMap,
    config: LisaConfig,
    drawn: Sequence[int],
    *,
    may_draw_nothing: bool,
) -> None:
    """`ConfigError` for what would leave a period, or a layer, with nothing to train.

    `drawn` are the layers that draws may take; `may_draw_nothing` says whether one may take none.
    """
    for i in drawn:
        if not units[i]:
            raise ConfigError(
                f"layer {layer_map.names[i]} has no parameter that requires gradients, so drawing "
                "it would train nothing; unfreeze it (requires_grad_(True)) before LISA starts, or "
                "give it probability 0 in lisa.probabilities, so that it rests."
            )
    if config.head_probability is not None and not layer_map.groups["head"]:
        raise ConfigError(
            f"head_probability is {config.head_probability:g}, but this model's head is its "
            "embedding matrix (tied): set embed_probability instead."
        )
    certain = [*config.always_active, *(g for g, p in config.group_probabilities.items() if p == 1)]
    if may_draw_nothing and not any(units[group] for group in certain):
        raise ConfigError(
            f"sampling={config.sampling!r} draws no layer at all in some periods, and "
            f"always_active = {list(config.always_active)} trains nothing in this model; keep a "
            "group active or use sampling='uniform'."
        )


def check_warmup(optimizers: Sequence[torch.optim.Optimizer], config: LisaConfig) -> None:
    """`ConfigError` for scaled updates that an averaging optimizer would undo."""
    for optimizer in optimizers:
        if config.correct_lr and is_schedule_free(optimizer):
            raise ConfigError(
                f"lisa.correct_lr is {config.correct_lr:g}, but {type(optimizer).__name__} keeps "
                "its weights as an average, which scaled updates would break; set it to 0."
            )
        if config.warmup_steps and is_schedule_free(optimizer):
            raise ConfigError(
                f"warmup_steps is {config.warmup_steps}, but {type(optimizer).__name__} keeps its "
                "weights as an average, which shortened updates would break; set warmup_steps to "
                "0 and use the optimizer's own warm-up."
            )


def check_precision(optimizers: Sequence[torch.optim.Optimizer], config: LisaConfig) -> None:
    """`ConfigError` for an optimizer that moves weights outside its step, where copies are."""
    for optimizer in optimizers:
        if config.precision == "fp32_active" and is_schedule_free(optimizer):
            raise ConfigError(
                f"lisa.precision is 'fp32_active', but {type(optimizer).__name__} keeps its "
                "weights as an average that it moves outside its step too, past the fp32 copies; "
                "hold the model in fp32, or set lisa.precision to 'model'."
            )


def refuse_sharded_parts(model: nn.Module, config: LisaConfig) -> None:
    """`ConfigError` for parts of layers under FSDP2, which gathers and reduces whole layers."""
    if config.by != "layer" and any(is_sharded(p) for p in model.parameters()):
        raise ConfigError(
            f"lisa.by is {config.by!r} with weights that FSDP2 splits over processes, where parts "
            "of a layer are not known to train right; set lisa.by to 'layer', or train with DDP."
        )


def check_budget(config: LisaConfig, turns: Units) -> None:
    """`ConfigError` for a budget that leaves periods empty, or nothing at rest."""
    given, total = config.budget, sum(turns.sizes)
    if not turns.sizes:
        raise ConfigError(
            f"lisa.by is {config.by!r}, but no layer has a parameter that requires gradients; "
            "unfreeze the model (requires_grad_(True)) before LISA starts."
        )
    if given is None:
        if not 1 <= config.activated_layers < turns.count:
            raise ConfigError(
                f"activated_layers is {config.activated_layers}, whose share of {turns.count} "
                "layers is the budget of every period, and nothing would ever rest; lower it, or "
                "set lisa.budget."
            )
        return
    largest = max(range(len(turns)), key=turns.sizes.__getitem__)
    if given * total < turns.sizes[largest]:
        finer = ", or lisa.by to 'module'" if config.by == "half" else ""
        raise ConfigError(
            f"lisa.budget is {given:g} of {total:,} parameters in the layers, which is "
            f"{given * total:,.0f}, less than {turns.names[largest]} alone "
            f"({turns.sizes[largest]:,}); set it to {_at_least(turns.sizes[largest] / total)} or "
            f"more{finer}."
        )


def _at_least(share: float) -> str:
    """Two digits of a share, rounded up: the number itself is not refused again."""
    digits = 1 - math.floor(math.log10(share))
    return f"{math.ceil(share * 10**digits) / 10**digits:g}"


def given_probabilities(
    config: LisaConfig, layer_map: LayerMap, turns: Units | None = None
) -> tuple[float, ...] | None:
    """Inclusion probabilities of the configuration, checked against the model's layers.

    Where halves or modules take turns (`turns`), a file of whole layers gives each of them the π
    of its layer.

    Where they are learned: those of the prior's file or numbers, None for one that has a name.
    """
    given = config.probabilities
    if config.learn is not None:
        given = None if config.learn.prior in PRIORS else config.learn.prior
    if not isinstance(given, str):
        return given
    from lisa_analysis.plans.sampling import SamplingProbabilities

    loaded = SamplingProbabilities.load(given)
    if config.control != "none" and loaded.control is not None:
        raise ProbabilitiesError(
            f"{given} holds a {loaded.control} control already, and lisa.control is "
            f"{config.control!r}; give the probabilities themselves, or leave lisa.control out."
        )
    names = tuple(loaded.layer_names)
    if turns is not None and turns.by != "layer":
        return _of_parts(given, names, loaded, config, layer_map, turns)
    if not same_layers(names, layer_map.names):
        ours = layer_map.names
        pairs = zip(names, ours, strict=False)
        odd = next((pair for pair in pairs if not same_layers(pair[:1], pair[1:])), None)
        detail = f"{odd[0]} against {odd[1]}" if odd else "the first ones agree"
        raise ProbabilitiesError(
            f"{given} was made for {len(names)} layers, this model has {len(ours)} "
            f"({detail}); make probabilities from a run of this model."
        )
    if loaded.activated_layers != config.activated_layers:
        raise ProbabilitiesError(
            f"{given} activates {loaded.activated_layers} layers, but "
            f"activated_layers is {config.activated_layers}; set it to {loaded.activated_layers}."
        )
    return tuple(loaded.inclusion_probabilities)


def _of_parts(
    path: str,
    names: tuple[str, ...],
    loaded: Any,
    config: LisaConfig,
    layer_map: LayerMap,
    turns: Units,
) -> tuple[float, ...]:
    """Probabilities of halves or modules, from a file of them or of whole layers.

    A layer's π goes to all its parts, scaled to the budget where layers differ in size.
    """
    pi = loaded.inclusion_probabilities
    if same_layers(names, turns.names):
        return tuple(pi)
    if not same_layers(names, layer_map.names):
        raise ProbabilitiesError(
            f"{path} was made for {len(names)} layers or parts ({names[0]} …), but with "
            f"lisa.by={turns.by!r} this model has {len(turns)} ({turns.names[0]} …) in "
            f"{len(layer_map)} layers; make probabilities from a run of this model."
        )
    if config.budget is None and loaded.activated_layers != config.activated_layers:
        raise ProbabilitiesError(
            f"{path} activates {loaded.activated_layers} layers, but "
            f"activated_layers is {config.activated_layers}; set it to {loaded.activated_layers}."
        )
    each = [pi[layer] for layer in turns.layers]
    whole = config.activated_layers / turns.count
    wanted = (whole if config.budget is None else config.budget) * sum(turns.sizes)
    factor = wanted / sum(p * size for p, size in zip(each, turns.sizes, strict=True))
    if max(each) * factor > 1 + 1e-9:
        raise ProbabilitiesError(
            f"{path}, scaled to the budget, draws layer {turns.layers[each.index(max(each))]} with "
            f"probability {max(each) * factor:.3g}: lower lisa.budget or activated_layers, or make "
            "the file with a lower cap."
        )
    return tuple(min(1.0, p * factor) for p in each)
