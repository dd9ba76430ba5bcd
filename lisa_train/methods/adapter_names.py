"""Names in the settings of adapters that fit nothing in the model: PEFT passes over them."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError, suggest

if TYPE_CHECKING:
    from torch import nn

# Fields whose lists name modules, by the end of their paths.
_OF_MODULES = ("target_modules", "modules_to_save", "feedforward_modules")


def check_task_type(section: str, given: Mapping[str, Any], task_type: str | None) -> None:
    """Refuse a `task_type` of another task than the run's: the saved adapter would say it."""
    found = given.get("task_type")
    name = str(getattr(found, "value", found))
    if found is not None and task_type is not None and name != task_type:
        raise ConfigError(
            f"{section}.task_type is {name}, but for the task of this run it is {task_type}; "
            "remove it, or set task."
        )


def check_adapter_names(section: str, settings: Mapping[str, Any], model: "nn.Module") -> None:
    """Refuse modules and layers that the model does not have.

    Parameters
    ----------
    section
        Section of the configuration that names them.
    settings
        Fields of PEFT's configuration, as they were given.
    model
        The model with its adapters.

    Raises
    ------
    ConfigError
        For the first name that fits nothing; PEFT only minds where none of them does.
    """
    names = [f".{name}" for name, _ in model.named_modules() if name]
    for field in _OF_MODULES:
        wanted = settings.get(field)
        for name in wanted if isinstance(wanted, list | tuple | set) else ():
            if not any(path.endswith(f".{name}") for path in names):
                lasts = {path.rpartition(".")[2] for path in names}
                raise ConfigError(
                    f"{section}.{field} holds {name!r}, but no module of the model has a name that "
                    f"ends so; remove it.{suggest(str(name), lasts)}"
                )
    layers = settings.get("layers_to_transform")
    for layer in layers if isinstance(layers, list | tuple) else ():
        if not any(re.search(rf"\.{layer}(\.|$)", path) for path in names):
            raise ConfigError(
                f"{section}.layers_to_transform holds {layer}, but the model has no such layer; "
                "remove it."
            )
