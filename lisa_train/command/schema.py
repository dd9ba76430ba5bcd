"""The configuration for editors: a JSON schema with every setting, its type, choices and words."""

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.config import TrainConfig
from lisa_train.command.help import documented
from lisa_train.command.tasks import AUTO, TASKS
from lisa_train.command.words import OF_THE_COMMAND, dataclass_of
from lisa_train.methods import METHODS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def config_schema(parser: "ArgumentParser") -> dict[str, Any]:
    """Return the JSON schema of the YAML files that `lisa-train --config` reads.

    Types and defaults are jsonargparse's reading of `TrainConfig`. Nothing is required: a recipe
    holds a part of a configuration.

    Raises
    ------
    ConfigError
        When the installed jsonargparse makes no schemas yet.
    """
    try:
        schema: dict[str, Any] = json.loads(parser.get_completion_script("jsonschema"))
    except (AttributeError, ValueError):
        raise ConfigError(
            "the installed jsonargparse makes no JSON schema: pip install --upgrade jsonargparse."
        ) from None
    schema = _without_requirements(schema)
    properties = schema["properties"]
    for word in OF_THE_COMMAND:
        properties.pop(word, None)
    properties["method"]["enum"] = list(METHODS)
    properties["task"]["enum"] = [AUTO, *TASKS]
    _describe(properties, TrainConfig)
    return {"title": "lisa-train", **schema}


def _describe(properties: dict[str, Any], cls: Any) -> None:
    """Fill in what two settings that are told together have in common; jsonargparse leaves it."""
    texts = documented(cls)
    for setting in fields(cls):
        entry = properties.get(setting.name, {})
        if "description" not in entry and setting.name in texts:
            entry["description"] = texts[setting.name].replace("``", "`")
        if "properties" in entry:
            _describe(entry["properties"], dataclass_of(setting.type))


def _without_requirements(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_requirements(part) for part in node]
    if not isinstance(node, dict):
        return node
    kept = {k: v for k, v in node.items() if not (k == "required" and isinstance(v, list))}
    return {
        key: " ".join(value.replace("``", "`").split())
        if key == "description" and isinstance(value, str)
        else _without_requirements(value)
        for key, value in kept.items()
    }
