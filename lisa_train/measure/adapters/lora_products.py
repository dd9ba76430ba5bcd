"""Norms of the products of LoRA's factors, without the products."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lisa_train.measure.adapters.factor_norms import gram_squares, joined_gram_squares
from lisa_train.measure.adapters.lora_pairs import Factors, LoraPair
from lisa_train.measure.processes import Processes
from lisa_train.model.joined import Joined
from lisa_train.model.norms import stacked
from lisa_train.model.sharding import is_sharded, pieces


@dataclass
class Products:
    """Squares of the products of some pairs, in their order; None is not measured.

    All are this process's parts, as those of B are: the parts add up.
    """

    deltas: list[torch.Tensor | None]
    merged: list[torch.Tensor | None]

    def measured(self, column: str) -> tuple[list[int], torch.Tensor]:
        """Return the places of the pairs that have a value, and the values."""
        values = self.deltas if column == "delta_norm" else self.merged
        found = [(i, value) for i, value in enumerate(values) if value is not None]
        if not found:
            return [], torch.zeros(0, dtype=torch.float64)
        return [i for i, _ in found], stacked([value for _, value in found])


@torch.no_grad()
def product_squares(
    pairs: Sequence[LoraPair], merged: bool, processes: Processes, *, dense: bool = True
) -> Products:
    """Return ‖sBA − s₀B₀A₀‖² and, with `merged`, ‖W + sBA‖² of the pairs.

    Sharded factors are small enough to be gathered whole, which takes one collective for all
    pairs together. `dense` allows for what has to read W for a change as well: DoRA's.
    """
    whole = whole_factors(pairs, processes)
    products = Products([], [])
    now = [pair.now(whole) if pair.alone else None for pair in pairs]
    plain = _plain_deltas(pairs, now)
    for i, pair in enumerate(pairs):
        delta, square = _squares_of(pair, now[i], plain.get(i), merged, dense)
        parts = pieces(pair.b)
        if square is not None or pair.magnitude is not None:  # sums over this process's part of W
            share = 1.0 if pair.weight is None else pieces(pair.weight) / parts
            square = None if square is None else square * share
        if delta is not None:
            delta = delta * share if pair.magnitude is not None else delta / parts
        products.deltas.append(delta)
        products.merged.append(square)
    return products


@torch.no_grad()
def joined_delta_squares(
    pairs: Sequence[LoraPair], joined: Joined, places: Mapping[int, int]
) -> tuple[list[int], torch.Tensor]:
    """Return ‖sBA‖² of the pairs whose factors are joined and began with a product of zero.

    Parameters
    ----------
    pairs
        Pairs of which the factors have just trained.
    joined
        The factors as they are after the step.
    places
        Place of a tensor in there, by its identity.

    Returns
    -------
    found, squares
        Places of those pairs among `pairs`, and their squares, float64.
    """
    found, scales, first, second = [], [], [], []
    for i, pair in enumerate(pairs):
        a, b = places.get(id(pair.a)), places.get(id(pair.b))
        if a is None or b is None or not (pair.plain and pair.alone):
            continue
        if isinstance(scale := pair.scale, float):
            found.append(i)
            scales.append(scale)
            first.append(a)
            second.append(b)
    squares = joined_gram_squares(joined.layout, joined.after, first, second)
    return found, squares * torch.tensor(scales, dtype=torch.float64) ** 2


def _squares_of(
    pair: LoraPair,
    now: Factors | None,
    delta: torch.Tensor | None,
    merged: bool,
    dense: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if now is None:
        return None, None
    if pair.magnitude is not None:
        found = pair.rescaled_squares(now) if dense else None
        if found is None:
            return None, None
        return (found[0] if pair.start_known else None), (found[1] if merged else None)
    if delta is None and pair.start_known:
        delta = pair.delta_square(now)
    return delta, (pair.merged_square(now) if merged else None)


def _plain_deltas(
    pairs: Sequence[LoraPair], now: Sequence[Factors | None]
) -> dict[int, torch.Tensor]:
    """‖sBA‖² of the pairs that began with a product of zero, by place; all of one shape at once."""
    alike: dict[tuple[Any, ...], list[tuple[int, Factors]]] = {}
    for i, (pair, factors) in enumerate(zip(pairs, now, strict=True)):
        if factors is None or factors.a is None or factors.b is None or not pair.plain:
            continue
        a, b = factors.a, factors.b
        key = (a.shape, b.shape, a.dtype, b.dtype, a.device)
        alike.setdefault(key, []).append((i, factors))
    found: dict[int, torch.Tensor] = {}
    for group in alike.values():
        squares = gram_squares(
            [f.a.flatten(1) for _, f in group if f.a is not None],
            [f.b.flatten(1) for _, f in group if f.b is not None],
        )
        for (i, factors), square in zip(group, squares.unbind(), strict=True):
            found[i] = square * factors.scale_for(square) ** 2
    return found


def whole_factors(pairs: Sequence[LoraPair], processes: Processes) -> dict[int, torch.Tensor]:
    """Return the sharded factors as whole tensors, by the identity of the parameters."""
    split = [p for pair in pairs for p in pair.parameters if is_sharded(p)]
    return dict(zip(map(id, split), processes.gather(split), strict=True))
