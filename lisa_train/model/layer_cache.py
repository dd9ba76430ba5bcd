"""The layers of a model, found once for everything that asks."""

import weakref

from torch import nn

from lisa_train.model.layer_map import LayerMap, find_layers

_FOUND: "weakref.WeakKeyDictionary[nn.Module, dict[str | None, LayerMap]]"
_FOUND = weakref.WeakKeyDictionary()


def known_layers(model: nn.Module, layers: str | None = None) -> LayerMap:
    """Return what `find_layers` finds, looking once as long as a model has the same tensors.

    Parameters
    ----------
    model, layers
        See `find_layers`.

    Raises
    ------
    ConfigError
        See `find_layers`.
    """
    found = _FOUND.setdefault(model, {})
    known = found.get(layers)
    if known is None or known.sizes != {n: p.numel() for n, p in model.named_parameters()}:
        found[layers] = known = find_layers(model, layers)
    return known
