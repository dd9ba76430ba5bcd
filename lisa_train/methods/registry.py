"""`Method`: what a way of training says of itself; `METHODS`: all of them by name. No torch here.

To add one, subclass `Method` and `register` it; nothing else has to know its name.
"""

from collections.abc import Mapping
from dataclasses import field, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from lisa_analysis.contract.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from lisa_train.methods.lisa.config import LisaConfig


class Method:
    """A way of training. Everything but `name` and `help` has a default: plain training.

    Where a method is asked about settings they are a `TrainConfig` or, for an estimate of memory,
    a `lisa_train.estimate.setting.Setting`; both have `method` and the sections of the methods.

    Attributes
    ----------
    name
        Word for it in `TrainConfig.method` and run.json.
    help
        What it does, in half a sentence.
    settings
        Dataclass of the settings that this method brings with it, each with a default. They are a
        section of its name wherever a run is configured: in `TrainConfig`, `estimate_memory`,
        YAML files, options (``--name.setting``) and their help. None for the methods whose
        settings are fields of `TrainConfig` itself.
    sections
        Fields of `TrainConfig` with settings of this method; that of `settings` is added by
        `register`. Those of methods that are not chosen must be left alone.
    recipe
        YAML file that `lisa-train --config <name>` finds. Those of this package's own methods
        lie in `command/recipes`.
    changes_model
        Whether adapters are put on, or tensors are frozen before training begins. An estimate
        of memory then builds a model for this method alone.
    makes_steps
        Whether it makes optimizer steps; otherwise settings of those have no effect, which
        `remarks` says.
    resumable
        Whether a run that was interrupted goes on from a checkpoint.
    head_setting
        Setting in which ``head`` has to be named for the head to train, as ``select.groups``; None
        where there is none, or where it trains without being named.
    refuses_float16, refuses_quantized
        Why it does not take weights held in fp16, or quantized ones, and what to do; None where
        it takes them.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    settings: ClassVar[type[Any] | None] = None
    sections: ClassVar[tuple[str, ...]] = ()
    recipe: ClassVar[Path | None] = None
    changes_model: ClassVar[bool] = True
    makes_steps: ClassVar[bool] = True
    resumable: ClassVar[bool] = True
    head_setting: ClassVar[str | None] = None
    refuses_float16: ClassVar[str | None] = (
        "fp16 weights cannot be trained, small updates and Adam's epsilon vanish; set dtype to "
        "float32 and fp16 to true, or use bfloat16"
    )
    refuses_quantized: ClassVar[str | None] = (
        "quantized weights cannot be trained; use method lora, or an unquantized model"
    )

    def check(self, config: Any) -> None:
        """Refuse settings that contradict each other, in one sentence (`ConfigError`)."""

    def check_model(self, model: "nn.Module", config: Any) -> None:
        """Refuse settings that do not fit the model, before anything is written."""

    def check_estimate(self, setting: Any) -> None:
        """Refuse to estimate memory where the estimate would not hold."""

    def check_resume(self, config: Any) -> None:
        """Refuse to go on from a checkpoint where that is not the uninterrupted run."""
        if not self.resumable:
            raise ConfigError(
                f"method {self.name} has no checkpoint to go on from; start it anew, in another "
                "output_dir."
            )

    def prepare(self, model: "nn.Module", config: Any) -> None:
        """Set which tensors of the loaded model train (`requires_grad`)."""

    def peft_config(self, config: Any, task_type: str | None = None) -> Any:
        """Return PEFT's configuration of the adapters that are put on; None without any."""
        return None

    def attachments(self, config: Any) -> dict[str, Any]:
        """Return what `lisa_train.attach` is asked for, the recorder aside."""
        return {}

    def rotation(self, config: Any) -> "LisaConfig | None":
        """Return the settings by which layers take turns; None where the same tensors train."""
        return None

    def run_entries(self, config: Any, model: "nn.Module | None" = None) -> dict[str, Any]:
        """Return entries of run.json, over those that the model itself shows."""
        return {"method": self.name}

    def remarks(self, model: "nn.Module", config: Any) -> list[str]:
        """Return what a person should know before training, each without its full stop."""
        return []

    def run(self, prepared: Any) -> None:
        """Do what was asked for, with a `lisa_train.command.training.PreparedRun`."""
        prepared.train()

    def outcome(self, result: Mapping[str, Any]) -> str:
        """Say in a sentence what a run of this method did, from `result` of run.json."""
        first, last = result.get("first_held_out_loss"), result.get("last_held_out_loss")
        loss = f", held-out loss {first:.4f} → {last:.4f}" if None not in (first, last) else ""
        judged = _judged(result.get("last_held_out_scores"))
        return f"{result.get('steps')} steps{loss}{judged}{_best(result)}"

    def __repr__(self) -> str:
        return f"<method {self.name}: {self.help}>"


def _judged(scores: Mapping[str, float] | None) -> str:
    return "".join(f", {name.replace('_', ' ')} {v:.4f}" for name, v in (scores or {}).items())


def _best(result: Mapping[str, Any]) -> str:
    """Say which step's model is kept where it is not the last one's."""
    if (step := result.get("best_step")) is None:
        return ""
    loss = result.get("best_held_out_loss")
    known = "" if loss is None else f", held-out loss {loss:.4f}"
    return f"; kept is the model of step {step}{known}{_judged(result.get('best_held_out_scores'))}"


METHODS: dict[str, Method] = {}

_Kind = TypeVar("_Kind", bound=type[Method])


def register(kind: _Kind) -> _Kind:
    """Add a method to `METHODS`; a decorator of its class.

    Raises
    ------
    ConfigError
        For a name that another method has; for `settings` that cannot be a section, or that come
        when the configuration has its sections already (that is, after `lisa_train.TrainConfig`
        was used).

    Examples
    --------
    >>> from lisa_train.methods import METHODS, Method, register
    >>> @register
    ... class NormsOnly(Method):
    ...     name = "norms"
    ...     help = "trains the norms alone"
    ...
    ...     def prepare(self, model, config):
    ...         for name, tensor in model.named_parameters():
    ...             tensor.requires_grad_("norm" in name)
    >>> METHODS.pop("norms")
    <method norms: trains the norms alone>
    """
    if kind.name in METHODS:
        raise ConfigError(f"there is a method {kind.name!r} already; choose another name.")
    if kind.settings is not None:
        _check_settings(kind.name, kind.settings)
        kind.sections = tuple(dict.fromkeys((kind.name, *kind.sections)))
    METHODS[kind.name] = kind()
    return kind


def _check_settings(name: str, settings: type[Any]) -> None:
    if sections.cache_info().currsize:
        raise ConfigError(
            f"method {name} has settings, and comes after the configuration was made: register it "
            "before lisa_train.TrainConfig is used, or lay its folder into lisa_train/methods."
        )
    try:
        if not is_dataclass(settings):
            raise TypeError("it is no dataclass")
        settings()
    except TypeError as error:
        raise ConfigError(
            f"method {name} has {settings.__name__} for settings, which is no section ({error}); "
            "give a dataclass with a default for every field."
        ) from None


@cache
def sections() -> type:
    """Return a dataclass with the settings that methods bring; what a method reads inherits it.

    From the first call on no method with `settings` is registered any more.
    """
    brought = [
        (method.name, method.settings, field(default_factory=method.settings))
        for method in METHODS.values()
        if method.settings is not None
    ]
    return make_dataclass("Sections", brought, frozen=True, kw_only=True)
