"""Learning rates from a grid, each arm's own: an untuned rate can make an effect, or hide it."""

from collections.abc import Callable, Sequence

EXTENSIONS = 3  # how often a grid whose best rate stands at its edge is moved on


def tried(
    centre: float,
    factors: Sequence[float],
    losses: Callable[[Sequence[float]], dict[float, float] | None],
) -> list[float]:
    """Return the rates of a grid, moved on where the best stands at an edge.

    Parameters
    ----------
    centre
        Rate that the factors are of.
    factors
        Of the grid, in rising order.
    losses
        Gives the tuning loss at every rate; None while one of them is not finished.
    """
    rates = [centre * factor for factor in factors]
    for _ in range(EXTENSIONS):
        found = losses(rates)
        if found is None:
            break
        best = min(found, key=found.__getitem__)
        if best == rates[-1]:
            rates.append(best * factors[1] / factors[0])
        elif best == rates[0]:
            rates.insert(0, best * factors[0] / factors[1])
        else:
            break
    return rates
