"""`Task`: what a run trains for. One small class per task; `choose_task` finds the one of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.command.config import TrainConfig
from lisa_train.command.tasks import AUTO, TASKS, task_named
from lisa_train.model.source import read_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, Trainer, TrainingArguments

    from lisa_train.command.tasks.data import TrainingData


@dataclass
class Loaded:
    """What a run trains, and on what.

    Attributes
    ----------
    model, processor
        The model, and the tokenizer or processor that makes its inputs.
    data
        The rows.
    new
        Tensors of the model that its files do not hold: they start at random.
    said
        What a person should know of it, each without its full stop.
    """

    model: Any
    processor: Any
    data: "TrainingData"
    new: tuple[str, ...] = ()
    said: list[str] = field(default_factory=list)


class Task:
    """What a run trains for.

    Attributes
    ----------
    name
        Word for it in `TrainConfig.task` and run.json.
    peft_type
        PEFT's word for it; None where PEFT has none.
    mappings
        Tables of transformers' auto classes that hold the models with a head for it, by the name
        of the auto class.
    reads
        Columns that it reads, and what they hold, for `TrainConfig.columns` and for errors.
    new_scores
        Scores of its held-out part that `lisa_analysis.contract.schema.HELD_OUT_SCORES` does not
        know, with their meaning.
    """

    name: ClassVar[str]
    peft_type: ClassVar[str | None] = None
    mappings: ClassVar[Mapping[str, str]]
    reads: ClassVar[Mapping[str, str]]
    new_scores: ClassVar[Mapping[str, str]] = {}

    def check(self, config: TrainConfig) -> None:
        """Refuse settings that belong to another task."""

    def arguments(self) -> "type[TrainingArguments]":
        """Return the class of the trainer's arguments."""
        raise NotImplementedError

    def load(self, config: TrainConfig) -> Loaded:
        """Load data, model and processor; refuse what does not fit together."""
        raise NotImplementedError

    def build_trainer(
        self, loaded: Loaded, arguments: Any, peft_config: Any, config: TrainConfig
    ) -> "Trainer":
        """Build the trainer, with the adapters around the model."""
        raise NotImplementedError

    def survey(
        self, trainer: Any, loaded: Loaded, config: TrainConfig
    ) -> tuple[dict[str, Any], list[str]]:
        """Check the prepared rows; return what was found, for run.json, and what to say."""
        raise NotImplementedError


def names_of(task: Task) -> dict[str, tuple[str, str]]:
    """Return, by model type, the auto class and the class that transformers has for the task."""
    from transformers.models.auto import modeling_auto

    found: dict[str, tuple[str, str]] = {}
    for auto_class, table in task.mappings.items():
        for model_type, name in getattr(modeling_auto, table).items():
            first = name if isinstance(name, str) else name[0]
            found.setdefault(model_type, (auto_class, first))
    return found


def choose_task(config: TrainConfig) -> Task:
    """Return the task of a run; ``auto`` is what the model's own head is for.

    Raises
    ------
    ConfigError
        When the model does not say, or has no head for the task that is set.
    """
    if config.task != AUTO:
        task = task_named(config.task)
        task.check(config)
        return task
    source = read_config(
        config.model_name_or_path,
        revision=config.model_revision,
        trust_remote_code=config.trust_remote_code,
    )
    task = task_named(_told_by(source, config))
    task.check(config)
    return task


def _told_by(source: "PretrainedConfig", config: TrainConfig) -> str:
    architecture = (getattr(source, "architectures", None) or [""])[0]
    tables = {name: names_of(task_named(name)) for name in TASKS}
    for name, table in tables.items():
        if name != "causal-lm" and architecture in {found for _, found in table.values()}:
            return name
    if architecture.endswith("ForCTC"):
        return "speech-recognition"  # which says that it does not take such a head
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    generates = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    able = [name for name, table in tables.items() if source.model_type in table]
    reads_both_ways = source.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if generates or not able or ("causal-lm" in able and not reads_both_ways):
        return "causal-lm"
    fitting = [name for name in able if name != "causal-lm"] or able
    raise ConfigError(
        f"task is auto, but the model of {config.model_name_or_path} "
        f"({architecture or source.model_type}) has no head that says what it is for; set task to "
        f"{' or '.join(fitting)}."
    )


def head_class(task: Task, source: "PretrainedConfig", config: TrainConfig) -> tuple[str, str]:
    """Return the auto class for a model, and the name of the class that it gives.

    Raises
    ------
    ConfigError
        When transformers has no such head for the model.
    """
    table = names_of(task)
    remote = getattr(source, "auto_map", None) or {}
    for auto_class in task.mappings:
        if config.trust_remote_code and auto_class in remote:
            return auto_class, auto_class
    if source.model_type not in table:
        able = [n for n in TASKS if source.model_type in names_of(task_named(n))]
        other = f"; it has one for {', '.join(able)}" if able else ""
        raise ConfigError(
            f"task is {task.name}, but transformers has no head for it on the model of "
            f"{config.model_name_or_path} ({source.model_type}){other}."
        )
    return table[source.model_type]


def check_columns(columns: Mapping[str, str], task: Task) -> None:
    """Refuse names in `columns` that the task does not read."""
    for name in columns:
        if name not in task.reads:
            raise ConfigError(
                f"columns.{name}: task {task.name} reads "
                f"{', '.join(task.reads)}.{suggest(name, task.reads)}"
            )


def refuse_settings_of_text(config: TrainConfig, task: Task, others: Sequence[str] = ()) -> None:
    """Refuse settings that only causal language models have a use for."""
    defaults = TrainConfig.__dataclass_fields__
    for name in ("packing", "completion_only_loss", "assistant_only_loss", "dataset_text_field",
                 *others):  # fmt: skip
        value = getattr(config, name)
        if value != defaults[name].default:
            use = " (columns: {text: …} names the column)" if name == "dataset_text_field" else ""
            raise ConfigError(
                f"{name} is {value!r} but task is {task.name}: it is a setting of causal-lm{use}; "
                "remove it."
            )
