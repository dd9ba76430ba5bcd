"""Every setting of a training run: frozen dataclasses, the same from YAML, shell and notebook.

No torch here: `lisa-train --help` and `--print_config` must not wait for it.
"""

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any, Literal, get_args

from lisa_analysis.errors import ConfigError, suggest
from lisa_train.step_conditions import check_step_settings

ALWAYS_ACTIVE_GROUPS = ("embed", "head", "norm")
Sampling = Literal[
    "uniform", "bernoulli", "cyclic", "systematic", "conditional_poisson", "balanced"
]
OptimizerState = Literal["reset", "keep", "offload"]
ActivePrecision = Literal["model", "fp32_active"]
Recompute = Literal["all", "frozen"]


@dataclass(frozen=True)
class LisaConfig:
    """Which layers train, and for how long (LISA, arXiv 2403.17919, Algorithm 1).

    Parameters
    ----------
    activated_layers
        Number of layers k that train in each interval (γ in the paper); with
        `sampling="bernoulli"` the expected number.
    interval_steps
        Optimizer steps K between two draws.
    sampling
        How the layers of an interval are drawn: ``uniform`` (all sets of k layers equally
        likely), ``bernoulli`` (every layer on its own, the paper's first version), ``cyclic``
        (shuffled sweeps), and three exact schemes for unequal probabilities: ``systematic``,
        ``conditional_poisson`` and ``balanced`` (no layer waits long). ``uniform`` with unequal
        `probabilities` draws by the systematic scheme, of which it is the equal-weight case.
    probabilities
        Path of a `probabilities.json` file, or a sequence of inclusion probabilities π, one per
        layer, Σπ = k. None means equal probabilities k/L.
    always_active
        Groups that train in every interval: any of ``embed``, ``head``, ``norm``.
    optimizer_state
        What happens to the optimizer state of a layer that is frozen again: ``reset`` frees it,
        ``keep`` leaves it, ``offload`` moves it to host memory until the layer returns.
    seed
        Seed of the layer schedule; None takes the training seed.
    warmup_steps
        Scale the first updates of a layer after its activation by 1/(n+1), 2/(n+1), … over n
        steps; after a state reset, Adam's first step moves every weight by the full learning rate.
    embed_probability
        Draw the embeddings in each interval with this probability, like a layer, instead of
        naming them in `always_active`.
    head_probability
        The same for the head; a head tied to the embeddings goes with them.
    layers
        Path of the list of layers to rotate, as ``model.vision_tower.encoder.layers``; several
        separated by commas. Needed only where the structure of a model leaves a choice.
    precision
        ``model`` trains in the precision of the weights. ``fp32_active`` holds the active tensors
        of a bf16 model in fp32, computes under bf16 autocast, and rounds them stochastically to
        bf16 when they are frozen: pure bf16 rounds most of a small update away. Checkpoints of a
        running training hold the active tensors in fp32; the trained model is bf16 again.
    recompute
        With gradient checkpointing, the layers that run again in the backward pass: ``all``, or
        the ``frozen`` ones alone: those that train keep their activations, which saves their
        second forward pass and costs their memory.
    """

    activated_layers: int = 2
    interval_steps: int = 20
    sampling: Sampling = "uniform"
    probabilities: str | tuple[float, ...] | None = None
    always_active: tuple[str, ...] = ALWAYS_ACTIVE_GROUPS
    optimizer_state: OptimizerState = "reset"
    seed: int | None = None
    warmup_steps: int = 0
    embed_probability: float | None = None
    head_probability: float | None = None
    layers: str | None = None
    precision: ActivePrecision = "model"
    recompute: Recompute = "all"

    def __post_init__(self) -> None:
        for name, least in (("activated_layers", 1), ("interval_steps", 1), ("warmup_steps", 0)):
            value = _whole(f"lisa.{name}", getattr(self, name), f" of at least {least}", least)
            object.__setattr__(self, name, value)
        if self.seed is not None:
            words = ", or None for the training seed"
            object.__setattr__(self, "seed", _whole("lisa.seed", self.seed, words))
        if not isinstance(self.layers, str | None):
            raise ConfigError(
                f"lisa.layers is {self.layers!r}, but must be the path of the list of layers, as "
                "'model.layers', or None to find it."
            )
        _one_of("lisa.sampling", self.sampling, get_args(Sampling))
        _one_of("lisa.optimizer_state", self.optimizer_state, get_args(OptimizerState))
        _one_of("lisa.precision", self.precision, get_args(ActivePrecision))
        _one_of("lisa.recompute", self.recompute, get_args(Recompute))
        if isinstance(self.always_active, str):
            raise ConfigError(
                f"lisa.always_active is the text {self.always_active!r}, but must be a list of "
                f"groups, as [{self.always_active}]."
            )
        if not isinstance(self.always_active, Iterable):
            raise ConfigError(
                f"lisa.always_active is {self.always_active!r}, but must be a list of groups (of "
                f"{', '.join(ALWAYS_ACTIVE_GROUPS)}); give [] for none."
            )
        object.__setattr__(self, "always_active", tuple(self.always_active))
        for group in self.always_active:
            _one_of("lisa.always_active", group, ALWAYS_ACTIVE_GROUPS)
        for group, given in self.group_probabilities.items():
            option = f"{group}_probability"
            probability = _real(f"lisa.{option}", given, "a number in (0, 1], or None")
            object.__setattr__(self, option, probability)
            if not 0.0 < probability <= 1.0:
                raise ConfigError(
                    f"lisa.{group}_probability is {probability:g}, but must lie in (0, 1]; leave "
                    f"{group!r} out of always_active to freeze it."
                )
            if group in self.always_active:
                raise ConfigError(
                    f"lisa.{group}_probability is {probability:g}, but {group!r} is also in "
                    f"always_active = {list(self.always_active)}; take it out of one of them."
                )
        self._check_probabilities()

    @property
    def group_probabilities(self) -> dict[str, float]:
        """Groups that are drawn like layers, with their probability."""
        given = {"embed": self.embed_probability, "head": self.head_probability}
        return {group: p for group, p in given.items() if p is not None}

    def _check_probabilities(self) -> None:
        if self.probabilities is None or isinstance(self.probabilities, str | PathLike):
            if isinstance(self.probabilities, PathLike):
                object.__setattr__(self, "probabilities", fspath(self.probabilities))
            return
        try:
            given = tuple(self.probabilities)
        except TypeError:  # a number, or an array without dimensions
            raise ConfigError(
                f"lisa.probabilities is {self.probabilities!r}, but must be the path of a "
                "probabilities.json file or a list of one number per layer."
            ) from None
        values = tuple(
            _real(f"lisa.probabilities[{i}]", p, "a number above 0 and at most 1")
            for i, p in enumerate(given)
        )
        object.__setattr__(self, "probabilities", values)
        for i, value in enumerate(values):
            if not 0.0 < value <= 1.0:
                raise ConfigError(
                    f"lisa.probabilities[{i}] is {value:g}, but every inclusion probability must "
                    "be above 0 and at most 1."
                )
        # The same tolerance as the samplers': the rounding of a file with six decimals.
        if abs(sum(values) - self.activated_layers) > 1e-5:
            raise ConfigError(
                f"lisa.probabilities sum to {sum(values):.6g}, but activated_layers is "
                f"{self.activated_layers}: they must be equal; scale the probabilities or set "
                "activated_layers to their sum."
            )


