"""A resumed training is the one that was interrupted, or says what is not.

Every checkpoint of an attached trainer carries what it was made from: the settings that decide
what is computed, the size and the content of the data, the weights that an adapter stands on. A
continuation compares them with its own.
"""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lisa_analysis.contract.errors import ConfigError, RunDirectoryError
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.model.module_tree import unwrap
from lisa_train.model.run_entries import as_lists
from lisa_train.trainer.checkpoint_files import Checkpoint, examine
from lisa_train.trainer.renamed_weights import load_renamed
from lisa_train.trainer.training_inputs import (
    base_weights,
    data_content,
    lisa_content,
    model_inputs,
    multipliers_content,
    plain,
    reference_weights,
)

INPUTS_KEY = "lisa_toolkit_inputs"
# What may differ with a word: sums over another number of parts, another place in the data.
PARTS = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps", "device")
# Settings that decide what a step computes, of Trainer and of TRL's.
_SETTINGS = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim",
    "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "optim_target_modules", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha",
    "bf16", "fp16", "seed", "data_seed", "dataloader_drop_last", "train_sampling_strategy",
    "average_tokens_across_devices", "max_length", "packing", "packing_strategy", "padding_free",
    "completion_only_loss", "assistant_only_loss", "loss_type", "beta", "shuffle_dataset",
    "truncation_mode", "disable_dropout", "router_aux_loss_coef", "cast_lm_head_to_fp32",
    "label_smoothing", "loss_weights", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef",
    "use_weighting", "discopop_tau", "center_rewards_coefficient", "desirable_weight",
    "undesirable_weight", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
    "num_generations", "max_completion_length", "temperature", "top_p", "top_k", "min_p",
    "repetition_penalty", "num_iterations", "epsilon", "epsilon_high", "delta", "reward_weights",
    "importance_sampling_level", "multi_objective_aggregation", "scale_rewards",
    "mask_truncated_completions", "top_entropy_quantile", "entropy_coef", "normalize_advantages",
    "reward_clip_range",
)  # fmt: skip
_FLAT = ("constant", "constant_with_warmup", "reduce_lr_on_plateau")
# With another one of these Trainer cannot load the optimizer's state, or takes its rates from it.
_FIXED = ("trained tensors", "lr_multipliers")

logger = logging.getLogger(__name__)


