"""From the names in a `SelectConfig` to the tensors of a model."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.layers import same_layers
from lisa_train.methods.select.config import SelectConfig, layer_indices
from lisa_train.methods.select.spectrum import spectrum_choice
from lisa_train.model.layer_cache import known_layers
from lisa_train.model.layer_map import LayerMap


@dataclass(frozen=True)
class Choice:
    """What a `SelectConfig` comes to in one model.

    Attributes
    ----------
    layers
        Indices of the layers that train whole.
    tensors
        Names of all tensors that train, as in `named_parameters`, in its order.
    size
        Their elements.
    """

    layers: tuple[int, ...]
    tensors: tuple[str, ...]
    size: int


def choose(model: nn.Module, config: SelectConfig) -> Choice:
    """Find the tensors that `config` names.

    Raises
    ------
    ConfigError
        For a layer that the model does not have, a pattern or group that stands for nothing, or a
        file whose scores are not those of this model's layers.
    """
    layer_map = known_layers(model, config.stack)
    layers = _layers(layer_map, config)
    units = layer_map.units(model)
    chosen = {id(p) for i in layers for p in units[i]}
    for group in config.groups:
        if not units[group]:
            there = [unit for unit, tensors in units.items() if isinstance(unit, str) and tensors]
            raise ConfigError(
                f"select.groups holds {group!r}, but {type(model).__name__} has no such tensors; "
                f"beside its layers it has {', '.join(there)}."
            )
        chosen.update(id(p) for p in units[group])
    names = dict(model.named_parameters())
    for pattern in config.tensors:
        matched = [p for name, p in names.items() if re.fullmatch(pattern, name)]
        if not matched:
            raise ConfigError(
                f"select.tensors holds {pattern!r}, which matches no whole name of a tensor of "
                f"{type(model).__name__}; names look like {_examples(layer_map)}."
            )
        chosen.update(map(id, matched))
    if config.spectrum:
        chosen.update(id(names[n]) for n in spectrum_choice(model, layer_map, config.spectrum))
    found = tuple(name for name, p in names.items() if id(p) in chosen)
    return Choice(layers, found, sum(names[name].numel() for name in found))


def _examples(layer_map: LayerMap) -> str:
    names = [layer_map.layers[0][0], *(n for g in ("embed", "head") for n in layer_map.groups[g])]
    return ", ".join(map(repr, names[:2]))


def _layers(layer_map: LayerMap, config: SelectConfig) -> tuple[int, ...]:
    count = len(layer_map)
    chosen: set[int] = set()
    if config.layers is not None:
        indices = layer_indices(config.layers)
        if indices[-1] >= count:
            raise ConfigError(
                f"select.layers holds {indices[-1]}, but the model has layers 0 to {count - 1}."
            )
        chosen.update(indices)
    if config.last:
        chosen.update(_of_each_stack(layer_map, "last", config.last))
    if config.even:
        chosen.update(_of_each_stack(layer_map, "even", config.even))
    if config.top:
        assert config.profile is not None
        scores = read_scores(config.profile, layer_map)
        chosen.update(_top(scores, config.top, config.profile))
    return tuple(sorted(chosen))


def _of_each_stack(layer_map: LayerMap, setting: str, number: int) -> list[int]:
    """The last layers of every stack, or the middle ones of so many equal parts of its depth."""
    chosen: list[int] = []
    for stack in dict.fromkeys(layer_map.stacks):
        inside = [i for i, home in enumerate(layer_map.stacks) if home == stack]
        size = len(inside)
        if number > size:
            raise ConfigError(
                f"select.{setting} is {number}, but {stack} has {size} layers; give at most that."
            )
        if setting == "last":
            chosen += inside[-number:]
        else:
            chosen += [inside[(2 * part + 1) * size // (2 * number)] for part in range(number)]
    return chosen


def _top(scores: Mapping[int, float], number: int, path: str) -> list[int]:
    """The layers with the highest scores; an equal score at the edge leaves the choice open."""
    ordered = sorted(scores, key=lambda i: (-scores[i], i))
    if number > len(ordered):
        raise ConfigError(
            f"select.top is {number}, but {path} has a score of {len(ordered)} layers; give at "
            "most that."
        )
    above = sum(score > 0 for score in scores.values())
    if 0 < above < number:  # where none is, scores are of a scale of their own
        raise ConfigError(
            f"select.top is {number}, but in {path} {above} layers have a score above 0: the next "
            f"one, layer {ordered[above]}, has {scores[ordered[above]]:.3g}; give at most {above}."
        )
    inside, outside = ordered[number - 1], ordered[number : number + 1]
    if outside and scores[outside[0]] == scores[inside]:
        raise ConfigError(
            f"select.top is {number}, but layers {inside} and {outside[0]} have the same score in "
            f"{path}, so that it does not say which to take; choose another number, or name the "
            "layers in select.layers."
        )
    return sorted(ordered[:number])


def read_scores(path: str, layer_map: LayerMap) -> dict[int, float]:
    """Read the known scores of a saved profile, or the probabilities of a probabilities file.

    Raises
    ------
    ConfigError
        When the file is neither, or is about other layers than those of `layer_map`.
    """
    record = _record(path)
    if "inclusion_probabilities" in record:
        from lisa_analysis.plans.sampling import SamplingProbabilities

        loaded = SamplingProbabilities.load(path)
        names: Sequence[str] = loaded.layer_names
        values: Sequence[Any] = loaded.inclusion_probabilities
    elif isinstance(record.get("layers"), list) and record.get("by", "layer") == "layer":
        rows = [row for row in record["layers"] if isinstance(row, dict)]
        names, values = [row.get("name", "") for row in rows], [row.get("score") for row in rows]
    else:
        raise ConfigError(
            f"select.profile {path} holds no scores of layers; give a profile that "
            "ImportanceProfile.save wrote as .json, or a probabilities file."
        )
    if not same_layers(names, layer_map.names):
        raise ConfigError(
            f"select.profile {path} is about {len(names)} layers ({names[0] if names else 'none'}, "
            f"…), and not the {len(layer_map)} of this model ({layer_map.names[0]}, …); measure "
            "this model."
        )
    return {
        i: float(v)
        for i, v in enumerate(values)
        if isinstance(v, int | float) and v == v and not isinstance(v, bool)
    }


def _record(path: str) -> Mapping[str, Any]:
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"select.profile {path} cannot be read ({error.strerror or error}); give a saved "
            "profile (.json) or a probabilities file."
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"select.profile {path} is no JSON ({error}); give a profile that "
            "ImportanceProfile.save wrote as .json, or a probabilities file."
        ) from None
    return record if isinstance(record, dict) else {}
