"""`TrainConfig`: a whole training run, LISA and the recorder in it."""

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from lisa_analysis.contract.errors import ConfigError, suggest
from lisa_train.checks import one_of
from lisa_train.command.probe import ProbeConfig
from lisa_train.command.tasks import AUTO, TASKS
from lisa_train.measure.config import RecordConfig
from lisa_train.methods import METHODS, sections
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.select.config import SelectConfig
from lisa_train.optim.settings import check_eight_bit_states, check_step_settings

if TYPE_CHECKING:

    class _Sections: ...
else:
    _Sections = sections()


@dataclass(frozen=True)
class TrainConfig(_Sections):
    """A whole training run. Names are those of transformers, TRL and PEFT.

    Parameters
    ----------
    model_name_or_path
        Folder of a saved model, or a hub id.
    dataset_name
        JSONL, JSON, CSV, TSV or Parquet file, folder (saved dataset, data files, or a folder of
        images per class), or a hub id. Columns for causal-lm: `text`; or `prompt` and
        `completion`; or `instruction`, `output` and perhaps `input`; or `messages`, with `tools`
        and `chat_template_kwargs` if the template takes them; or `input_ids`, with `labels` or
        masks. Those of the other tasks stand in docs/tasks.md.
    method
        ``full`` trains every weight, ``lora`` an adapter, ``lisa`` a few layers at a time,
        ``peft`` another adapter or a prompt of PEFT, ``select`` the layers or tensors that are
        named; ``probe`` trains nothing and measures gradients. `lisa_train.METHODS` holds them all.
    output_dir
        The run directory. None makes a new one, `runs/<method>-<date>-<time>`.
    task
        ``causal-lm``, ``seq2seq-lm``, ``text-classification``, ``token-classification``,
        ``image-classification`` or ``speech-recognition``; ``auto`` is what the model's head is
        for.
    model_revision
        Branch, tag or commit of a hub model.
    dtype
        Precision the weights are held in; ``auto`` takes that of the files.
    attn_implementation
        Attention kernel, as in transformers (``sdpa``, ``eager``, …); None lets it choose.
    trust_remote_code
        Run model code that comes with the weights.
    dataset_config
        Configuration name of a hub dataset.
    dataset_train_split
        Split to train on.
    dataset_test_split
        Held-out split, when the dataset has one of that name; another name than ``test`` must be
        there. None holds out a share of the training split.
    eval_size
        Without such a split: how much of the training split to hold out, as a fraction below 1
        or a number of examples; 0 holds out nothing.
    columns
        Which column of the data is which: ``{label: intent}`` reads `intent` as the label.
    max_train_samples, max_eval_samples
        Use only so many examples.
    dataset_text_field
        Column of plain text.
    max_length
        Longest sequence in tokens; longer ones are cut. None cuts nothing.
    packing
        Put several examples into one sequence instead of padding.
    completion_only_loss
        Loss on the completion alone. None: yes for prompt/completion data, no otherwise. For
        `messages`, true means the last assistant turn.
    assistant_only_loss
        `messages` only: loss on every assistant turn; the chat template must mark them.
    learning_rate
        Peak learning rate.
    lr_scheduler_type
        ``linear``, ``cosine``, ``constant_with_warmup``, …
    warmup_steps
        Steps of linear warm-up; below 1, a fraction of all steps.
    num_train_epochs
        Passes over the data, unless `max_steps` is set.
    max_steps
        Optimizer steps; -1 lets `num_train_epochs` decide.
    per_device_train_batch_size, per_device_eval_batch_size
        Examples per device and forward pass.
    gradient_accumulation_steps
        Forward passes per optimizer step.
    max_grad_norm
        Gradients are clipped to this global norm; 0 never clips.
    weight_decay
        Decoupled weight decay; not applied to biases and norms.
    optim
        Optimizer, as transformers names it (`adamw_torch_fused`, `adafactor`, `adamw_bnb_8bit`, …).
    step_in_backward
        Step every tensor within the backward pass, as soon as its gradient is complete, and free
        the gradient. The same weights bit for bit; needs `max_grad_norm: 0` and no accumulation.
    eight_bit_states
        With an 8-bit `optim` of bitsandbytes: the groups whose optimizer state is 8-bit, any of
        ``layers``, ``embed``, ``head``, ``norm``, ``other``; that of the rest is 32-bit. None
        leaves it to transformers: embeddings in 32 bits, everything else in 8.
    lr_multipliers
        File of multipliers of the learning rate by layer, as `lisa-analyze --export lr:FILE` writes
        it, for every method that trains.
    gradient_checkpointing
        Recompute activations in the backward pass instead of keeping them.
    bf16, fp16
        Compute in that precision by autocast; the weights stay in `dtype`.
    seed
        Seed of model initialisation, data order and, unless `lisa.seed` is set, of the layer
        schedule.
    data_seed
        Seed of the data order alone.
    eval_steps
        Evaluate every so many steps; None evaluates after training only.
    eval_on_start
        Evaluate before the first step as well.
    save_steps
        Write a checkpoint every so many steps; None writes none.
    save_total_limit
        Keep only the newest checkpoints.
    resume_incomplete
        Let `--resume` go on where the checkpoint or the inputs lack something without which the
        result is not that of the uninterrupted run; an event says what. Otherwise it is refused.
    save_final_model
        Write the trained model (`checkpoints/final`) or adapter (`adapter`) at the end.
    logging_steps
        Report to trackers and the progress bar every so many steps.
    report_to
        Trackers: ``tensorboard``, ``wandb``, ``trackio``, …; one, a list, or names with commas.
    progress_bar
        True shows a bar, false nothing; None shows a bar in a terminal and a notebook, and a few
        lines elsewhere.
    trainer_args
        Any other field of TRL's `SFTConfig`.
    lisa
        Settings of `method: lisa`.
    lora
        Fields of PEFT's `LoraConfig`, for `method: lora`; with `method: probe` they put adapters
        on, to be measured beside the weights of the model.
    peft
        `peft_type` (``ia3``, ``prefix_tuning``, ``oft``, …) and the fields of that type's
        configuration class in PEFT, for `method: peft`.
    select
        Settings of `method: select`: what trains.
    probe
        Settings of `method: probe`.
    record
        What is measured, and how often.
    """

    model_name_or_path: str
    dataset_name: str
    method: str = "lisa"
    output_dir: str | None = None
    task: str = AUTO
    model_revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = "test"
    eval_size: float = 0.05
    columns: dict[str, str] = field(default_factory=dict)
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    dataset_text_field: str = "text"
    max_length: int | None = 1024
    packing: bool = False
    completion_only_loss: bool | None = None
    assistant_only_loss: bool = False
    learning_rate: float = 5e-5
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    optim: str = "adamw_torch_fused"
    step_in_backward: bool = False
    eight_bit_states: tuple[str, ...] | None = None
    lr_multipliers: str | None = None
    gradient_checkpointing: bool = False
    bf16: bool = False
    fp16: bool = False
    seed: int = 42
    data_seed: int | None = None
    eval_steps: int | None = None
    eval_on_start: bool = True
    save_steps: int | None = None
    save_total_limit: int | None = None
    resume_incomplete: bool = False
    save_final_model: bool = True
    logging_steps: int = 10
    report_to: tuple[str, ...] | str = ()
    progress_bar: bool | None = None
    trainer_args: dict[str, Any] = field(default_factory=dict)
    lisa: LisaConfig = field(default_factory=LisaConfig)
    lora: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] = field(default_factory=dict)
    select: SelectConfig = field(default_factory=SelectConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    record: RecordConfig = field(default_factory=RecordConfig)

    def __post_init__(self) -> None:
        if isinstance(self.report_to, str):
            trackers = (name.strip() for name in self.report_to.split(","))
            object.__setattr__(self, "report_to", tuple(name for name in trackers if name))
        one_of("task", self.task, (AUTO, *TASKS))
        _check_method(self)
        _check_precision(self)
        _check_numbers(self)
        _check_data(self)
        METHODS[self.method].check(self)
        if self.step_in_backward:
            check_step_settings(
                max_grad_norm=self.max_grad_norm,
                gradient_accumulation_steps=self.gradient_accumulation_steps,
                fp16=self.fp16,
                optim=self.optim,
            )
        if self.eight_bit_states is not None:
            object.__setattr__(self, "eight_bit_states", tuple(self.eight_bit_states))
            check_eight_bit_states(self.eight_bit_states, self.optim)
        own = sorted(set(self.trainer_args) & set(TrainConfig.__dataclass_fields__))
        if own:
            raise ConfigError(
                f"trainer_args.{own[0]} is a setting of its own: write {own[0]} at the top level."
            )
        if self.trainer_args.get("deepspeed"):
            raise ConfigError(
                "trainer_args.deepspeed is set, but gradients cannot be read under DeepSpeed, "
                "whichever stage of ZeRO; leave it out and start one process per GPU (torchrun "
                "--nproc-per-node N -m lisa_train)."
            )


for _own in fields(sections()):
    TrainConfig.__doc__ = (
        f"{TrainConfig.__doc__}{_own.name}\n        Settings of `method: {_own.name}`.\n    "
    )


def _check_method(config: TrainConfig) -> None:
    """Refuse a method that there is not, and settings of those that are not chosen."""
    method = METHODS.get(str(config.method))
    if method is None:
        raise ConfigError(
            f"method is {config.method!r}; expected one of {', '.join(METHODS)}."
            + suggest(str(config.method), METHODS)
        )
    untouched = {f.name: f.default_factory for f in fields(TrainConfig)}
    for other in METHODS.values():
        for section in set(other.sections) - set(method.sections):
            changed = _first_changed(getattr(config, section), untouched[section]())  # type: ignore[operator]
            if changed is not None:
                raise ConfigError(
                    f"{section}.{changed} is set but method is {config.method!r}; "
                    f"set method to {other.name}, or remove the {section} settings."
                )


def _first_changed(given: Any, untouched: Any) -> str | None:
    """Name of a setting that is not as it comes; None where all are."""
    if given == untouched:
        return None
    if isinstance(given, dict):
        return str(min(given))
    return next(
        f.name for f in fields(given) if getattr(given, f.name) != getattr(untouched, f.name)
    )


def _check_precision(config: TrainConfig) -> None:
    if config.bf16 and config.fp16:
        raise ConfigError("bf16 and fp16 are both true; choose one precision to compute in.")
    reason = METHODS[config.method].refuses_float16
    if config.dtype == "float16" and reason is not None:
        raise ConfigError(f"dtype is float16 and method is {config.method}: {reason}.")


# name -> (smallest value allowed, in words)
_AT_LEAST: dict[str, tuple[float, str]] = {
    "per_device_train_batch_size": (1, "at least 1"),
    "per_device_eval_batch_size": (1, "at least 1"),
    "gradient_accumulation_steps": (1, "at least 1"),
    "logging_steps": (1, "at least 1"),
    "eval_steps": (1, "at least 1, or null for none"),
    "save_steps": (1, "at least 1, or null for none"),
    "save_total_limit": (1, "at least 1, or null for all"),
    "max_train_samples": (1, "at least 1, or null for all"),
    "max_eval_samples": (1, "at least 1, or null for all"),
    "max_length": (2, "at least 2 tokens, or null for no limit"),
    "eval_size": (0, "0 or more"),
    "learning_rate": (0, "0 or more"),
    "warmup_steps": (0, "0 or more"),
    "max_grad_norm": (0, "0 or more"),
    "weight_decay": (0, "0 or more"),
    "seed": (0, "0 or more"),
    "data_seed": (0, "0 or more, or null for the seed"),
}


def _check_numbers(config: TrainConfig) -> None:
    for name, (least, words) in _AT_LEAST.items():
        value = getattr(config, name)
        if value is not None and not value >= least:  # `not >=` also catches NaN
            raise ConfigError(f"{name} is {value}; expected {words}.")
    if config.eval_size >= 1 and config.eval_size != int(config.eval_size):
        raise ConfigError(
            f"eval_size is {config.eval_size}; expected a fraction below 1 or a whole number of "
            "examples."
        )
    if config.max_steps != -1 and config.max_steps < 1:
        raise ConfigError(
            f"max_steps is {config.max_steps}; expected at least 1, or -1 to let "
            "num_train_epochs decide."
        )
    if config.max_steps == -1 and not config.num_train_epochs > 0:
        raise ConfigError(
            f"num_train_epochs is {config.num_train_epochs} and max_steps is not set: nothing "
            "would be trained; set one of them above 0."
        )


def _check_data(config: TrainConfig) -> None:
    if config.eval_steps is not None and not config.eval_size and not config.dataset_test_split:
        raise ConfigError(
            f"eval_steps is {config.eval_steps} but nothing is held out; set eval_size above 0 "
            "or name a dataset_test_split."
        )
    if config.assistant_only_loss and config.completion_only_loss:
        raise ConfigError(
            "assistant_only_loss and completion_only_loss are both true; choose every assistant "
            "turn (assistant_only_loss) or the last one (completion_only_loss)."
        )
    if config.packing and config.max_length is None:
        raise ConfigError("packing is true but max_length is null; set the length to pack to.")
