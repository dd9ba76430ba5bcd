"""The layers of the model that a trainer trains, found once for all that is attached to it."""

from torch import nn

from lisa_train.model.known_layers import known_layers
from lisa_train.model.layer_map import LayerMap


class KnownLayers:
    """Layer maps by the path that was asked for, as long as the model has the same tensors."""

    def __init__(self) -> None:
        self._found: dict[str | None, LayerMap] = {}

    def known(self, model: nn.Module, path: str | None) -> LayerMap | None:
        """Return the layers if they were found before, see `find_layers`."""
        found = self._found.get(path)
        if found is None or found.sizes != {n: p.numel() for n, p in model.named_parameters()}:
            return None
        return found

    def keep(self, path: str | None, layer_map: LayerMap) -> None:
        """Take note of layers that somebody found."""
        self._found[path] = layer_map

    def of(self, model: nn.Module, path: str | None) -> LayerMap:
        """Return the layers, looking for them if need be."""
        found = self.known(model, path)
        if found is None:
            self.keep(path, found := known_layers(model, path))
        return found
