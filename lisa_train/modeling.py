"""Load a model and its tokenizer from a folder or a hub id; build the LoRA configuration."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.errors import ConfigError, suggest
from lisa_train.config import TrainConfig

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LORA_DEFAULTS: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


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


def load_model(config: TrainConfig) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load model and tokenizer of a configuration.

    Raises
    ------
    ConfigError
        When there is no such model, it cannot be read, or it has no tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_model_name(config.model_name_or_path)
    source = {
        "revision": config.model_revision,
        "trust_remote_code": config.trust_remote_code,
    }
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    what = "model"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            **source,
        )
        what = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, **source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"The {what} of model_name_or_path {config.model_name_or_path!r} cannot be loaded "
            f"({reason[:200]}); give a folder written by save_pretrained, or a hub id that this "
            "machine can reach."
        ) from error
    if getattr(model, "hf_quantizer", None) is not None and config.method != "lora":
        raise ConfigError(
            f"{config.model_name_or_path} is quantized and method is {config.method}: quantized "
            "weights cannot be trained; use method lora, or an unquantized model."
        )
    return model, tokenizer


def lora_config(config: TrainConfig) -> "LoraConfig":
    """Build PEFT's `LoraConfig` from `config.lora` over the defaults r=16, alpha=32, all linear.

    Raises
    ------
    ConfigError
        For a field that `LoraConfig` does not have, or a value that it refuses.
    """
    from peft import LoraConfig

    known = {f.name for f in fields(LoraConfig)}
    for name in config.lora:
        if name not in known:
            raise ConfigError(
                f"lora.{name} is not a field of PEFT's LoraConfig.{suggest(name, known)}"
            )
    settings = {**LORA_DEFAULTS, "task_type": "CAUSAL_LM", **config.lora}
    if not isinstance(settings["r"], int) or settings["r"] < 1:
        raise ConfigError(f"lora.r is {settings['r']!r}; expected a rank of at least 1.")
    try:
        return LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"PEFT refuses the lora settings: {error}") from error


def describe_model(model: "PreTrainedModel", name: str) -> dict[str, Any]:
    """Entry `model` of a run's manifest: what was trained, before any adapter is added."""
    return {
        "name": name,
        "architecture": type(model).__name__,
        "model_type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
