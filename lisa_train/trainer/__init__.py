"""The only room that knows transformers' Trainer and TRL: attach(), events, callbacks."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lisa_train.trainer.attachment import Attachment as Attachment
    from lisa_train.trainer.attachment import attach as attach
    from lisa_train.trainer.lisa_callback import LisaCallback as LisaCallback
    from lisa_train.trainer.record_callback import RecordCallback as RecordCallback

# Loaded when first used: the estimate needs one module of this room, and not transformers' Trainer.
_HOME = {
    "Attachment": "attachment",
    "LisaCallback": "lisa_callback",
    "RecordCallback": "record_callback",
    "attach": "attachment",
}
__all__ = ["Attachment", "LisaCallback", "RecordCallback", "attach"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
