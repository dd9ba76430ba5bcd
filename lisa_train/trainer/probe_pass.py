"""Measuring passes of the loss that a trainer trains, which leave no trace in the trainer."""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from lisa_analysis.contract.errors import ConfigError
from lisa_train.measure.config import RecordConfig
from lisa_train.measure.recorder import NormRecorder
from lisa_train.model.side_pass import seed_streams
from lisa_train.trainer.loss_scale import LossScale

_DATA = frozenset({"train_dataset", "eval_dataset"})
# Subclasses of others may refuse to be cleared (transformers' ModelOutput does).
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, Counter, list, deque, set})


class TrainerProbes:
    """When a trainer's recorder probes, and with which batches.

    One batch is the last micro-batch of the step. Several are drawn from the training data,
    without replacement and by a generator of their own: what trains does not notice. Every probe
    of a run has the same batches, and batch by batch the same dropout, so that what changes from
    one to the next is not which examples were drawn.

    Parameters
    ----------
    trainer
        The trainer.
    config
        `probe_every` and `probe_batches`.
    loss_scale
        Of the trainer.
    """

    def __init__(self, trainer: Trainer, config: RecordConfig, loss_scale: LossScale) -> None:
        self._trainer = trainer
        self._config = config
        self._loss_scale = loss_scale
        self._loader: Any = None
        self._inputs: Any = None
        self._drawn = -1  # the step of the newest probe of several batches

    @property
    def _several(self) -> bool:
        return self._config.probe_batches > 1

    def check(self, loader: Any, *, sharded: bool) -> None:
        """Refuse what several batches cannot be drawn or measured from; keep the loader.

        Raises
        ------
        ConfigError
            For a stream, too few examples, or sharded weights.
        """
        self._loader = loader
        if not self._several:
            return
        wanted = self._config.probe_batches
        said = f"record.probe_batches is {wanted}"
        if sharded:
            raise ConfigError(
                f"{said}, but the weights are sharded (FSDP2): a probe takes whole gradients; set "
                "it to 1."
            )
        dataset: Any = getattr(loader, "dataset", None)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise ConfigError(
                f"{said}, but the training data are a stream, from which independent batches "
                "cannot be drawn; set it to 1, or load the data whole."
            )
        size = self._batch_size * self._trainer.args.world_size
        if len(dataset) < wanted * size:
            raise ConfigError(
                f"{said} of {size} examples each, but the training data have {len(dataset)}; give "
                f"at most {len(dataset) // size}."
            )

    def gradients_ready(self, step: int, inputs: Any) -> None:
        """Keep the last micro-batch of a step after which it is passed once more."""
        if not self._several and self._due(step):
            self._inputs = inputs

    def begin(self, recorder: NormRecorder, step: int) -> None:
        """Probe the untouched model, with several batches; not one that training goes on with."""
        self._drawn = step
        if self._several and step == 0:
            self._draw(recorder, 0)

    def step_end(self, recorder: NormRecorder, step: int) -> None:
        """Probe after a step, if its turn has come."""
        if self._inputs is not None:
            inputs, self._inputs = self._inputs, None
            scale = self._scale()
            recorder.probe(
                step,
                lambda: run_probe_pass(self._trainer, inputs, scale),
                gradient_scale=1.0 if scale is None else scale,
            )
        if self._several and self._due(step):
            self._draw(recorder, step)

    def finish(self, recorder: NormRecorder, step: int) -> None:
        """Probe the trained model with several batches, unless that was done after this step."""
        if self._several and self._drawn != step:
            self._draw(recorder, step)

    def _due(self, step: int) -> bool:
        every = self._config.probe_every
        return bool(every) and step % every == 0

    def _draw(self, recorder: NormRecorder, step: int) -> None:
        self._drawn = step
        args, count = self._trainer.args, self._config.probe_batches
        batches, draw = self._batches()
        scale = self._scale()

        def one(number: int) -> None:
            # Also before the batch is made: data sets and collators draw too. The states of
            # training are put back after the passes (`BatchGradients.of`).
            seed_streams(self._trainer.model, hash((draw, number)) % 2**32)
            own_loss_pass(self._trainer, next(batches), scale)

        first = args.process_index * count
        recorder.probe(
            step,
            [partial(one, first + place) for place in range(count)],
            gradient_scale=1.0 if scale is None else scale,
            draw=draw,
        )

    def _scale(self) -> torch.Tensor | None:
        return self._loss_scale.now(self._trainer.args.device)

    @property
    def _batch_size(self) -> int:
        return self._trainer.state.train_batch_size or self._trainer.args.train_batch_size

    def _batches(self) -> tuple[Iterator[Any], int]:
        """Batches of this process, collated as those that train; made one by one.

        And the number of the draw: probes of equal numbers are of the same batches.
        """
        args, dataset = self._trainer.args, self._loader.dataset
        seed = args.seed if args.data_seed is None else args.data_seed
        generator = torch.Generator().manual_seed(hash((seed, 0)) % 2**63)
        order = torch.randperm(len(dataset), generator=generator)
        size, count = self._batch_size, self._config.probe_batches
        chosen = order[args.process_index * size * count :][: size * count].view(count, size)
        draw = hash((seed, len(dataset), size, count * args.world_size)) % 2**31
        loader = DataLoader(
            dataset,
            batch_sampler=chosen.tolist(),
            collate_fn=self._loader.collate_fn,
            generator=generator,
        )
        return iter(loader), draw


