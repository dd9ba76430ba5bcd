"""Which tensors train now, and what becomes of the others: gradients, state, precision."""

from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lisa_train.methods.lisa.config import LisaConfig
from lisa_train.methods.lisa.input_gradients import InputGradients
from lisa_train.methods.lisa.precision import MasterWeights, exact_tensors, load_exact_tensors
from lisa_train.methods.lisa.recomputation import Recomputation
from lisa_train.model.layer_map import LayerMap
from lisa_train.model.sharding import is_sharded, reshard, settle_reductions
from lisa_train.optim.frozen_state import FrozenState, on_load


class ActiveTensors:
    """Lets some tensors of a model require gradients and clears the rest out of the optimizers.

    Parameters
    ----------
    model
        The model.
    config
        The settings.
    optimizers
        The optimizers.
    layer_map
        The layers.
    seed
        Of the stochastic rounding with ``precision="fp32_active"``.

    Attributes
    ----------
    trainable : list
        Tensors that had gradients when LISA came.
    now : set
        Those that train now.
    state : FrozenState
        The optimizers' state.
    of : dict
        The `trainable` tensors of every optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LisaConfig,
        optimizers: Sequence[Optimizer],
        layer_map: LayerMap,
        seed: int,
    ) -> None:
        self._sharded = model if any(is_sharded(p) for p in model.parameters()) else None
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._size = sum(p.numel() for p, _ in self._flags)
        self.trainable = [p for p, flag in self._flags if flag]
        self.now: set[nn.Parameter] = set()
        self._master_weights = (
            MasterWeights(model, self.trainable, seed)
            if config.precision == "fp32_active"
            else None
        )
        self._recomputation = (
            Recomputation(model, layer_map) if config.recompute == "frozen" else None
        )
        self.state = FrozenState(tuple(optimizers), config.optimizer_state)
        self._unhook: list[Callable[[], None]] = []
        owners = self.state.owners
        self.of = {o: [p for p in self.trainable if owners.get(p) is o] for o in optimizers}
        self._input_gradients = InputGradients(
            model, embeddings_train="embed" in config.always_active
        )

    def hook(self, before: Callable[..., None], after: Callable[..., None]) -> None:
        """Call `before` and `after` around every step of an optimizer, until this is closed.

        Parameters
        ----------
        before, after
            As `torch.optim.Optimizer.register_step_pre_hook` and `register_step_post_hook` call.
        """
        for optimizer in self.of:
            self._unhook += [
                optimizer.register_step_pre_hook(before).remove,
                optimizer.register_step_post_hook(after).remove,
                on_load(optimizer, self.state.loaded),
            ]

    def choose(self, wanted: set[nn.Parameter], layers: Sequence[int]) -> None:
        """Let exactly the `wanted` tensors require gradients.

        Parameters
        ----------
        wanted
            Tensors that train from now on.
        layers
            Layers that train.
        """
        if self._sharded is not None:
            reshard(self._sharded)  # an evaluation leaves other tensors in their place
        for parameter in self.trainable:
            if parameter in wanted:
                self._activate(parameter)
            else:
                self._freeze(parameter)
        self.now = wanted
        if self._sharded is not None:
            settle_reductions(self._sharded)
        if self._recomputation is not None:
            self._recomputation.spare(layers)

    def before_step(self, optimizer: Optimizer, closure: object) -> None:
        """Let an optimizer step the fp32 copies of what trains, where there are any."""
        if self._master_weights is not None:
            self._master_weights.before_step(optimizer, closure)

    def after_step(self, optimizer: Optimizer) -> list[torch.Tensor]:
        """Give an optimizer its tensors back; return those that `round` is to bring up to date."""
        if self._master_weights is None:
            return []
        return self._master_weights.after_step(optimizer)

    def round(self, moved: Sequence[torch.Tensor], step: int) -> None:
        """Make the tensors roundings of their copies again."""
        if self._master_weights is not None:
            self._master_weights.round(moved, step)

    def share(self) -> float:
        """Part of the model's parameters that trains now."""
        return sum(p.numel() for p in self.now) / self._size

    def rules(self, tensors: Set[torch.Tensor]) -> bool:
        """Whether any of `tensors` is the model's."""
        return any(p in tensors for p, _ in self._flags)

    def tensors(self) -> dict[str, Any]:
        """Return the fp32 weights and optimizer state, see `Lisa.tensors`."""
        return exact_tensors(self.trainable, self.now, self.state)

    def load_tensors(self, tensors: Mapping[str, Any]) -> None:
        """Take up what `tensors` returned."""
        load_exact_tensors(tensors, self.trainable, self.now, self.state)

    def close(self) -> None:
        """Restore every `requires_grad` flag and leave the optimizers as plain ones."""
        for unhook in self._unhook:
            unhook()
        self.state.close()
        if self._master_weights is not None:
            self._master_weights.close()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._input_gradients.restore()
        if self._recomputation is not None:
            self._recomputation.restore()

    def _activate(self, parameter: nn.Parameter) -> None:
        if parameter not in self.now:
            self.state.thaw(parameter)
        if self._master_weights is not None:
            self._master_weights.hold(parameter)
        parameter.requires_grad_(True)

    def _freeze(self, parameter: nn.Parameter) -> None:
        parameter.requires_grad_(False)
        # A loop that zeroes gradients instead of dropping them would otherwise go on moving the
        # tensor by momentum and weight decay.
        parameter.grad = None
        self.state.freeze(parameter)
        if self._master_weights is not None:
            self._master_weights.drop(parameter)
