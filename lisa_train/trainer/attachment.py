"""One line for somebody else's Trainer: attach LISA, the recorder, or both."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn
from transformers import Trainer

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.multipliers_file import read_multipliers
from lisa_train.measure.config import RecordConfig
from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.lisa.engine import Plan
from lisa_train.model.layer_cache import known_layers
from lisa_train.optim.frozen_state import optimizers_of
from lisa_train.optim.layer_rates import set_layer_rates
from lisa_train.optim.settings import check_eight_bit_states
from lisa_train.private_names import check
from lisa_train.trainer.continuation import Continuation
from lisa_train.trainer.events import TrainerEvents, patch
from lisa_train.trainer.learning import check_learning
from lisa_train.trainer.lisa_callback import LisaCallback
from lisa_train.trainer.optimizer_callbacks import EightBitCallback, StepCallback
from lisa_train.trainer.parallel_checks import check_lisa_processes, without_wrapper
from lisa_train.trainer.renamed_weights import best_weights_whole
from lisa_train.trainer.sharded_checkpoint import own_optimizer_state
from lisa_train.trainer.trl_head import sliced_head_gradient

if TYPE_CHECKING:
    from lisa_train.trainer.record_callback import RecordCallback


@dataclass(frozen=True)
class Attachment:
    """What `attach` added to a trainer; None for what was not asked for.

    As a context manager it ends LISA and the recorder when the block is left, by an exception
    too. Without one, they end with `trainer.train()`, however that ends.
    """

    engine_callback: LisaCallback | None
    recorder_callback: "RecordCallback | None"
    step_callback: StepCallback | None = None

    def active_layers(self) -> tuple[int, ...] | None:
        """Indices of the layers that train now; None without LISA."""
        if self.engine_callback is None or self.engine_callback.engine is None:
            return None
        return self.engine_callback.engine.active_layers

    def latest_scalars(self) -> dict[str, Any]:
        """Newest recorded scalars (loss, learning_rate, …); empty without a recorder."""
        return {} if self.recorder_callback is None else self.recorder_callback.latest_scalars()

    def close(self, error: BaseException | None = None) -> None:
        """End LISA (flags are restored), the recorder (the run's status is written), the rest."""
        if self.engine_callback is not None:
            self.engine_callback.close()
        if self.recorder_callback is not None:
            self.recorder_callback.close(error)
        if self.step_callback is not None:
            self.step_callback.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close(error)


def attach(
    trainer: Trainer,
    lisa: LisaConfig | None = None,
    record: RecordConfig | None = None,
    *,
    step_in_backward: bool = False,
    eight_bit_states: Sequence[str] | None = None,
    lr_multipliers: str | os.PathLike[str] | None = None,
    manifest: dict[str, Any] | None = None,
    config_yaml: str | None = None,
    resume: bool = False,
    resume_incomplete: bool = False,
) -> Attachment:
    """Add LISA and/or the recorder to a `transformers.Trainer` or any subclass of it.

    Call it before `trainer.train()`. The optimizer must hold every tensor that may train: one
    that Trainer builds itself does, one that was built earlier is checked here.

    Parameters
    ----------
    trainer
        The trainer; TRL's SFT, DPO and reward trainers are subclasses.
    lisa
        Train with LISA; None trains as the trainer would.
    record
        Write a run directory; None records nothing.
    step_in_backward
        Step every tensor within the backward pass and free its gradient at once, see
        `lisa_train.StepInBackward`.
    eight_bit_states
        With an 8-bit optimizer of bitsandbytes: the groups whose optimizer state is 8-bit, any of
        ``layers``, ``embed``, ``head``, ``norm``, ``other``. None leaves it to Trainer, which holds
        embeddings in 32 bits.
    lr_multipliers
        File of multipliers of the learning rate by layer (`lisa-analyze --export lr:FILE`), for the
        optimizer that Trainer makes, or one that was given without a scheduler.
    manifest
        Entries of the run's `run.json` that the trainer does not know (dataset, command, …).
    config_yaml
        Text of the run's `config.yaml`.
    resume
        Continue the run directory instead of refusing one that already holds a run.
    resume_incomplete
        Let `trainer.train(resume_from_checkpoint=…)` go on where the checkpoint or the inputs lack
        something without which the result is not that of the uninterrupted training (state of
        the optimizer, other data, another learning rate, …), with a warning and an event that
        say what. Without it such a training is refused.

    Returns
    -------
    Attachment
        The callbacks; also a context manager that ends them.

    Raises
    ------
    ConfigError
        When the model or the optimizer cannot be trained so, see `lisa_train.Lisa`; when
        `record.grad_noise` asks for the noise of steps of one micro-batch.
    ProbabilitiesError
        When the probabilities are missing, infeasible or made for another model.
    RunDirectoryError
        From `trainer.train`: when a checkpoint cannot be continued as it was interrupted.
    """
    check("trainer", "trl head")
    if record is not None:
        record.check_micro_batches(
            gradient_accumulation_steps=trainer.args.gradient_accumulation_steps,
            processes=trainer.args.world_size,
        )
    plan = None if lisa is None else _plan(trainer, lisa)
    continuation = _continuation(trainer, lisa, lr_multipliers, incomplete=resume_incomplete)
    if lr_multipliers is not None:
        _multiply_rates(trainer, lr_multipliers, lisa.layers if lisa else None)
    if eight_bit_states is not None:
        groups, optim = tuple(eight_bit_states), trainer.args.optim
        check_eight_bit_states(groups, str(getattr(optim, "value", optim)))
        check("eight bit")
        trainer.add_callback(EightBitCallback(groups, lisa.layers if lisa else None))
    stepping = None
    if step_in_backward:
        stepping = StepCallback(trainer)
        trainer.add_callback(stepping)
    callback = None
    if lisa is not None:
        callback = LisaCallback(lisa, trainer=trainer, plan=plan)
        trainer.add_callback(callback)
    recorder = None
    if record is not None:
        from lisa_train.trainer.record_callback import RecordCallback

        recorder = RecordCallback(
            trainer, record, lisa=callback, stepping=stepping, manifest=manifest,
            config_yaml=config_yaml, resume=resume, continuation=continuation,
        )  # fmt: skip
        trainer.add_callback(recorder)
    attachment = Attachment(callback, recorder, stepping)
    # A compiler would have to trace through the slices.
    around: list[Any] = [] if trainer.args.torch_compile else [sliced_head_gradient]
    around.append(functools.partial(best_weights_whole, trainer))
    if lisa is not None:
        around += [
            functools.partial(way, trainer) for way in (without_wrapper, own_optimizer_state)
        ]
    TrainerEvents.of(trainer).around_train(
        functools.partial(_training, attachment, continuation, around=around)
    )
    return attachment


def _continuation(
    trainer: Trainer,
    lisa: LisaConfig | None,
    lr_multipliers: str | os.PathLike[str] | None,
    *,
    incomplete: bool,
) -> Continuation:
    """Return what guards a resume, of which a trainer has one, however often it is attached."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Continuation):
            callback.take(lisa, lr_multipliers, incomplete=incomplete)
            return callback
    made = Continuation(trainer, lisa, lr_multipliers=lr_multipliers, incomplete=incomplete)
    trainer.add_callback(made)
    return made


def _multiply_rates(trainer: Trainer, file: str | os.PathLike[str], path: str | None) -> None:
    """Multiply the learning rates of layers once there is an optimizer, before its scheduler."""
    read_multipliers(Path(file))  # a broken file is refused now
    done: list[Any] = []

    def multiplied(optimizer: Any, model: nn.Module) -> None:
        held = optimizers_of(optimizer)  # accelerate puts a wrapper around the same one
        if not all(any(one is each for each in done) for one in held):
            set_layer_rates(optimizer, model, known_layers(model, path), Path(file))
            done.extend(held)

    def create(original: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = original(*args, **kwargs)
        multiplied(trainer.optimizer, trainer.model)
        return optimizer

    if trainer.optimizer is not None:
        multiplied(trainer.optimizer, trainer.model)
    patch(trainer, "create_optimizer", create)


def _plan(trainer: Trainer, config: LisaConfig) -> Plan | None:
    """Make the engine's checks that need not wait for training to begin."""
    if any(isinstance(cb, LisaCallback) for cb in trainer.callback_handler.callbacks):
        raise ConfigError("this trainer already trains with LISA; attach it once.")
    check_lisa_processes(trainer, config)
    if config.learn is not None:
        check_learning(trainer, config.learn)
    if config.recompute == "frozen" and getattr(trainer, "ref_model", None) is not None:
        raise ConfigError(
            f"lisa.recompute is 'frozen', but {type(trainer).__name__} turns checkpointing on for "
            "all layers again after every pass of its reference: set lisa.recompute to 'all'."
        )
    if trainer.model is None:
        return None  # with `model_init`, which builds it when training begins
    plan = Plan.make(trainer.model, config, seed=trainer.args.seed)
    if trainer.optimizer is not None:
        plan.check_optimizer(trainer.optimizer)
    return plan


def _ended_run(attachment: Attachment) -> Any:
    """What recorded a run that has ended; None before, and while one is recorded."""
    callback = attachment.recorder_callback
    recorder = None if callback is None else callback.recorder
    return recorder if recorder is not None and recorder.writer.closed else None


@contextmanager
def _training(
    attachment: Attachment,
    continuation: Continuation,
    resume_from_checkpoint: Any,
    *,
    around: Sequence[Callable[[], AbstractContextManager[object]]],
) -> Iterator[None]:
    """What `trainer.train` runs inside; callbacks hear not of resuming, nor of all exceptions."""
    engine, stepping = attachment.engine_callback, attachment.step_callback
    earlier = _ended_run(attachment)
    if engine is not None and isinstance(resume_from_checkpoint, str | os.PathLike):
        engine.checkpoint = Path(resume_from_checkpoint)
    continuation.begin(resume_from_checkpoint)
    try:
        with ExitStack() as entered:
            for context in around:
                entered.enter_context(context())
            yield
    except BaseException as error:
        # A run that ended before has ended as it says, whatever keeps this training from beginning.
        begun = earlier is None or _ended_run(attachment) is not earlier
        attachment.close(error if begun else None)
        raise
    finally:
        if engine is not None:
            engine.close()
        if stepping is not None:
            stepping.close()
