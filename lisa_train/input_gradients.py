"""Let the backward pass stop at the lowest active layer, under gradient checkpointing too."""

from torch import nn

from lisa_train.layermap import unwrap


def stop_input_gradients(model: nn.Module) -> bool:
    """Undo `enable_input_require_grads` while LISA runs; True when there was something to undo.

    Gradient checkpointing turns it on, and backward then runs down to the embeddings however
    high the lowest active layer is. Only the reentrant kind of checkpointing needs it.
    """
    bare = unwrap(model)
    if not getattr(bare, "_require_grads_hooks", None) or _reentrant_checkpointing(bare):
        return False
    bare.disable_input_require_grads()
    return True


def _reentrant_checkpointing(bare: nn.Module) -> bool:
    for module in bare.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return False
