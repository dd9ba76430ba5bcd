"""Forward passes that begin where a unit does: what lies below it gives what it gave before.

In a pass with one unit changed every layer before the unit gets the same input and has the same
weights as in the pass of the whole model. Those layers are not run: each returns a copy of what it
returned then. Everything between the layers (embeddings, masks, positions) runs as ever, so that
the pass is the model's own, to the last bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lisa_analysis.contract.layers import canonical_name
from lisa_train.measure.ablation.units import Part
from lisa_train.model.layer_map import LayerMap

Forward = Callable[[nn.Module, Mapping[str, Any]], torch.Tensor]


@dataclass
class Kept:
    """What the layers returned in one pass, in the order in which they were called."""

    blocks: list[nn.Module] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(_bytes(output) for output in self.outputs)


class Passes:
    """Passes of one model over batches, whole or from a layer on.

    Parameters
    ----------
    model
        The model.
    layer_map
        Its layers.
    forward
        Makes what is wanted (the losses) of the model and a batch.

    Attributes
    ----------
    share : float
        Part of the layers that the last pass ran.
    """

    def __init__(self, model: nn.Module, layer_map: LayerMap, forward: Forward) -> None:
        self._model = model
        self._forward = forward
        places = {*layer_map.names, *layer_map.repeats}
        found = [m for name, m in model.named_modules() if canonical_name(name) in places]
        self._blocks = list(dict.fromkeys(found))
        # A layer that has grown wrappers of one path is there twice: the outermost counts.
        inside = {
            id(part) for block in self._blocks for part in block.modules() if part is not block
        }
        self._blocks = [block for block in self._blocks if id(block) not in inside]
        self._homes = {id(part): block for block in self._blocks for part in block.modules()}
        self._first: dict[int, int] = {}
        self._owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for tensor in (*module.parameters(False), *module.buffers(False)):
                self._owners.setdefault(id(tensor), []).append(module)
        self.share = 1.0

    def whole(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """One pass of the whole model."""
        self.share = 1.0
        with torch.no_grad():
            return self._forward(self._model, batch)

    def record(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, Kept]:
        """One pass of the whole model that keeps what the layers return."""
        kept = Kept()

        def keeping(block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                output = original(*args, **kwargs)
                kept.blocks.append(block)
                kept.outputs.append(_copied(output))
                return output

            return forward

        with self._instead(keeping), self._noting(kept):
            return self.whole(batch), kept

    def begin(self, parts: Iterable[Part]) -> int:
        """Return how many calls of layers come before the first use of any of `parts`.

        Known after the first `record`; 0, the whole model, where it cannot be told.
        """
        return min((self._begin(part) for part in parts), default=0)

    def after(self, begin: int, batch: Mapping[str, Any], kept: Kept) -> torch.Tensor:
        """One pass in which the first `begin` calls of layers return what is kept of them."""
        if not begin:
            return self.whole(batch)
        calls = 0

        def serving(block: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                number = calls
                calls += 1
                if number >= begin:
                    return original(*args, **kwargs)
                if kept.blocks[number] is not block:
                    raise RuntimeError("the layers are called in another order than before")
                return _copied(kept.outputs[number])

            return forward

        with self._instead(serving), torch.no_grad():
            losses = self._forward(self._model, batch)
        self.share = 1 - begin / len(kept.outputs)
        return losses

    def _begin(self, part: Part) -> int:
        owners = [part.module] if part.tensor is None else self._owners.get(id(part.tensor), [])
        return min((self._first_call(owner) for owner in owners), default=0)

    def _first_call(self, module: nn.Module) -> int:
        home = self._homes.get(id(module))
        # What stands in a layer acts when the layer is called, however it is called itself.
        known = home if home is not None else module
        return self._first.get(id(known), 0)

    @contextmanager
    def _noting(self, kept: Kept) -> Iterator[None]:
        """Note when every module is first called: after how many calls of layers."""
        if self._first:
            yield
            return

        def note(module: nn.Module, *_: Any) -> None:
            self._first.setdefault(id(module), len(kept.outputs))

        hooks = [m.register_forward_pre_hook(note) for m in self._model.modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _instead(
        self, make: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
    ) -> Iterator[None]:
        """Let every layer's `forward` be what `make` makes of it."""
        before = [(block, block.__dict__.get("forward")) for block in self._blocks]
        try:
            for block in self._blocks:
                block.forward = make(block, block.forward)  # type: ignore[method-assign]
            yield
        finally:
            for block, own in before:
                if own is not None:
                    block.forward = own  # type: ignore[method-assign]
                else:
                    block.__dict__.pop("forward", None)


def _copied(output: Any) -> Any:
    """Copy the tensors of an output: what comes after may change them in place."""
    if torch.is_tensor(output):
        return output.detach().clone()
    if isinstance(output, Mapping) and type(output) is dict:
        return {name: _copied(value) for name, value in output.items()}
    if type(output) in (tuple, list):
        return type(output)(_copied(value) for value in output)
    return output


def _bytes(output: Any) -> int:
    if torch.is_tensor(output):
        return int(output.numel() * output.element_size())
    if isinstance(output, Mapping):
        return sum(_bytes(value) for value in output.values())
    if isinstance(output, tuple | list):
        return sum(_bytes(value) for value in output)
    return 0
