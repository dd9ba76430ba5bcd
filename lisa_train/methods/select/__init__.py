"""Selective training: the named layers, groups or tensors train, and nothing else."""

from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError
from lisa_train.methods.registry import Method, register
from lisa_train.methods.select.config import SelectConfig as SelectConfig

if TYPE_CHECKING:
    from torch import nn


@register
class Select(Method):
    """Train what the settings name, as it was loaded; all else keeps its bits."""

    name = "select"
    help = "trains the layers, groups or tensors that are named"
    sections = ("select",)
    head_setting = "select.groups"

    def check(self, config: Any) -> None:
        """Refuse settings that name nothing."""
        if not config.select.names_something:
            raise ConfigError(
                "method is select but nothing is named; set select.layers ('0-3,11'), select.even, "
                "select.last, select.top with select.profile, select.spectrum (0.25), "
                "select.tensors ('.*bias') or select.groups (head)."
            )

    def check_model(self, model: "nn.Module", config: Any) -> None:
        """Refuse names that the model does not have."""
        from lisa_train.methods.select.choice import choose

        choose(model, config.select)

    def prepare(self, model: "nn.Module", config: Any) -> None:
        """Let the chosen tensors require gradients, and no others."""
        from lisa_train.methods.select.choice import choose

        chosen = set(choose(model, config.select).tensors)
        for name, tensor in model.named_parameters():
            tensor.requires_grad_(name in chosen)

    def run_entries(self, config: Any, model: "nn.Module | None" = None) -> dict[str, Any]:
        """Return what was asked for and, where the model is at hand, what that came to."""
        import dataclasses

        entry = dataclasses.asdict(config.select)
        if model is not None:
            from lisa_train.methods.select.choice import choose

            found = choose(model, config.select)
            entry |= {"chosen_layers": list(found.layers), "chosen_tensors": len(found.tensors),
                      "chosen_parameters": found.size}  # fmt: skip
        return {"method": self.name, "select": entry}

    def remarks(self, model: "nn.Module", config: Any) -> list[str]:
        """Say that a tied head is not chosen alone, and of which other model the profile is."""
        from lisa_train.methods.measured_on import of_another_model
        from lisa_train.model.layer_cache import known_layers

        said = [of_another_model(config.select.profile, model)]
        groups = config.select.groups
        tied = not known_layers(model, config.select.stack).groups["head"]
        if "head" in groups and "embed" not in groups and tied:
            said.append(
                "the head is tied to the embeddings: both train, as the one matrix they are"
            )
        return [text for text in said if text]
