"""What cannot be measured of a model, in words: null is never silent."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lisa_analysis.contract.layers import module_of, role_of
from lisa_train.measure.adapters.lora_pairs import LoraPair
from lisa_train.measure.adapters.search import adapter_types, no_product, stacked_tuners
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.processes import Processes
from lisa_train.model.sharding import local_slices
from lisa_train.model.tensor_table import TensorTable

_BOTH = "delta_norm and merged_norm"


def unmeasured_when_sharded(
    config: RecordConfig, table: TensorTable, processes: Processes
) -> list[str]:
    """Sentences on what the way in which the weights are sharded forbids to measure."""
    said = []
    if config.grad_noise and processes.sharded:
        said.append(
            "grad_noise is not measured with sharded weights (FSDP2): they are averaged over "
            "the processes before any gradient of a micro-batch can be seen."
        )
    if any(local_slices(p) is None for _, p in table.tensors):
        said.append(
            "weights are sharded in two ways at once (FSDP and tensor parallelism): of those "
            "‖W − W₀‖ and the products of LoRA are not measured."
        )
    return said


def unmeasured_products(
    model: nn.Module, table: TensorTable, pairs: Sequence[LoraPair], config: RecordConfig
) -> list[str]:
    """Sentences on the adapters that train and whose change of the weights is not measured.

    Parameters
    ----------
    model, table
        The model and its tensors.
    pairs
        The adapters that are measured.
    config
        What is recorded: nothing is said about quantities that nobody asked for.
    """
    wanted = {"delta_norm", "merged_norm"} & set(config.quantities)
    if not wanted:
        return []
    said = _without_product(model, table, pairs)
    for pair in pairs:
        if (reason := _hidden(pair)) is not None:
            said.setdefault((_BOTH, reason), []).append(module_of(pair.name_b))
        elif "merged_norm" in wanted and (reason := _without_matrix(pair)) is not None:
            said.setdefault(("merged_norm", reason), []).append(module_of(pair.name_b))
    return [_sentence(column, reason, modules) for (column, reason), modules in said.items()]


def _without_product(
    model: nn.Module, table: TensorTable, pairs: Sequence[LoraPair]
) -> dict[tuple[str, str], list[str]]:
    measured = {module_of(pair.name_b) for pair in pairs}
    chosen = {i for i, _ in table.tensors}
    parts: dict[str, dict[str, None]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or table.ids.get(name) not in chosen:
            continue
        # What is cut in two ways at once has its own sentence.
        if role_of(name) != "base" and local_slices(parameter) is not None:
            parts.setdefault(module_of(name), {})[role_of(name)] = None
    left = {module: roles for module, roles in parts.items() if module not in measured}
    if not left:
        return {}
    reasons, kinds = _reasons(model), adapter_types(model)
    general = (
        f"{', '.join(dict.fromkeys(role for roles in left.values() for role in roles))} "
        f"({', '.join(kinds) or 'of an adapter'}) is no product BA as LoRA's and AdaLoRA's"
    )
    if "XLORA" in kinds:
        general = "X-LoRA weighs its adapters anew for every token"
    said: dict[tuple[str, str], list[str]] = {}
    for module in left:
        said.setdefault((_BOTH, reasons.get(module, general)), []).append(module)
    return said


def _reasons(model: nn.Module) -> dict[str, str]:
    """Why a LoRA layer has no product, by the module that it adapts."""
    reasons: dict[str, str] = {}
    stacks = stacked_tuners(model)
    for name, module in model.named_modules():
        if not hasattr(module, "get_base_layer"):
            continue
        path = module_of(f"{name}.weight")
        if id(module) in stacks:
            reasons[path] = "several adapters of different kinds lie around one weight"
            continue
        adapters: Iterable[Any] = getattr(module, "lora_A", ())
        found = (no_product(module, adapter) for adapter in adapters)
        if (reason := next((text for text in found if text), None)) is not None:
            reasons[path] = reason
    return reasons


def _hidden(pair: LoraPair) -> str | None:
    """Why an adapter that could be measured is not, as it is switched now."""
    if not any(p.requires_grad for p in pair.parameters):
        return None
    if pair.magnitude is not None and not pair.has_matrix:
        return "DoRA rescales a weight that is not at hand as a matrix (quantized)"
    if pair.alone:
        return None
    if getattr(pair.module, "merged_adapters", ()):
        return "an adapter is merged into its weight"
    return "another adapter is active on the same weight, or this one is not"


def _without_matrix(pair: LoraPair) -> str | None:
    if pair.has_matrix:
        return None
    return "the adapted weight is not at hand as one matrix (quantized, fused experts)"


def _sentence(column: str, reason: str, modules: Sequence[str]) -> str:
    modules = list(dict.fromkeys(modules))
    which = modules[0] if len(modules) == 1 else f"{len(modules)} modules ({modules[0]}, …)"
    be = "are" if column == _BOTH else "is"
    return f"{column} {be} not measured of {which}: {reason}."
