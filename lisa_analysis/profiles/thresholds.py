"""Every number that a verdict rests on, in one place; `print(Thresholds())` shows them."""

from dataclasses import dataclass, field, fields

from lisa_analysis.statistics import estimate, shape


def _number(value: float, meaning: str) -> float:
    number: float = field(default=value, metadata={"meaning": meaning})
    return number


@dataclass(frozen=True)
class Thresholds:
    """Limits from which a profile's intervals, verdict and statement follow.

    Give `importance` one with other values to judge more or less strictly; a profile keeps the one
    that it was judged by. ``print(Thresholds())`` says what each is.
    """

    min_effective: float = _number(
        estimate.MIN_EFFECTIVE, "effective observations in time below which a layer is unknown"
    )
    min_visits: float = _number(
        estimate.MIN_VISITS, "periods between two draws below which it is unknown as well"
    )
    headroom: float = _number(
        1.05, "1 + CV² of the scores up to which sampling by them is not worth it"
    )
    material: float = _number(
        shape.MATERIAL, "relative difference below which no shape has a name, no layer stands apart"
    )
    spike: float = _number(1.25, "times the median layer from which one that stands out is a spike")
    reliable: float = _number(0.9, "split-half reliability from which a ranking is reliable")
    stable_tau: float = _number(
        0.6, "Kendall's τ that 95 % of bootstrap samples must reach for a stable ranking"
    )
    stable_overlap: float = _number(
        0.7, "overlap of the top quarters of both halves, for a stable ranking"
    )
    min_blocks: float = _number(8, "blocks in time below which nothing is said about drift")
    drift_level: float = _number(
        0.95, "quantile of the divergence without drift above which a material one is a drift"
    )
    drift_alarm: float = _number(12.0, "Page–Hinkley limit, in standard deviations of a block")
    explained: float = _number(
        0.9, "share of a profile there at step 0 from which it is its initialisation's"
    )

    def __str__(self) -> str:
        width = max(len(f.name) for f in fields(self))
        return "\n".join(
            f"{f.name:<{width}}  {getattr(self, f.name):<6g}{f.metadata['meaning']}"
            for f in fields(self)
        )


THRESHOLDS = Thresholds()