def _whole(option: str, value: Any, words: str, least: int | None = None) -> int:
    """Return a whole number of any type (numpy's too) as int, or raise `ConfigError`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        raise ConfigError(f"{option} is {value!r}, but must be a whole number{words}.")
    return number


def _real(option: str, value: Any, words: str) -> float:
    """Return a number of any type as float, or raise `ConfigError`."""
    try:
        if not isinstance(value, str | bytes | bool):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{option} is {value!r}, but must be {words}.")


def _one_of(option: str, value: Any, allowed: tuple[str, ...]) -> None:
    """`ConfigError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(
            f"{option} is {value!r}, but must be one of {', '.join(allowed)}."
            f"{suggest(str(value), allowed)}"
        )


QUANTITIES = (
    "weight_norm",
    "grad_norm",
    "grad_norm_l1",
    "update_norm",
    "descent",
    "delta_norm",
    "merged_norm",
    "opt_steps",
)
# Quantities that only a tensor that trains in the step has.
OF_TRAINING = ("grad_norm", "grad_norm_l1", "update_norm", "descent", "opt_steps")


@dataclass(frozen=True)
class RecordConfig:
    """What a run writes into its run directory, and how often.

    Parameters
    ----------
    run_dir
        The run directory. `lisa-train` fills in its `output_dir`.
    every
        Record the norms of every n-th optimizer step (and of the first).
    quantities
        Columns of the metrics table to measure at those steps. `update_norm` and `descent` keep
        a copy of the weights that train during such a step; `delta_norm` and `merged_norm` are
        those of LoRA adapters. Norms of weights alone get `opt_steps` with them: a census has
        these norms too, of frozen tensors as well, and the analysis must tell the two apart.
    select
        Measure only these tensors: layer indices (``3``), kinds (``attn.q``), or regular
        expressions that are searched in the tensor's name. None measures all.
    layers
        Path of the list that holds the layers, where the model's structure leaves it open
        (with LISA: `LisaConfig.layers`).
    base_delta
        Measure ‖W − W₀‖ of every tensor of the model in each census (start, checkpoints, end);
        W₀ is read again from the base checkpoint, tensor by tensor.
    grad_noise
        Measure the variance of the gradient between the micro-batches of accumulation, each of
        which makes one backward pass.
    probe_every
        Every so many steps one extra backward pass measures the gradient of all layers, also of
        those that are frozen; 0 never does.
    flush_seconds
        Longest time that measured values stay in memory only.
    on_record_error
        ``warn``: when recording fails, say so and train on. ``raise``: stop training. A
        directory that holds a run already is refused before training in either case, and so is
        one that another process writes if the checkpoints are to go there too.
    """

    run_dir: str | None = None
    every: int = 10
    quantities: tuple[str, ...] = QUANTITIES
    select: tuple[str | int, ...] | None = None
    layers: str | None = None
    base_delta: bool = False
    grad_noise: bool = False
    probe_every: int = 0
    flush_seconds: float = 30.0
    on_record_error: Literal["warn", "raise"] = "warn"

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ConfigError(f"record.every is {self.every!r}: give a whole number of at least 1.")
        if isinstance(self.quantities, str):
            raise ConfigError(
                f"record.quantities is the text {self.quantities!r}: give a list of names."
            )
        object.__setattr__(self, "quantities", tuple(self.quantities))
        for name in self.quantities:
            if name not in QUANTITIES:
                raise ConfigError(
                    f"record.quantities names {name!r}: there are {', '.join(QUANTITIES)}."
                    f"{suggest(str(name), QUANTITIES)}"
                )
        if self.quantities and not set(self.quantities) & set(OF_TRAINING):
            object.__setattr__(self, "quantities", (*self.quantities, "opt_steps"))
        if self.probe_every < 0:
            raise ConfigError(f"record.probe_every is {self.probe_every}: give 0 (never) or more.")
        if not self.flush_seconds >= 0:
            raise ConfigError(
                f"record.flush_seconds is {self.flush_seconds}: give 0 (every recorded step) or "
                "more."
            )
        if self.on_record_error not in ("warn", "raise"):
            raise ConfigError(
                f"record.on_record_error is {self.on_record_error!r}: give 'warn' or 'raise'."
            )
        self._check_select()

    def _check_select(self) -> None:
        if self.select is None:
            return
        entries = (self.select,) if isinstance(self.select, str | int) else tuple(self.select)
        object.__setattr__(self, "select", entries)
        if not entries:
            raise ConfigError("record.select is empty: leave it out to measure every tensor.")
        for entry in entries:
            try:
                if not isinstance(entry, int):
                    re.compile(entry)
            except (re.error, TypeError):
                raise ConfigError(
                    f"record.select holds {entry!r}: give layer indices, kinds as 'attn.q', or "
                    "regular expressions."
                ) from None


def check_eight_bit_states(groups: tuple[str, ...], optim: str) -> None:
    """`ConfigError` for unknown groups, or an optimizer without 8-bit states by tensor."""
    for group in groups:
        _one_of("eight_bit_states", group, ("layers", *ALWAYS_ACTIVE_GROUPS))
    if not re.fullmatch(r"(paged_)?(adamw|adamw_bnb|ademamix|lion|rmsprop_bnb)_8bit", optim):
        raise ConfigError(
            f"eight_bit_states is {list(groups)} but optim is {optim!r}; set optim to "
            "adamw_bnb_8bit, paged_adamw_8bit or another 8-bit optimizer of bitsandbytes."
        )


Method = Literal["full", "lora", "lisa"]


@dataclass(frozen=True)
class TrainConfig:
    """A whole training run. Names are those of transformers, TRL and PEFT.

    Parameters
    ----------
    model_name_or_path
        Folder of a saved model, or a hub id.
    dataset_name
        JSONL, JSON or Parquet file, folder (saved dataset or data files), or a hub id. Columns:
        `text`; or `prompt` and `completion`; or `messages`.
    method
        ``full`` trains every weight, ``lora`` an adapter, ``lisa`` a few layers at a time.
    output_dir
        The run directory. None makes a new one, `runs/<method>-<date>-<time>`.
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
        Held-out split, when the dataset has one of that name.
    eval_size
        Without such a split: how much of the training split to hold out, as a fraction below 1
        or a number of examples; 0 holds out nothing.
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
        ``layers``, ``embed``, ``head``, ``norm``; the others' is 32-bit. None leaves it to
        transformers: embeddings in 32 bits, everything else in 8.
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
    save_final_model
        Write the trained model (`checkpoints/final`) or adapter (`adapter`) at the end.
    logging_steps
        Report to trackers and the progress bar every so many steps.
    report_to
        Trackers: ``tensorboard``, ``wandb``, ``trackio``, …
    progress_bar
        True shows a bar, false nothing; None shows a bar in a terminal and a notebook, and a few
        lines elsewhere.
    trainer_args
        Any other field of TRL's `SFTConfig`.
    lisa
        Settings of `method: lisa`.
    lora
        Fields of PEFT's `LoraConfig`, for `method: lora`.
    record
        What is measured, and how often.
    """

    model_name_or_path: str
    dataset_name: str
    method: Method = "lisa"
    output_dir: str | None = None
    model_revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = "test"
    eval_size: float = 0.05
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
    gradient_checkpointing: bool = False
    bf16: bool = False
    fp16: bool = False
    seed: int = 42
    data_seed: int | None = None
    eval_steps: int | None = None
    eval_on_start: bool = True
    save_steps: int | None = None
    save_total_limit: int | None = None
    save_final_model: bool = True
    logging_steps: int = 10
    report_to: tuple[str, ...] = ()
    progress_bar: bool | None = None
    trainer_args: dict[str, Any] = field(default_factory=dict)
    lisa: LisaConfig = field(default_factory=LisaConfig)
    lora: dict[str, Any] = field(default_factory=dict)
    record: RecordConfig = field(default_factory=RecordConfig)

    def __post_init__(self) -> None:
        _check_method(self)
        _check_precision(self)
        _check_numbers(self)
        _check_data(self)
        if self.lisa.recompute == "frozen" and not self.gradient_checkpointing:
            raise ConfigError(
                "lisa.recompute is 'frozen' but gradient_checkpointing is false: set it to true, "
                "or lisa.recompute to 'all'."
            )
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


def _check_method(config: TrainConfig) -> None:
    if config.method not in ("full", "lora", "lisa"):
        raise ConfigError(
            f"method is {config.method!r}; expected one of full, lora, lisa."
            + suggest(str(config.method), ("full", "lora", "lisa"))
        )
    if config.method != "lora" and config.lora:
        raise ConfigError(
            f"lora.{min(config.lora)} is set but method is {config.method!r}; "
            "set method to lora, or remove the lora settings."
        )
    if config.method != "lisa" and config.lisa != LisaConfig():
        changed = next(
            name
            for name in LisaConfig.__dataclass_fields__
            if getattr(config.lisa, name) != getattr(LisaConfig(), name)
        )
        raise ConfigError(
            f"lisa.{changed} is set but method is {config.method!r}; "
            "set method to lisa, or remove the lisa settings."
        )


def _check_precision(config: TrainConfig) -> None:
    if config.bf16 and config.fp16:
        raise ConfigError("bf16 and fp16 are both true; choose one precision to compute in.")
    if config.dtype == "float16" and config.method != "lora":
        raise ConfigError(
            f"dtype is float16 and method is {config.method}: fp16 weights cannot be trained, "
            "small updates and Adam's epsilon vanish; set dtype to float32 and fp16 to true, or "
            "use bfloat16."
        )


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
