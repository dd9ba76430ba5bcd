"""SamplingProbabilities: inclusion probabilities with what they were made from, and their file."""

import html
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lisa_analysis.contract import reprs as notebook
from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_analysis.contract.layers import stacks_of
from lisa_analysis.contract.paths import as_path, to_write, whole_file
from lisa_analysis.contract.probabilities_file import check_vector, read_record
from lisa_analysis.contract.schema import SCHEMA_VERSION
from lisa_analysis.statistics.shares import even_shares

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SamplingProbabilities:
    """Inclusion probabilities π of the layers (Σπ = k) with everything they were made from.

    Made by `sampling_probabilities`, or read with `load`.

    Attributes
    ----------
    model, layer_names, activated_layers
        The model, its layers in order, and k.
    inclusion_probabilities
        π of every layer; a layer with 0 is never drawn.
    scores, metric, source_runs, verdict, n_eff
        What they were made from, None where unknown; `source_runs` are the ids of all runs.
    strength
        The knob: a power on the scores, ``"pool"`` or ``"pool=6"``.
    gamma, mix, floor, cap
        The power, the share of uniform mixed in, and the bounds of π in units of k/L that were in
        force; a pool has none of them (0, 0, 0, inf).
    unknown
        Layers of which nothing is known: they have their uniform share k/L (in a pool 0).
    undecided
        Why the probabilities are uniform, in a sentence; empty where they follow the scores.
    gain, spread
        Summed score of a draw over that of a uniform one, for these π and for π in proportion to
        the scores without bounds (1 + CV²); None where no score is above zero.
    justified
        Whether the evidence is reason to leave uniform sampling.
    statement
        All this in words.
    control, seed
        The control, None for none, and the seed of its permutation.
    stages
        Maps each stage of the computation (score, low, high, safe, power, mixed) to one value per
        layer, None where unknown.
    created, schema_version
        When the file was made, and in which version of the contract.
    """

    model: str
    layer_names: tuple[str, ...]
    activated_layers: int
    inclusion_probabilities: tuple[float, ...]
    scores: tuple[float | None, ...] = field(repr=False)
    metric: str
    gamma: float
    mix: float
    floor: float
    cap: float
    n_eff: float | None
    source_runs: tuple[str, ...]
    verdict: str
    created: str
    control: str | None = None
    seed: int = 0
    justified: bool = False
    statement: str = ""
    strength: float | str = 1.0
    unknown: tuple[int, ...] = ()
    undecided: str = ""
    gain: float | None = None
    spread: float | None = None
    stages: dict[str, tuple[float | None, ...]] = field(
        default_factory=dict, repr=False, hash=False
    )
    schema_version: str = SCHEMA_VERSION

    def to_frame(self) -> "pd.DataFrame":
        """One row per layer, one column per stage, π last."""
        import pandas as pd

        frame = pd.DataFrame({"layer": range(len(self.layer_names)), "name": self.layer_names})
        for name, values in self.stages.items():
            frame[name] = np.array(values, dtype=np.float64)
        frame["inclusion_probability"] = self.inclusion_probabilities
        return frame

    def save(self, path: str | Path) -> Path:
        """Write the JSON file that `lisa-train --lisa.probabilities` takes."""
        path = to_write(path, "save")
        record = {"schema_version": self.schema_version, **asdict(self)}
        if math.isinf(self.cap):
            record["cap"] = None  # JSON has no infinity
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
        with whole_file(path) as file:
            file.write_text(text + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "SamplingProbabilities":
        """Read and check a probabilities file.

        Raises
        ------
        ProbabilitiesError
            One sentence, when the file is missing, torn, of another major version, or holds
            numbers that are no inclusion probabilities.
        """
        path = as_path(path, "SamplingProbabilities.load")
        record = read_record(path)
        names, k = record["layer_names"], record["activated_layers"]
        pi = record["inclusion_probabilities"]
        check_vector(path, names, pi, k)
        scores = record.get("scores") or [None] * len(names)
        if not isinstance(scores, list) or len(scores) != len(names):
            raise ProbabilitiesError(
                f"{path} has {len(names)} layer names and scores of another length: write the "
                "file again."
            )
        known = {name: record[name] for name in _OPTIONAL if name in record}
        if known.get("cap", 0) is None:
            known["cap"] = math.inf
        stages = record.get("stages")
        return cls(
            layer_names=tuple(names),
            activated_layers=k,
            inclusion_probabilities=tuple(float(p) for p in pi),
            scores=tuple(scores),
            source_runs=tuple(record.get("source_runs") or ()),
            stages={n: tuple(v) for n, v in stages.items()} if isinstance(stages, dict) else {},
            unknown=tuple(record.get("unknown") or ()),
            **{**_DEFAULTS, **known},
        )

    @property
    def never_drawn(self) -> tuple[int, ...]:
        """Layers with π = 0."""
        return tuple(i for i, p in enumerate(self.inclusion_probabilities) if p == 0)

    @property
    def uniform(self) -> tuple[float, ...]:
        """What uniform sampling of as many layers, of each stack, gives every layer."""
        pi = np.array(self.inclusion_probabilities, dtype=np.float64)
        return tuple(even_shares(pi, stacks_of(self.layer_names)).tolist())

    def __repr__(self) -> str:
        low, high = min(self.inclusion_probabilities), max(self.inclusion_probabilities)
        kind = f", {self.control} control" if self.control else ""
        return (
            f"<SamplingProbabilities k={self.activated_layers} of {len(self.layer_names)} layers "
            f"from {self.metric}{kind}: π {low:.4g} … {high:.4g}>"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(index=False, float_format=lambda v: f"{v:.4g}", border=0)
        pi = np.array(self.inclusion_probabilities)
        never = f", {len(self.never_drawn)} never drawn" if self.never_drawn else ""
        spread = (
            f"{self.activated_layers} of {len(pi)} layers at a time{never}; π from {pi.min():.3g} "
            f"(layer {pi.argmin()}) to {pi.max():.3g} (layer {pi.argmax()})"
            if np.ptp(pi) > 1e-9
            else f"{self.activated_layers} of {len(pi)} layers at a time; π = {pi[0]:.3g} for all"
        )
        kind = f", {self.control} control" if self.control else ""
        facts = notebook.facts(
            [
                ("sampling", spread),
                ("from", f"{self.metric} of {', '.join(self.source_runs) or 'given scores'}{kind}"),
            ]
        )
        return (
            f"<section>{facts}<p>{html.escape(self.statement)}</p><details><summary>from score to "
            f"probability, {len(pi)} rows</summary>{table}</details></section>"
        )


_OPTIONAL = (
    "model", "metric", "gamma", "mix", "floor", "cap", "n_eff", "verdict", "created", "control",
    "seed", "justified", "statement", "schema_version", "strength", "undecided", "gain", "spread",
)  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "model": "unknown", "metric": "unknown", "gamma": 1.0, "mix": 0.0, "floor": 0.0,
    "cap": math.inf, "n_eff": None, "verdict": "unknown", "created": "unknown",
}  # fmt: skip
