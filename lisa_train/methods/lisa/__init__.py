"""LISA: the engine that samples layers, its settings, checks, schedule and samplers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.registry import Method, register

if TYPE_CHECKING:
    from torch import nn


@register
class LisaMethod(Method):
    """Train a few layers at a time; the engine is attached to the trainer."""

    name = "lisa"
    help = "trains a few layers at a time"
    sections = ("lisa",)
    changes_model = False

    def check(self, config: Any) -> None:
        """Refuse to spare recomputation, or to copy to fp32, where there is nothing of it."""
        if config.lisa.recompute == "frozen" and not config.gradient_checkpointing:
            raise ConfigError(
                "lisa.recompute is 'frozen' but gradient_checkpointing is false: set it to true, "
                "or lisa.recompute to 'all'."
            )
        if config.lisa.precision == "fp32_active" and config.dtype == "float32":
            raise ConfigError(
                "lisa.precision is 'fp32_active' but dtype is float32, in which every tensor is "
                "held anyway; set dtype to bfloat16, or lisa.precision to 'model'."
            )

    def check_model(self, model: "nn.Module", config: Any) -> None:
        """Refuse numbers and probabilities that do not fit the model's layers."""
        from lisa_train.methods.lisa.plan import Plan

        Plan.make(model, config.lisa, seed=config.seed)

    def attachments(self, config: Any) -> dict[str, Any]:
        """Return the engine's settings."""
        return {"lisa": config.lisa}

    def rotation(self, config: Any) -> LisaConfig:
        """Return the settings by which layers take turns."""
        return config.lisa

    def outcome(self, result: Mapping[str, Any]) -> str:
        """Say which layers no draw took, besides what any training did."""
        missed, visits = result.get("layers_never_drawn"), result.get("layer_visits")
        what = "layers"
        if result.get("unit_visits"):
            missed, visits = result.get("units_never_drawn"), result.get("unit_visits")
            what = "parts of layers"
        coverage = ""
        if missed and visits:
            names = ", ".join(map(str, missed))
            coverage = f", {len(missed)} of {len(visits)} {what} never drawn ({names})"
        return super().outcome(result) + coverage
