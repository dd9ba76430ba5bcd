"""Scores -> inclusion probabilities for the next run, and the JSON file that carries them."""

import html
import json
import math
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract import reprs as notebook
from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_analysis.contract.probabilities_file import check_vector, read_record
from lisa_analysis.contract.schema import SCHEMA_VERSION
from lisa_analysis.plans.budget import (
    CONTROLS,
    Control,
    apply_control,
    in_units,
    inclusion_probabilities,
    safe_scores,
)

if TYPE_CHECKING:
    import pandas as pd

    from lisa_analysis.profiles.profile import ImportanceProfile

Array = NDArray[np.float64]

STAGES = ("score", "low", "high", "safe", "power", "mixed")


@dataclass(frozen=True)
class SamplingProbabilities:
    """Inclusion probabilities π of the layers (Σπ = k) with everything they were made from.

    Made by `sampling_probabilities`, or read with `load`. `stages` maps each stage of the
    computation (score, low, high, safe, power, mixed) to one value per layer, None where unknown.
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
        path = Path(path)
        record = {"schema_version": self.schema_version, **asdict(self)}
        if math.isinf(self.cap):
            record["cap"] = None  # JSON has no infinity
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
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
        path = Path(path)
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
            **{**_DEFAULTS, **known},
        )

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
        spread = (
            f"{self.activated_layers} of {len(pi)} layers at a time; π from {pi.min():.3g} "
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
    "seed", "justified", "statement", "schema_version",
)  # fmt: skip
_DEFAULTS: dict[str, Any] = {
    "model": "unknown", "metric": "unknown", "gamma": 1.0, "mix": 0.0, "floor": 0.0,
    "cap": math.inf, "n_eff": None, "verdict": "unknown", "created": "unknown",
}  # fmt: skip


def sampling_probabilities(
    profile: "ImportanceProfile",
    activated_layers: int = 2,
    *,
    gamma: float = 1.0,
    mix: float = 0.25,
    floor: float = 0.25,
    cap: float = 4.0,
    use_intervals: bool = True,
    control: Control | None = None,
    seed: int = 0,
) -> SamplingProbabilities:
    """Turn a profile into inclusion probabilities.

    score with interval → safe score → power → uniform mix → floor and cap with Σπ = k.

    Parameters
    ----------
    profile
        A profile by layer; scores from elsewhere become one with `ImportanceProfile.from_scores`.
    activated_layers
        k, layers that train in each interval; any 1 … number of layers.
    gamma
        Power of the scores: 0 is uniform (LISA), 1 proportional.
    mix
        Share ε of uniform mixed in, so that no layer depends on its score alone.
    floor, cap
        Bounds of π in units of k/L; never above 1.
    use_intervals
        Pull every score towards the others as far as its interval allows (Stich, Raj & Jaggi
        2017): wide intervals give uniform sampling, and a layer without an interval is neutral.
        False takes the scores as if they were certain. Either way a layer that no gradient
        reached, or that scored below zero, counts as 0: it gets what `mix` and `floor` give it.
    control
        The same probabilities given to other layers, to tell importance from mere inequality:
        ``permuted`` at random, ``reversed`` in rank (the most important layer gets the smallest
        π), or ``uniform``.
    seed
        Of the permutation.

    Returns
    -------
    SamplingProbabilities
        `justified` says whether the evidence is reason to leave uniform sampling at all.

    Raises
    ------
    ProbabilitiesError
        For values out of range, bounds that no Σπ = k can meet, or a profile not by layer.
    """
    _check_profile(profile)
    n = profile.n_layers
    if profile.by != "layer":
        raise ProbabilitiesError(
            f"sampling probabilities need a profile by layer, got one by {profile.by}."
        )
    _check_settings(n, activated_layers, gamma, mix, floor, cap, control)
    control = None if control == "none" else control
    frame = profile.layers
    score, low, high = (
        frame[c].to_numpy(dtype=np.float64, copy=True) for c in ("score", "low", "high")
    )
    if np.isinf(score).any():
        raise ProbabilitiesError(
            f"layer {int(np.argmax(np.isinf(score)))} has an infinite score: expected finite ones."
        )
    if use_intervals:
        nothing = list(profile.zero)
        low[nothing] = high[nothing] = 0.0
        safe = safe_scores(low, high)
    else:
        safe = np.maximum(np.where(np.isfinite(score), score, _neutral(score)), 0.0)
    size = in_units(safe)
    power = (size / size.mean()) ** gamma if safe.any() else np.ones(n)
    mixed = (1 - mix) * power / power.sum() + mix / n
    pi = inclusion_probabilities(mixed, activated_layers, floor=floor, cap=cap)
    pi = apply_control(pi, control, seed)
    justified, reason = _justification(profile, pi)
    if control is not None:
        justified, reason = False, f"A {control} control: not meant to be better than uniform."
    elif least := _least(profile):
        reason = " ".join([reason, *profile.remarks, least])
    stages = dict(zip(STAGES, map(_plain, (score, low, high, safe, power, mixed)), strict=True))
    known = frame["n_eff"][frame["score"].notna()]
    return SamplingProbabilities(
        model=profile.model,
        layer_names=tuple(frame["name"]),
        activated_layers=int(activated_layers),
        inclusion_probabilities=tuple(pi.tolist()),
        scores=stages["score"],
        metric=profile.metric,
        gamma=float(gamma),
        mix=float(mix),
        floor=float(floor),
        cap=float(cap),
        n_eff=float(known.min()) if known.notna().any() else None,
        source_runs=profile.sources,
        verdict=profile.verdict,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        control=control,
        seed=int(seed),
        justified=justified,
        statement=reason,
        stages=stages,
    )


def _justification(profile: "ImportanceProfile", pi: Array) -> tuple[bool, str]:
    """Whether to leave uniform sampling, and why (not)."""
    headroom = profile.concentration.headroom
    no = "The evidence does not justify leaving uniform sampling: "
    if profile.initialisation is not None and profile.initialisation.explained:
        return False, no + "the profile is explained by adapter initialisation."
    if profile.unseen:
        return False, no + f"{len(profile.unseen)} of {profile.n_layers} layers were never seen."
    if not profile.sufficient or headroom.low is None:
        return False, no + "the data are insufficient for intervals of the scores."
    if headroom.low <= profile.thresholds.headroom:
        return False, no + (
            f"the gain to be had is ×{headroom.value:.3f}, and may be as small as "
            f"×{headroom.low:.3f}."
        )
    if profile.reliability.drift:
        return False, no + "the profile drifted during the run."
    # Without a floor a layer may have π = 0.
    gain = float(pi.max() / pi.min()) if pi.min() > 0 else math.inf
    material = profile.thresholds.material
    if gain < 1 + material:
        return False, (
            f"No layer is drawn {material:.0%} more often than another: these settings "
            "(activated_layers, gamma, mix, floor, cap, use_intervals) make the probabilities "
            "uniform."
        )
    return True, (
        f"Sampling by {profile.metric} could gain ×{headroom.value:.2f} over uniform "
        f"(at least ×{headroom.low:.2f}); the most important layer is drawn {gain:.1f} times as "
        "often as the least. Whether the score predicts a lower loss is for a run to show, beside "
        "a uniform and a permuted control."
    )


def _least(profile: "ImportanceProfile") -> str:
    """What becomes of layers that count as 0; empty without any."""
    below = profile.layers["high"].to_numpy(dtype=np.float64) < 0
    count = int(below.sum()) + len(profile.zero)
    if not count:
        return ""
    return f"{'They get' if count > 1 else 'It gets'} no more than mix and floor give."


def _check_profile(profile: Any) -> None:
    if not all(hasattr(profile, name) for name in ("layers", "by", "concentration")):
        raise ProbabilitiesError(
            f"sampling probabilities are made from a profile, got a {type(profile).__name__}: make "
            "one with importance(run), or of scores with ImportanceProfile.from_scores."
        )


def _check_settings(
    n: int, k: Any, gamma: float, mix: float, floor: float, cap: float, control: Any
) -> None:
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= n:
        raise ProbabilitiesError(
            f"activated_layers is {k!r}: expected a whole number from 1 to {n}, the number of "
            "layers."
        )
    for name, value, least, most in (
        ("gamma", gamma, 0.0, 16.0), ("mix", mix, 0.0, 1.0), ("floor", floor, 0.0, 1.0),
        ("cap", cap, 1.0, math.inf),
    ):  # fmt: skip
        if not (isinstance(value, (int, float)) and least <= value <= most):
            raise ProbabilitiesError(
                f"{name} is {value!r}: expected a number from {least:g} to {most:g}."
            )
    if control is not None and control not in CONTROLS:
        raise ProbabilitiesError(f"control is {control!r}: expected one of {', '.join(CONTROLS)}.")


def _neutral(score: Array) -> float:
    known = score[np.isfinite(score)]
    return float(known.mean()) if len(known) else 1.0


def _plain(values: Array) -> tuple[float | None, ...]:
    return tuple(float(v) if math.isfinite(v) else None for v in values)
