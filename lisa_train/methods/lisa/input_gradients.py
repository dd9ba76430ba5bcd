"""Let the backward pass stop at the lowest active layer, under gradient checkpointing too."""

import logging
from typing import Any, cast

from torch import nn

from lisa_train.model.module_tree import unwrap

logger = logging.getLogger(__name__)


class InputGradients:
    """Undoes transformers' `enable_input_require_grads` until `restore`.

    Gradient checkpointing turns it on, and backward then runs down to the embeddings however
    high the lowest active layer is. The reentrant kind of checkpointing trains nothing without
    it, and keeps it: there backward visits all layers.

    Parameters
    ----------
    model
        The model.
    embeddings_train
        Whether the embeddings train in every period, so that backward reaches them anyway.
    """

    def __init__(self, model: nn.Module, *, embeddings_train: bool) -> None:
        self._model = cast(Any, unwrap(model))
        enabled = bool(getattr(self._model, "_require_grads_hooks", None))
        reentrant = _reentrant_checkpointing(self._model)
        self._undone = enabled and not reentrant
        if enabled and reentrant and not embeddings_train:
            logger.warning(
                "gradient checkpointing of the reentrant kind runs backward through all layers, "
                "although the embeddings do not always train; set use_reentrant to False in "
                "gradient_checkpointing_kwargs, and it stops at the lowest active layer"
            )
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
