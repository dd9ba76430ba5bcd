"""A measuring pass of the loss that a trainer trains, which leaves no trace in the trainer."""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from transformers import Trainer

_DATA = frozenset({"train_dataset", "eval_dataset"})
# Subclasses of others may refuse to be cleared (transformers' ModelOutput does).
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, Counter, list, deque, set})


def probe_pass(trainer: Trainer, inputs: Any, scale: torch.Tensor | None) -> None:
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
        batch = trainer._prepare_inputs(inputs)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
        loss = loss.mean()
        (loss if scale is None else loss * scale.to(loss.device)).backward()


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
