"""With gradient checkpointing: which layers run again in the backward pass."""

from collections.abc import Collection
from typing import Any

from torch import nn

from lisa_analysis.contract.errors import ConfigError
from lisa_train.model.layer_map import LayerMap

_FLAG = "gradient_checkpointing"


class Recomputation:
    """Lets the layers that train keep their activations, while the frozen ones are recomputed.

    A frozen layer has no weight gradients, but backward passes through it to the layers below, for
    which it needs activations too: recomputing those is what saves most. The few layers that train
    may be spared the second forward pass. Below the lowest layer that trains nothing is recomputed
    in either case, unless the embeddings train.

    Parameters
    ----------
    model
        A model of transformers, whose layers say by a flag of their own whether they checkpoint.
    layer_map
        Its layers.
    """

    def __init__(self, model: nn.Module, layer_map: LayerMap) -> None:
        self._layers = [_flagged(model.get_submodule(path)) for path in layer_map.names]

    def spare(self, active: Collection[int]) -> None:
        """Turn checkpointing off for the layers with these indices and on for the others.

        Raises
        ------
        ConfigError
            When no layer checkpoints.
        """
        if not any(self._layers):
            raise ConfigError(
                "lisa.recompute is 'frozen', but no layer of the model checkpoints: turn "
                "gradient_checkpointing on before training begins, or set lisa.recompute to 'all'."
            )
        for i, parts in enumerate(self._layers):
            for part in parts:
                setattr(part, _FLAG, i not in active)

    def restore(self) -> None:
        """Let every layer checkpoint that did."""
        for parts in self._layers:
            for part in parts:
                setattr(part, _FLAG, True)


def _flagged(layer: nn.Module) -> list[Any]:
    return [part for part in layer.modules() if getattr(part, _FLAG, False) is True]
