"""LISA's draws: which layers were chosen when, and which steps each draw ruled."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def draws(run: Any) -> list[tuple[int, tuple[int, ...]]]:
    """LISA's draws in order, (step, layers); the later of two draws at one step counts."""
    return [(step, layers) for step, layers, _ in draw_events(run)]


def draw_events(run: Any) -> list[tuple[int, tuple[int, ...], NDArray[np.float64] | None]]:
    """LISA's draws with the inclusion probabilities π that were in force, None if not logged."""
    events = run.events
    if not len(events) or "event" not in events or "layers" not in events:
        return []
    found: dict[int, tuple[tuple[int, ...], NDArray[np.float64] | None]] = {}
    chosen = events[events["event"] == "lisa_draw"]
    pis = chosen.get("inclusion_probabilities", None)
    for index, (step, layers) in enumerate(zip(chosen["step"], chosen["layers"], strict=True)):
        pi = None if pis is None else pis.iloc[index]
        usable = pi is not None and np.ndim(pi) == 1
        found[int(step)] = (
            tuple(int(layer) for layer in layers),
            np.asarray(pi, dtype=np.float64) if usable else None,
        )
    return [(step, *found[step]) for step in sorted(found)]


def intervals(run: Any, steps: Ids) -> Ids:
    """Index of the draw that ruled every step (a draw at step d rules d+1 …), −1 before any."""
    starts = np.array([step for step, _ in draws(run)], dtype=np.int64)
    return np.asarray(np.searchsorted(starts, steps, side="left") - 1, dtype=np.int64)
