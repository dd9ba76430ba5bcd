"""Let the backward pass stop at the lowest active layer, under gradient checkpointing too."""

from typing import Any, cast

from torch import nn

from lisa_train.module_tree import unwrap


class InputGradients:
    """Undoes transformers' `enable_input_require_grads` until `restore`.

    Gradient checkpointing turns it on, and backward then runs down to the embeddings however
    high the lowest active layer is. Only the reentrant kind of checkpointing needs it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = cast(Any, unwrap(model))
        enabled = bool(getattr(self._model, "_require_grads_hooks", None))
        self._undone = enabled and not _reentrant_checkpointing(self._model)
        if self._undone:
            self._model.disable_input_require_grads()

    def restore(self) -> None:
        """Turn it on again where it was."""
        if self._undone:
            self._model.enable_input_require_grads()
            self._undone = False


def _reentrant_checkpointing(model: nn.Module) -> bool:
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            keywords: Any = getattr(
                getattr(module, "_gradient_checkpointing_func", None), "keywords", {}
            )
            return bool(keywords.get("use_reentrant", True))
    return False
