"""Any adapter or prompt of PEFT, by its `peft_type` and the fields of its configuration."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.methods.adapter_names import check_task_type
from lisa_train.methods.registry import Method, register

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

# Fields that PEFT fills in itself, or that would leave nothing to train.
_NOT_SETTINGS = frozenset({"auto_mapping", "base_model_name_or_path", "inference_mode",
                           "peft_type", "peft_version", "revision", "runtime_config"})  # fmt: skip
# peft_type -> what it asks for that no task of `lisa-train` hands over.
_NEEDS_MORE = {
    "MULTITASK_PROMPT_TUNING": "the number of a task with every example",
    "POLY": "the number of a task with every example",
    "XLORA": "adapters that were trained before",
}
# Fields that PEFT leaves empty and does not check -> what they say.
_NO_DEFAULT = {
    "num_virtual_tokens": "the length of the prompt, as 20",
    "adapter_len": "the length of the prompt, as 20",
    "adapter_layers": "the number of layers, from the top, that get one",
}
_PROMPTS = frozenset({"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"})
# peft_type -> why its checkpoints do not hold everything that the training goes on from.
_LOSES_STATE = {
    "ADALORA": "how important each rank has been so far",
    "ADAMSS": "how important each subspace has been so far",
    "P_TUNING": "the network that makes the prompt, of which PEFT saves the prompt alone",
}


@register
class Peft(Method):
    """Train what a configuration of PEFT adds: adapters, prompts, scales; the model rests."""

    name = "peft"
    help = "trains another adapter, or a prompt, of PEFT (peft.peft_type and the type's own fields)"
    sections = ("peft",)
    refuses_float16 = None  # PEFT holds the adapters in fp32
    refuses_quantized = None

    def check(self, config: Any) -> None:
        """Refuse settings without a type, or with one that cannot be trained as configured."""
        kind = type_of(config.peft)
        if kind in _NEEDS_MORE:
            raise ConfigError(
                f"peft.peft_type {kind} needs {_NEEDS_MORE[kind]}, which no task has; choose "
                "another type."
            )
        if kind in ("ADALORA", "ADAMSS") and config.step_in_backward:
            raise ConfigError(
                f"peft.peft_type {kind} shares out ranks by the gradients of all its tensors, and "
                "step_in_backward frees each of them at once; set step_in_backward to false."
            )

    def check_resume(self, config: Any) -> None:
        """Refuse to go on from a checkpoint that lacks what trains."""
        kind = type_of(config.peft)
        lost = _LOSES_STATE.get(kind)
        if kind == "PREFIX_TUNING" and config.peft.get("prefix_projection"):
            lost = _LOSES_STATE["P_TUNING"]
        if lost is not None:
            raise ConfigError(
                f"a run with peft.peft_type {kind} cannot be resumed: its checkpoints do not hold "
                f"{lost}; start it anew, in another output_dir."
            )

    def check_model(self, model: "nn.Module", config: Any) -> None:
        """Refuse a prompt where every token has a label: PEFT puts none on the prompt's own."""
        from lisa_train.model.module_tree import task_type_of

        kind = type_of(config.peft)
        if kind in _PROMPTS and task_type_of(model) == "TOKEN_CLS":
            raise ConfigError(
                f"peft.peft_type {kind} puts tokens in front of a text, for which PEFT makes no "
                "labels; train token-classification with an adapter (ia3, lora, …)."
            )

    def peft_config(self, config: Any, task_type: str | None = None) -> "PeftConfig":
        """Return the configuration that `config.peft` describes."""
        steps = getattr(config, "max_steps", None)
        return any_peft_config(config.peft, task_type, steps if steps and steps > 0 else None)


def type_of(settings: Mapping[str, Any]) -> str:
    """Return the type that the settings name, as PEFT spells it: `prefix-tuning` is PREFIX_TUNING.

    Raises
    ------
    ConfigError
        When there is none, or when it has a method of its own (`lora`).
    """
    given = settings.get("peft_type")
    if not isinstance(given, str) or not given:
        raise ConfigError(
            "method is peft but peft.peft_type names no type; give one, as ia3, ln_tuning, "
            "prompt_tuning, prefix_tuning, p_tuning, loha, lokr, oft, vera or adalora."
        )
    kind = given.upper().replace("-", "_")
    if kind == "LORA":
        raise ConfigError(
            "peft.peft_type LORA has a method of its own: set method to lora, and write its "
            "fields below lora (use_dora, use_rslora, … among them)."
        )
    return kind


def any_peft_config(
    settings: Mapping[str, Any], task_type: str | None, max_steps: int | None = None
) -> "PeftConfig":
    """Build a configuration of PEFT from `peft_type` and the fields of its class.

    Parameters
    ----------
    settings
        `peft_type`, in any spelling of its letters, and fields of the type's configuration class.
    task_type
        PEFT's word for what the model is for; None for a model that PEFT does not name.
    max_steps
        Steps of the training, for a type that plans over them (`total_step`).

    Raises
    ------
    ConfigError
        For a type that PEFT does not have, a field that the type does not have, or a value that
        it refuses.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = type_of(settings)
    classes = {str(k.value): v for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if kind not in classes:
        raise ConfigError(
            f"peft.peft_type is {settings['peft_type']!r}, which the installed PEFT does not have; "
            f"it has {', '.join(sorted(classes))}.{suggest(kind, classes)}"
        )
    config_class: Any = classes[kind]
    known = {f.name for f in dataclasses.fields(config_class) if f.init} - _NOT_SETTINGS
    given = {name: value for name, value in settings.items() if name != "peft_type"}
    for name in given:
        if name not in known:
            raise ConfigError(
                f"peft.{name} is not a field of PEFT's {config_class.__name__}."
                + suggest(name, known)
            )
    check_task_type("peft", given, task_type)
    values = {"task_type": task_type, **given}
    if "total_step" in known and max_steps is not None:
        values.setdefault("total_step", max_steps)
    try:
        built = config_class(**values)
    except (TypeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(f"PEFT refuses the settings of {kind}: {reason}.") from error
    for name, what in _NO_DEFAULT.items():
        if name in known and getattr(built, name) is None:
            raise ConfigError(f"peft.peft_type {kind} needs peft.{name}: {what}.")
    return built