def own_loss_pass(trainer: Trainer, inputs: Any, scale: torch.Tensor | None) -> None:
    """Run one forward and backward pass of the mean loss of a batch, in training mode.

    The batch is a whole step's, as in `run_probe_pass`: a loss that divides itself by the number
    of micro-batches (TRL's GRPO) is divided by 1. It asks nothing of other processes, unlike
    `run_probe_pass`, whose loss is a part of theirs.
    """
    with plain_state_kept(trainer), _training_mode(trainer.model):
        trainer.current_gradient_accumulation_steps = 1  # not there yet before the first step
        _pass(trainer, inputs, scale)


def run_probe_pass(trainer: Trainer, inputs: Any, scale: torch.Tensor | None) -> None:
    """Run one forward and backward pass of the bare model.

    The batch counts as a whole step's, so that the gradient is a mean over its own items, however
    many micro-batches a step has. Nothing that the trainer counts moves.

    Parameters
    ----------
    trainer
        The trainer, whose `compute_loss` is asked: perhaps an override, on its class or itself.
    inputs
        A batch of its data loader.
    scale
        Factor on the loss (fp16), if there is one.
    """
    with plain_state_kept(trainer):
        trainer.current_gradient_accumulation_steps = 1
        items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        _pass(trainer, inputs, scale, num_items_in_batch=items)


def _pass(trainer: Trainer, inputs: Any, scale: torch.Tensor | None, **known: Any) -> None:
    batch = trainer._prepare_inputs(inputs)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch, **known)
    loss = loss.mean()
    (loss if scale is None else loss * scale.to(loss.device)).backward()


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Let a model be as it trains, also before the first step; put back how its modules were."""
    resting = [module for module in model.modules() if not module.training]
    model.train()
    try:
        yield
    finally:
        for module in resting:
            module.training = False


@contextmanager
def plain_state_kept(owner: Any) -> Iterator[None]:
    """Put back the plain attributes of `owner` afterwards, and what its containers hold.

    Counters and lists of metrics, as TRL's trainers fill in `compute_loss`, are attributes or lie
    in dicts, lists and deques. Objects and tensors that are changed in place stay changed, and
    data sets are not looked into. (A pass on a copy of the trainer would do with less, but would
    not reach a `compute_loss` that was set on the trainer itself and knows that one alone.)
    """
    attributes = dict(vars(owner))
    containers: dict[int, tuple[Any, Any]] = {}
    for name, value in attributes.items():
        if name not in _DATA:
            _copy_containers(value, containers)
    try:
        yield
    finally:
        for name in vars(owner).keys() - attributes.keys():
            delattr(owner, name)
        vars(owner).update(attributes)
        for container, content in containers.values():
            container.clear()
            (container.extend if isinstance(container, list | deque) else container.update)(content)


def _copy_containers(value: Any, found: dict[int, tuple[Any, Any]]) -> None:
    if type(value) not in _CONTAINERS or id(value) in found:
        return
    found[id(value)] = (value, copy(value))
    for item in list(value.values() if isinstance(value, dict) else value):
        _copy_containers(item, found)
