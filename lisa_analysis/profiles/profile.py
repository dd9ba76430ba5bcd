"""ImportanceProfile and its parts: what a profile says, in numbers and in words."""

import html
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.statistics import Concentration, Shape

Array = NDArray[np.float64]

# A headroom that may be below this is no reason to leave uniform sampling.
WORTHWHILE_HEADROOM = 1.05


@dataclass(frozen=True)
class Initialisation:
    """How much of a profile was there at step 0.

    Attributes
    ----------
    share
        Share of the spread between groups (layers, embedding, head) that the profile at step 0
        already shows; NaN when the groups do not differ.
    level
        Geometric mean of initial over final score, at most 1.
    explained
        Whether the profile is that of the adapter initialisation.
    expected
        Shape (layers,): norms that PEFT's default initialisation gives by formula (√(r/3) per
        adapted linear map), NaN where it does not apply.
    statement
        The same in words.
    """

    share: float
    level: float
    explained: bool
    expected: Array = field(repr=False)
    statement: str


@dataclass(frozen=True)
class Reliability:
    """Whether the ranking of the layers would come out the same again.

    Attributes
    ----------
    split_half
        Spearman–Brown reliability of odd against even blocks; NaN when there are too few.
    rank_low
        Lower 5 % of Kendall's τ between the profile and its bootstrap samples.
    top_overlap
        Jaccard overlap of the top quarters of the two halves.
    steps_needed
        Further optimizer steps until the reliability is 0.9; 0 when it is, inf when the layers
        do not differ, None when it cannot be said.
    drift
        True when the profile of the second half differs from the first beyond noise, None when
        the data do not allow to say.
    drift_step
        First recorded step at which a layer's series is seen to have moved, or None.
    divergence, divergence_floor
        Jensen–Shannon divergence between the halves in time and the 95 % level of noise alone.
    enough
        The stopping rule: all of the above good enough to stop collecting.
    """

    split_half: float
    rank_low: float
    top_overlap: float
    steps_needed: float | None
    drift: bool | None
    drift_step: int | None
    divergence: float
    divergence_floor: float
    enough: bool


@dataclass(frozen=True)
class ImportanceProfile:
    """Scores of the layers of one run under one metric, and what they are worth.

    Made by `importance`. `to_frame()` has one row per layer: layer, name, score, low, high,
    n_eff, visits, initial, rho, steps; NaN is unknown, never zero. `outside` holds the same for
    the embedding, head and final norm, which are no part of the stack.
    """

    metric: str
    definition: str
    run_id: str
    method: str
    model: str
    by: str
    confidence: float
    layers: pd.DataFrame = field(repr=False)
    outside: pd.DataFrame = field(repr=False)
    verdict: str
    statement: str
    concentration: Concentration = field(repr=False)
    shape: Shape = field(repr=False)
    initialisation: Initialisation | None = field(repr=False)
    reliability: Reliability = field(repr=False)
    samples: Array | None = field(repr=False, compare=False)

    @property
    def n_layers(self) -> int:
        """Rows of the profile: layers, or modules or tensors when those were asked for."""
        return len(self.layers)

    @property
    def scores(self) -> Array:
        """Shape (n_layers,), NaN where unknown."""
        return self.layers["score"].to_numpy(dtype=np.float64)

    @property
    def sufficient(self) -> bool:
        """Whether every layer has an interval."""
        return bool(self.layers["low"].notna().all()) and self.samples is not None

    @property
    def unseen(self) -> tuple[int, ...]:
        """Layers without any observation."""
        return tuple(np.flatnonzero(self.layers["score"].isna()).tolist())

    def to_frame(self) -> pd.DataFrame:
        """One row per layer."""
        return self.layers.copy()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; unknown is None."""
        record: dict[str, Any] = {
            name: getattr(self, name)
            for name in (
                "metric",
                "definition",
                "run_id",
                "method",
                "model",
                "by",
                "confidence",
                "verdict",
                "statement",
            )
        }
        record["concentration"] = asdict(self.concentration)
        record["shape"] = asdict(self.shape)
        record["reliability"] = asdict(self.reliability)
        record["initialisation"] = self.initialisation and asdict(self.initialisation)
        record["layers"] = self.layers.to_dict("records")
        record["outside"] = self.outside.to_dict("records")
        plain: dict[str, Any] = to_plain(record)
        return plain

    def save(self, path: str | Path) -> Path:
        """Write the profile as `.csv` (layers, then outside) or `.json` (everything).

        Raises
        ------
        LisaError
            For any other suffix.
        """
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        elif path.suffix == ".csv":
            pd.concat([self.layers, self.outside]).to_csv(path, index=False)
        else:
            raise LisaError(f"cannot save a profile as {path.name!r}: use .csv or .json.")
        return path

    def __repr__(self) -> str:
        return (
            f"<ImportanceProfile {self.metric} of {self.run_id}: {self.n_layers} {self.by}s, "
            f"{self.verdict}, headroom {self.concentration.headroom}>"
        )

    def _repr_html_(self) -> str:
        table = self.layers.to_html(index=False, float_format=lambda v: f"{v:.3g}", border=0)
        return (
            f"<section><h3>{html.escape(self.metric)} of {html.escape(self.run_id)}</h3>"
            f"<p>{html.escape(self.statement)}</p>"
            f"<details><summary>{self.n_layers} rows</summary>{table}</details></section>"
        )


def to_plain(value: Any) -> Any:
    """Recursively turn numpy and pandas values into JSON values; non-finite numbers are None."""
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return to_plain(value.tolist())
    if isinstance(value, np.generic):
        return to_plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if value is pd.NA or value is pd.NaT:
        return None
    return value
