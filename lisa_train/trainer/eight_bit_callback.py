"""8-bit optimizer states by group in a transformers Trainer."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_train.model.layer_map import find_layers
from lisa_train.optim.eight_bit import set_eight_bit_states


class EightBitCallback(TrainerCallback):
    """Chooses the precision of the optimizer's state when the optimizer is there.

    Parameters
    ----------
    groups
        See `set_eight_bit_states`.
    layers
        Path of the layers, where the model's structure leaves it open.
    """

    def __init__(self, groups: tuple[str, ...], layers: str | None = None) -> None:
        self._groups = groups
        self._layers = layers

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Set it before the first step."""
        assert model is not None
        layer_map = find_layers(model, self._layers)
        set_eight_bit_states(optimizer, model, layer_map, self._groups)
