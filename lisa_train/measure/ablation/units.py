"""What is taken out or put in together: a layer, a group, a kind of tensor in them, or a range."""

import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from lisa_analysis.contract.errors import ConfigError
from lisa_train.checks import one_of, whole
from lisa_train.model.layer_map import GROUPS

By = Literal["layer", "kind", "both"]
# An int: every run of so many layers. Otherwise the ranges themselves, "4-7" or (4, 7).
Ranges = int | Sequence[str | tuple[int, int]] | None


@dataclass(frozen=True, eq=False)
class Part:
    """One thing that was learned: the change of a tensor, or an adapter around a module.

    Attributes
    ----------
    name
        Canonical name of the tensor, or path of the adapted module.
    unit, kind
        Layer or group that it belongs to, and its kind.
    tensor
        The tensor whose values changed; None for an adapter.
    module
        The adapter, a layer of PEFT that can be switched off; None for a tensor.
    number
        Number of the tensor among those of the model.
    """

    name: str
    unit: int | str
    kind: str
    tensor: torch.Tensor | None = field(default=None, repr=False)
    module: Any = field(default=None, repr=False)
    number: int = -1


@dataclass(frozen=True)
class AblatedUnit:
    """Parts that are taken out or put in together.

    Attributes
    ----------
    name, kind
        As in the columns `unit` and `kind` of ablation.parquet.
    parts
        What was learned in it; nothing where it is as it was.
    """

    name: str
    kind: str | None
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        return self.name if self.kind is None else f"{self.name} {self.kind}"


def make_units(
    parts: Sequence[Part],
    kinds: Sequence[AbstractSet[str]],
    by: By = "layer",
    ranges: Ranges = None,
) -> list[AblatedUnit]:
    """Sort what was learned into units.

    Parameters
    ----------
    parts
        All that was learned.
    kinds
        Kinds of tensors that every layer has.
    by
        ``layer``: layers and groups; ``kind``: every layer's kinds, and groups; ``both``.
    ranges
        Runs of layers as well.

    Returns
    -------
    list of AblatedUnit
        Every layer is there, also one that did not change; a kind that changed in some layer is
        there for every layer that has it; a group is there where something changed in it.

    Raises
    ------
    ConfigError
        For a range beyond the layers.
    """
    one_of("by", by, get_args(By))
    layers = len(kinds)
    of: dict[int | str, list[Part]] = {}
    for part in parts:
        of.setdefault(part.unit, []).append(part)
    found = []
    changed = {part.kind for part in parts if isinstance(part.unit, int)}
    for layer in range(layers):
        here = of.get(layer, [])
        if by != "kind":
            found.append(AblatedUnit(str(layer), None, tuple(here)))
        if by == "layer":
            continue
        found += [
            AblatedUnit(str(layer), kind, tuple(part for part in here if part.kind == kind))
            for kind in sorted(kinds[layer] & changed)
        ]
    groups = [*GROUPS, *sorted({u for u in of if isinstance(u, str)} - set(GROUPS))]
    found += [AblatedUnit(g, None, tuple(of[g])) for g in groups if g in of]
    for first, last in read_ranges(ranges, layers):
        inside = tuple(part for i in range(first, last + 1) for part in of.get(i, []))
        found.append(AblatedUnit(f"{first}-{last}", None, inside))
    return found


def read_ranges(ranges: Ranges, layers: int) -> list[tuple[int, int]]:
    """Return first and last layer of every range.

    Raises
    ------
    ConfigError
        For what is no range, or lies beyond the layers.
    """
    if ranges is None:
        return []
    words = f", a number of layers from 2 to {layers}, or ranges as 4-7"
    if isinstance(ranges, int) or not isinstance(ranges, str | Iterable):
        length = whole("range", ranges, words)
        if not 2 <= length <= layers:
            raise ConfigError(f"range is {length}; expected{words[1:]} of {layers} layers.")
        return [(first, first + length - 1) for first in range(layers - length + 1)]
    if isinstance(ranges, str):
        return read_ranges(read_words(ranges, layers), layers)
    found = []
    for entry in ranges:
        if isinstance(entry, str):
            match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", entry)
            pair = (int(match[1]), int(match[2])) if match else None
        else:
            pair = (int(entry[0]), int(entry[1])) if len(entry) == 2 else None
        if pair is None or not 0 <= pair[0] < pair[1] < layers:
            shown = entry if isinstance(entry, str) else "-".join(map(str, entry))
            raise ConfigError(
                f"range {shown!r} is none of the model's {layers} layers, 0 to {layers - 1}; "
                "expected first and last layer, as 4-7."
            )
        found.append(pair)
    return list(dict.fromkeys(found))


def read_words(text: str, layers: int) -> int | list[str]:
    """Read `--range`: a number of layers, or ranges separated by commas."""
    if re.fullmatch(r"\s*\d+\s*", text):
        return int(text)
    return [word for word in text.split(",") if word.strip()]


def choose_units(
    words: str | Iterable[str | int], parts: Sequence[Part], layers: int
) -> tuple[list[str], list[Part]]:
    """Return the units that words name (``3``, ``4-7``, ``embed``) and what was learned in them.

    Raises
    ------
    ConfigError
        For a word that names no layer and no group, or one in which nothing was learned.
    """
    given = words.split(",") if isinstance(words, str) else words
    groups = {part.unit for part in parts if isinstance(part.unit, str)}
    units: dict[int | str, None] = {}
    for entry in given:
        word = str(entry).strip()
        if word.isdecimal() and int(word) < layers:
            units[int(word)] = None
        elif "-" in word and not word.startswith("-"):
            [(first, last)] = read_ranges([word], layers)
            units |= dict.fromkeys(range(first, last + 1))
        elif word in groups:
            units[word] = None
        elif word:
            raise ConfigError(
                f"{word!r} is no layer (0 to {layers - 1}) and no group in which something was "
                f"learned ({', '.join(sorted(map(str, groups))) or 'none'})."
            )
    if not units:
        raise ConfigError("no layer to put back is named; give their numbers, as 3,17.")
    chosen = [part for part in parts if part.unit in units]
    if not chosen:
        raise ConfigError(
            f"nothing was learned in {', '.join(map(str, units))}: there is nothing to put back."
        )
    return [str(unit) for unit in units], chosen


def kinds_by_layer(rows: Iterable[Mapping[str, Any]], layers: int) -> list[set[str]]:
    """Return the kinds of tensors in every layer, from the rows of parameters.parquet."""
    kinds: list[set[str]] = [set() for _ in range(layers)]
    for row in rows:
        if row["layer"] is not None:
            kinds[row["layer"]].add(row["kind"])
    return kinds
