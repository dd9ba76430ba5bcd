"""Adapters to transformers' Trainer and TRL's: attach(), LisaCallback, RecordCallback."""

from typing import Any

from lisa_train.trainer.attachment import Attachment as Attachment
from lisa_train.trainer.attachment import attach as attach
from lisa_train.trainer.lisa_callback import LisaCallback as LisaCallback

__all__ = ["Attachment", "LisaCallback", "RecordCallback", "attach"]


def __getattr__(name: str) -> Any:
    if name == "RecordCallback":
        from lisa_train.trainer.record_callback import RecordCallback

        return RecordCallback
    raise AttributeError(f"module 'lisa_train.trainer' has no attribute {name!r}")
