"""Heads beside adapters: a classifier trains whole, and no adapter is put on it."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

# Names by which PEFT knows the heads of SEQ_CLS and TOKEN_CLS.
_HEADS = ("classifier", "score")


def train_heads_whole(peft_config: Any, model: "nn.Module", new: Collection[str] = ()) -> None:
    """Name the modules that train whole beside the adapters, in PEFT's `modules_to_save`.

    PEFT does so itself for classifiers, but only after `all-linear` has put an adapter on them.

    Parameters
    ----------
    peft_config
        A configuration of PEFT; changed where it has such a field.
    model
        The model that the adapters are put on.
    new
        Tensors that the model's files do not hold: what starts at random has to train.
    """
    if not hasattr(peft_config, "modules_to_save"):
        return
    kind = getattr(peft_config, "task_type", None)
    names = {_outermost(name, model) for name in new}
    if str(getattr(kind, "value", kind)) in ("SEQ_CLS", "TOKEN_CLS"):
        names.update(name for name, _ in model.named_children() if name in _HEADS)
    if names:
        peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or ()), *names})


def _outermost(name: str, model: Any) -> str:
    """Path of the outermost module outside the base model, or just below it, with a tensor."""
    prefix = f"{model.base_model_prefix}."
    inner = name.removeprefix(prefix)
    return (prefix if inner != name else "") + inner.split(".", 1)[0]
