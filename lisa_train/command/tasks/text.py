"""Load a model and its tokenizer from a folder or a hub id."""

from typing import TYPE_CHECKING

from lisa_analysis.contract.errors import ConfigError
from lisa_train.command.config import TrainConfig
from lisa_train.command.starting import refusals
from lisa_train.model.source import check_model_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    def say(reason: str) -> str:
        return (
            f"The {what} of model_name_or_path {config.model_name_or_path!r} cannot be loaded "
            f"({reason[:200]}); give a folder written by save_pretrained, or a hub id that this "
            "machine can reach."
        )

    with refusals(say):
        model = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path,
            dtype=dtype,
            attn_implementation=config.attn_implementation,
            **source,
        )
        what = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, **source)
    if getattr(model, "hf_quantizer", None) is not None and config.method != "lora":
        raise ConfigError(
            f"{config.model_name_or_path} is quantized and method is {config.method}: quantized "
            "weights cannot be trained; use method lora, or an unquantized model."
        )
    return model, tokenizer
