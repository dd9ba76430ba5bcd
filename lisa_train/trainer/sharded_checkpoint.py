"""LISA's optimizer state out of a checkpoint of a model that accelerate's FSDP2 has split."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from lisa_train.optim.saved_shards import load_saved_state
from lisa_train.private_names import check
from lisa_train.trainer.events import patch

_SCHEDULE = "scheduler.pt"


@contextmanager
def own_optimizer_state(trainer: Trainer) -> Iterator[None]:
    """Load of a checkpoint the optimizer state that it holds, in the place of Trainer.

    Trainer's way (torch's, of accelerate) makes state of every tensor first and asks the
    checkpoint for all of it, which is not there: LISA's resting layers have none.
    """
    if getattr(trainer.accelerator.state, "fsdp_plugin", None) is None:
        yield
        return
    check("sharded checkpoint")

    def load(original: Any, checkpoint: str | None) -> None:
        saved = None if checkpoint is None else _saved(Path(checkpoint))
        if saved is None or not (saved.parent / _SCHEDULE).is_file():
            original(checkpoint)
            return
        load_saved_state(trainer.model, trainer.optimizer, saved)
        schedule = torch.load(saved.parent / _SCHEDULE, weights_only=True)
        trainer.lr_scheduler.load_state_dict(schedule)

    take_off = patch(trainer, "_load_optimizer_and_scheduler", load)
    try:
        yield
    finally:
        take_off()


def _saved(checkpoint: Path) -> Path | None:
    """Where the optimizer's state is: SHARDED_STATE_DICT makes a folder, FULL_STATE_DICT a file."""
    places = (checkpoint / "optimizer_0", checkpoint / "optimizer.bin")
    return next((place for place in places if place.exists()), None)
