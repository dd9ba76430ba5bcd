"""Where the LoRA adapters of a PEFT model are, and which of them have a product BA."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from lisa_train.measure.adapters.lora_pairs import LoraPair

# Variants of PEFT's LoRA whose weight is W + s·BA, or W + s·B diag(e) A, as it stands.
_PLAIN = frozenset(
    {
        "NoneType",
        "ALoraLinearVariant",
        "KasaLinearVariant",
        "MiCAEmbeddingVariant",
        "MiCALinearVariant",
        "MontecloraLinearVariant",
        "VeloraLinearVariant",
    }
)
_DORA = frozenset(
    {
        "DoraConv1dVariant",
        "DoraConv2dVariant",
        "DoraConv3dVariant",
        "DoraEmbeddingVariant",
        "DoraLinearVariant",
    }
)


def find_lora_pairs(model: nn.Module) -> list[LoraPair]:
    """Return the LoRA pairs of a model, in the order of its modules; none without adapters.

    Grouped convolutions and other layers whose product is not a plain BA are left out, see
    `no_product`.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    mixing, stacks = "XLORA" in adapter_types(model), stacked_tuners(model)
    found = []
    for module in model.modules():
        for pair in _pairs_of(module):
            if id(pair.a) not in names or id(pair.b) not in names:
                continue
            if mixing or id(module) in stacks or no_product(module, pair.adapter):
                continue
            found.append(replace(pair, name_b=names[id(pair.b)]))
    return found


def no_product(module: Any, adapter: str) -> str | None:
    """Say why the weight that a LoRA layer acts with is no W + s·BA; None where it is."""
    if getattr(module.get_base_layer(), "groups", 1) != 1:
        return "a grouped convolution has no product of its factors"
    variant = type(getattr(module, "lora_variant", {}).get(adapter)).__name__
    if variant not in _PLAIN | _DORA:
        return f"{variant} of PEFT does not add a product of its factors to the weight"
    return None


def adapter_types(model: nn.Module) -> list[str]:
    """Return PEFT's names of the methods whose adapters a model has, as ``LORA``."""
    types: dict[str, None] = {}
    for module in model.modules():
        configurations = getattr(module, "peft_config", None)
        for one in configurations.values() if isinstance(configurations, dict) else ():
            kind = getattr(one, "peft_type", "")
            types[str(getattr(kind, "value", kind))] = None
    return list(types)


def stacked_tuners(model: nn.Module) -> set[int]:
    """PEFT layers around one and the same weight: what it becomes is no work of one of them."""
    layers: dict[int, list[Any]] = {}
    for module in model.modules():
        tuner = hasattr(module, "get_base_layer") and hasattr(module, "active_adapters")
        if tuner and not hasattr(module, "parameter_name"):
            layers.setdefault(id(module.get_base_layer()), []).append(module)  # type: ignore[operator]
    return {id(m) for around in layers.values() if len(around) > 1 for m in around}


def _pairs_of(module: Any) -> Iterator[LoraPair]:
    scaling = getattr(module, "scaling", None)
    if not isinstance(scaling, dict) or not hasattr(module, "get_base_layer"):
        return
    experts = int(getattr(module, "num_experts", 1))
    for kind in ("", "embedding_"):
        transposed = bool(kind) or bool(getattr(module, "fan_in_fan_out", False))
        firsts = getattr(module, f"lora_{kind}A", {})
        seconds = getattr(module, f"lora_{kind}B", {})
        for adapter in firsts:
            if adapter in seconds and adapter in scaling:
                a, b = _factor(firsts[adapter]), _factor(seconds[adapter])
                if a is not None and b is not None:
                    diagonal = _part(module, "lora_E", adapter)
                    if diagonal is None:
                        diagonal = _part(module, "lora_diag", adapter)
                    magnitude = _part(module, "lora_magnitude_vector", adapter)
                    yield LoraPair(
                        "", a, b, module, adapter, experts, transposed, diagonal, magnitude
                    )


def _part(module: Any, name: str, adapter: str) -> nn.Parameter | None:
    parts = getattr(module, name, {})
    return _factor(parts[adapter]) if adapter in parts else None


def _factor(part: Any) -> nn.Parameter | None:
    weight = part if isinstance(part, nn.Parameter) else getattr(part, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None