class Continuation(TrainerCallback):
    """Refuses to resume where the result would not be that of the uninterrupted training.

    Parameters
    ----------
    trainer
        The trainer.
    lisa
        The settings of LISA, if it is attached.
    lr_multipliers
        The file of multipliers of the learning rate, if there is one.
    incomplete
        Go on all the same, with a warning and an event of what is lost.

    Attributes
    ----------
    missing
        What the checkpoint or the inputs lack, each in words; empty for an exact continuation.
    changes
        What is not as it was when the checkpoint was written: name -> [before, now].
    notes
        Warnings that belong into the run's events.
    """

    def __init__(
        self,
        trainer: Trainer,
        lisa: LisaConfig | None,
        *,
        lr_multipliers: str | os.PathLike[str] | None = None,
        incomplete: bool,
    ) -> None:
        self.missing: list[str] = []
        self.changes: dict[str, list[Any]] = {}
        self.notes: list[str] = []
        self._trainer = trainer
        self._lisa: LisaConfig | None = None
        self._incomplete = False
        self._multipliers: Any = None
        self.take(lisa, lr_multipliers, incomplete=incomplete)
        self._model: dict[str, Any] = {}
        self._checkpoint: Checkpoint | None = None
        self._own_schedule = trainer.lr_scheduler is not None
        args = trainer.args
        if args.save_only_model and str(getattr(args.save_strategy, "value", "")) != "no":
            self._say(
                "save_only_model is set: the checkpoints of this training hold the weights alone "
                "and nothing can be resumed from them; leave it out to be able to."
            )
        self._lasting = len(self.notes)

    def take(
        self,
        lisa: LisaConfig | None,
        lr_multipliers: str | os.PathLike[str] | None,
        *,
        incomplete: bool,
    ) -> None:
        """Take what is attached, in one call or in several: it is one training."""
        self._lisa = self._lisa if lisa is None else lisa
        self._incomplete = self._incomplete or incomplete
        if lr_multipliers is not None:
            if self._multipliers is not None:
                raise ConfigError("this trainer has lr_multipliers already; attach them once.")
            self._multipliers = multipliers_content(lr_multipliers)

    def begin(self, resume_from_checkpoint: Any) -> None:
        """Examine the checkpoint that `Trainer.train` is about to load.

        Raises
        ------
        RunDirectoryError
            When it does not hold what an exact continuation needs, unless that was allowed.
        """
        self.missing, self.changes, self._checkpoint = [], {}, None
        del self.notes[self._lasting :]  # of an earlier resume
        args = self._trainer.args
        # Now: what callbacks freeze when training begins is not what the optimizer is made for.
        self._model = model_inputs(self._trainer.model) | {"lr_multipliers": self._multipliers}
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(args.output_dir)
        if not resume_from_checkpoint:
            return  # nothing to resume, or nothing found, which Trainer says
        self._checkpoint = examine(self._trainer, Path(resume_from_checkpoint), self._lisa)
        self.missing = _of_all_processes(list(self._checkpoint.missing))
        if self.missing and not self._incomplete:
            self._refuse(f"lacks {', '.join(self.missing)}")
        self._compare_model()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Compare the inputs with those of the checkpoint; leave them for the next one."""
        now = self._inputs(args, state)
        if self._checkpoint is not None:
            self._compare(now)
            if self._checkpoint.renamed:
                load_renamed(unwrap(self._trainer.model), self._checkpoint.path)
        state.stateful_callbacks[INPUTS_KEY] = now

    def parts(self, args: TrainingArguments) -> dict[str, Any]:
        """How a step is put together: entries of run.json about a segment."""
        # With `auto_find_batch_size` it is not the one of the settings.
        size = getattr(self._trainer, "_train_batch_size", None) or args.train_batch_size
        return {
            "processes": args.world_size,
            "per_device_train_batch_size": size // max(1, args.n_gpu),
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "device": args.device.type,
        }

    def _inputs(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        settings = {
            name: as_lists(plain(getattr(args, name))) for name in _SETTINGS if hasattr(args, name)
        }
        flat = settings["lr_scheduler_type"] in _FLAT or self._own_schedule
        lisa = None if self._lisa is None else lisa_content(self._lisa)
        return {
            **self.parts(args),
            "settings": settings | ({} if flat else {"max_steps": state.max_steps}),
            "data": data_content(self._trainer.train_dataset),
            "base weights": base_weights(self._trainer.model),
            "reference model": reference_weights(self._trainer),
            "lisa": lisa,
            **self._model,
        }

    def _compare_model(self) -> None:
        """Compare what loads the checkpoint, which Trainer is about to do or to fail at."""
        assert self._checkpoint is not None
        before = (self._checkpoint.state.get("stateful_callbacks") or {}).get(INPUTS_KEY)
        changes = _changes(before, self._model) if isinstance(before, dict) else {}
        fixed = {name: changes[name] for name in _FIXED if name in changes}
        if fixed and not any("optimizer" in text for text in self.missing):
            raise RunDirectoryError(
                f"{self._checkpoint.path} was made with {_in_words(changes)}: Trainer cannot load "
                "its optimizer's state for this training. Give what it was made with, or begin "
                "anew from its weights (from_pretrained)."
            )
        if changes and not self._incomplete:
            self._refuse(f"was made with {_in_words(changes)}")

    def _compare(self, now: dict[str, Any]) -> None:
        assert self._checkpoint is not None
        before = (self._checkpoint.state.get("stateful_callbacks") or {}).get(INPUTS_KEY)
        if not isinstance(before, dict):
            logger.warning(
                "%s does not say from which data and settings it was made: whether they are the "
                "same now is not known", self._checkpoint.path,
            )  # fmt: skip
            before = {"processes": self._checkpoint.processes}
            if "max_steps" in now["settings"]:
                before["settings"] = {"max_steps": self._checkpoint.state["max_steps"]}
        if now["data"] is None or now["data"]["content"] is None:
            logger.warning(
                "the rows of the training data are made on the fly: whether they are those that "
                "%s was made from is not known", self._checkpoint.path,
            )  # fmt: skip
        self.changes = _changes(before, now)
        serious = {name: pair for name, pair in self.changes.items() if name not in PARTS}
        if serious and not self._incomplete:
            self._refuse(f"was made with {_in_words(serious)}")
        if self.missing:
            self._say(
                f"resumed from {self._checkpoint.path.name} without {', '.join(self.missing)}: "
                "the result is not that of the uninterrupted training."
            )
        if self.changes:
            self._say(
                f"resumed from {self._checkpoint.path.name}, which was made with "
                f"{_in_words(self.changes)}{_place(before, now)}."
            )

    def _refuse(self, what: str) -> None:
        assert self._checkpoint is not None
        why = "; it may have been written with save_only_model" if "optimizer.pt" in what else ""
        raise RunDirectoryError(
            f"{self._checkpoint.path} {what}{why}: the training would not go on as it was "
            "interrupted. Give what it was made with, or go on all the same with "
            "resume_incomplete=True (lisa-train: --resume_incomplete true)."
        )

    def _say(self, text: str) -> None:
        if text in self.notes:
            return
        self.notes.append(text)
        if self._trainer.args.process_index == 0:
            warnings.warn(text, RuntimeWarning, stacklevel=4)


def warn_of_losses(trainer: Trainer, state: TrainerState, lisa: LisaConfig | None) -> None:
    """Say what a training lost that was resumed with callbacks added by hand.

    Trainer has loaded the checkpoint by then, and which one it was nobody is told: the one of
    this step in its `output_dir` is looked at. `attach` hears of it before, and refuses.
    """
    callbacks = trainer.callback_handler.callbacks
    path = Path(trainer.args.output_dir or ".") / f"checkpoint-{state.global_step}"
    attached = any(isinstance(callback, Continuation) for callback in callbacks)
    if attached or not state.global_step or not path.is_dir():
        return
    if missing := examine(trainer, path, lisa).missing:
        logger.warning(
            "resumed from %s without %s: the result is not that of the uninterrupted training",
            path, ", ".join(missing),
        )  # fmt: skip


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """What is known of both times and is not the same; settings by their own names."""
    old = {**before, **(before.get("settings") or {})}
    new = {**now, **(now.get("settings") or {})}
    for name in ("lisa", "model", "adapters"):
        if isinstance(old.get(name), dict) and isinstance(new.get(name), dict):
            for each in (old, new):
                each.update({f"{name}.{k}": v for k, v in each.pop(name).items()})
    old.pop("settings", None), new.pop("settings", None)
    # A file that a checkpoint of earlier versions knows by its path alone.
    for name, value in list(new.items()):
        if isinstance(value, dict) and "content" in value and isinstance(old.get(name), str):
            del old[name]
    was, now_is = old.get("lisa.learn"), new.get("lisa.learn")
    if isinstance(was, dict) and isinstance(now_is, dict) and isinstance(was["prior"], str):
        new["lisa.learn"] = {**now_is, "prior": was["prior"]}
    may_be_unknown = ("data", "base weights", "reference model", *PARTS)
    unknown = {name for name in may_be_unknown if old.get(name) is None or new.get(name) is None}
    return {
        name: [old[name], new[name]]
        for name in new
        if name in old and old[name] != new[name] and name not in unknown
    }


def _in_words(changes: dict[str, list[Any]]) -> str:
    parts = []
    for name, (before, now) in changes.items():
        if name == "data" and before["rows"] == now["rows"]:
            parts.append("other training data (as many rows, with another content)")
        elif name == "data":
            parts.append(f"other training data ({before['rows']} rows, now {now['rows']})")
        elif name == "base weights":
            parts.append("other weights below the adapter")
        elif name == "reference model":
            parts.append("another reference model (ref_model)")
        elif name == "lisa":
            parts.append("LISA, which is not attached now" if before else "no LISA")
        elif name == "trained tensors":
            one, other = (f"{x['tensors']} of {x['numbers']:,} numbers" for x in (before, now))
            parts.append(f"other tensors that train ({one}, now {other})")
        elif name == "lr_multipliers" and before and now:
            parts.append("other lr_multipliers")
        elif name == "lr_multipliers":
            parts.append("lr_multipliers, which are not given now" if before else "no " + name)
        else:
            parts.append(f"{name} = {before} (now {now})")
    return ", ".join(parts)


def _place(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What another number of parts does to the rows that come next."""
    parts = PARTS[:3]
    if not all(isinstance(each.get(name), int) for each in (before, now) for name in parts):
        return ""
    old, new = ([each[name] for name in parts] for each in (before, now))
    if old == new:
        return ""
    rows = [a * b * c for a, b, c in (old, new)]
    if rows[0] == rows[1]:
        return f": a step still takes {rows[0]} rows, but the sums and random numbers are others"
    return (
        f": a step took {rows[0]} rows and takes {rows[1]} now, and as Trainer counts its place in "
        "the data in steps, some rows come twice or not at all in this epoch"
    )


def _of_all_processes(missing: list[str]) -> list[str]:
    """What any process misses: one that stops alone would let the others wait for ever."""
    if not (dist.is_available() and dist.is_initialized()):
        return missing
    found: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, missing)
    return list(dict.fromkeys(text for each in found for text in each or ()))
