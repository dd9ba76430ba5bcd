"""LoRA: PEFT's `LoraConfig` over this project's defaults, and the method that trains with it."""

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.methods.adapter_names import check_task_type
from lisa_train.methods.registry import Method, register

if TYPE_CHECKING:
    from peft import LoraConfig

LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


@register
class Lora(Method):
    """Train an adapter; the weights below it rest."""

    name = "lora"
    help = "trains an adapter (PEFT's LoraConfig)"
    sections = ("lora",)
    refuses_float16 = None  # PEFT holds the adapters in fp32
    refuses_quantized = None

    def peft_config(self, config: Any, task_type: str | None = None) -> "LoraConfig":
        """Return the adapters that `config.lora` describes."""
        return lora_config(config.lora, task_type)


def lora_config(lora: Mapping[str, Any], task_type: str | None = "CAUSAL_LM") -> "LoraConfig":
    """Build PEFT's `LoraConfig` from settings over the defaults r=16, alpha=32, all linear.

    Raises
    ------
    ConfigError
        For a field that `LoraConfig` does not have, or a value that it refuses.
    """
    from peft import LoraConfig

    known = {f.name for f in fields(LoraConfig)}
    for name in lora:
        if name not in known:
            raise ConfigError(
                f"lora.{name} is not a field of PEFT's LoraConfig.{suggest(name, known)}"
            )
    if lora.get("inference_mode"):
        raise ConfigError(
            "lora.inference_mode is true, with which PEFT freezes the adapters; remove it (the "
            "adapter_config.json of a saved adapter has it)."
        )
    if str(getattr(kind := lora.get("peft_type"), "value", kind)) not in ("None", "LORA"):
        raise ConfigError(
            f"lora.peft_type is {kind}: adapters of other types are method peft's; set method to "
            "peft, and write their fields below peft."
        )
    check_task_type("lora", lora, task_type)
    settings = {**LORA_DEFAULTS, "task_type": task_type, **lora}
    if not isinstance(settings["r"], int) or settings["r"] < 1:
        raise ConfigError(f"lora.r is {settings['r']!r}; expected a rank of at least 1.")
    try:
        return LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"PEFT refuses the lora settings: {error}") from error
