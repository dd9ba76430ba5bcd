"""Where a model comes from: a folder written by save_pretrained, or a hub id."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError, suggest

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_model_name(name: str) -> None:
    """Raise `ConfigError` for a local path that holds no model; touches no network."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model_name_or_path {name} holds no config.json; expected a folder written by "
                "save_pretrained."
            )
    elif path.is_file() or path.is_absolute() or name.startswith((".", "~")):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(
            f"model_name_or_path {name} is not a folder; expected one written by save_pretrained, "
            "or a hub id." + suggest(path.name, siblings)
        )


def read_config(name: str | Path, **source: Any) -> "PretrainedConfig":
    """Read the config.json of a folder or a hub id; `source` as in `AutoConfig`.

    Raises
    ------
    ConfigError
        When there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    check_model_name(str(name))
    try:
        return AutoConfig.from_pretrained(str(name), **source)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"The configuration of model_name_or_path {str(name)!r} cannot be read "
            f"({reason[:200]}); give a folder with a config.json, or a hub id that this machine "
            "can reach."
        ) from error
