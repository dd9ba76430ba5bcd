"""Scores -> inclusion probabilities for the next run, and the JSON file that carries them."""

import html
import json
import math
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.errors import ProbabilitiesError
from lisa_analysis.schema import SCHEMA_VERSION, parse_version

if TYPE_CHECKING:
    import pandas as pd

    from lisa_analysis.profile import ImportanceProfile

Array = NDArray[np.float64]
Control = Literal["permuted", "reversed", "uniform"]

CONTROLS = ("permuted", "reversed", "uniform")
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
    stages: dict[str, tuple[float | None, ...]] = field(default_factory=dict, repr=False)
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
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
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
        record = _read(path)
        names, k = record["layer_names"], record["activated_layers"]
        pi = record["inclusion_probabilities"]
        _check_vector(path, names, pi, k)
        scores = record.get("scores") or [None] * len(names)
        if not isinstance(scores, list) or len(scores) != len(names):
            raise ProbabilitiesError(
                f"{path} has {len(names)} layer names and scores of another length: write the "
                "file again."
            )
        known = {name: record[name] for name in _OPTIONAL if name in record}
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
        return (
            f"<section><p>{html.escape(repr(self))}</p><p>{html.escape(self.statement)}</p>"
            f"<details><summary>stages</summary>{table}</details></section>"
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
        A profile by layer.
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
        False takes the scores as if they were certain.
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
    n = profile.n_layers
    if profile.by != "layer":
        raise ProbabilitiesError(
            f"sampling probabilities need a profile by layer, got one by {profile.by}."
        )
    _check_settings(n, activated_layers, gamma, mix, floor, cap, control)
    frame = profile.layers
    score, low, high = (frame[c].to_numpy(dtype=np.float64) for c in ("score", "low", "high"))
    if use_intervals:
        safe = safe_scores(low, high)
    else:
        safe = np.maximum(np.where(np.isfinite(score), score, _neutral(score)), 0.0)
    power = (safe / safe.mean()) ** gamma if safe.any() else np.ones(n)
    mixed = (1 - mix) * power / power.sum() + mix / n
    pi = inclusion_probabilities(mixed, activated_layers, floor=floor, cap=cap)
    pi = _apply_control(pi, control, seed)
    justified, reason = _justification(profile, pi)
    if control is not None:
        justified, reason = False, f"A {control} control: not meant to be better than uniform."
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
        n_eff=float(known.min()) if len(known) else None,
        source_runs=(profile.run_id,),
        verdict=profile.verdict,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        control=control,
        seed=int(seed),
        justified=justified,
        statement=reason,
        stages=stages,
    )


def safe_scores(low: Array, high: Array) -> Array:
    """Scores inside their intervals that make the sampling safest against being wrong.

    c_i = clip(m, low_i, high_i) with m = ‖c‖²/‖c‖₁: never worse than uniform sampling for any
    truth inside the intervals (Stich, Raj & Jaggi, NeurIPS 2017). A missing bound is 0 or ∞.
    """
    low = np.maximum(np.nan_to_num(low, nan=0.0), 0.0)
    high = np.maximum(np.nan_to_num(high, nan=np.inf), low)
    bounds = np.concatenate([low[low > 0], high[np.isfinite(high)]])
    if not len(bounds) or bounds.max() <= 0:
        return np.ones(len(low))
    left, right = 0.0, float(bounds.max())
    while True:
        middle = (left + right) / 2
        if middle in (left, right):
            break
        clipped = np.clip(middle, low, high)
        if (clipped * (clipped - middle)).sum() > 0:
            left = middle
        else:
            right = middle
    return np.clip(right, low, high)


def inclusion_probabilities(
    weights: Array, k: int, *, floor: float = 0.0, cap: float = math.inf
) -> Array:
    """π = clip(λ·w, floor·k/L, min(1, cap·k/L)) with λ such that Σπ = k.

    Raises
    ------
    ProbabilitiesError
        When no λ gives Σπ = k, or a layer could never be drawn.
    """
    weights = np.asarray(weights, dtype=np.float64)
    n = len(weights)
    lower, upper = min(1.0, floor * k / n), min(1.0, cap * k / n)
    if (weights < 0).any() or not np.isfinite(weights).all():
        raise ProbabilitiesError("weights of layers must be finite and not negative.")
    if not 1 <= k <= n or n * lower > k * (1 + 1e-12) or n * upper < k * (1 - 1e-12):
        raise ProbabilitiesError(
            f"no probabilities between {lower:.4g} and {upper:.4g} for {n} layers sum to {k}: "
            "choose floor ≤ 1 ≤ cap and at most as many activated layers as there are."
        )
    if lower <= 0 and not (weights > 0).all():
        raise ProbabilitiesError(
            f"layer {int(np.argmin(weights))} would never be drawn: use a floor or a mix above 0."
        )
    positive = weights[weights > 0]
    if not len(positive) or upper - lower < 1e-15:
        return np.full(n, k / n)
    left, right = 0.0, upper / float(positive.min())
    while True:
        scale = (left + right) / 2
        if scale in (left, right):
            break
        if np.clip(scale * weights, lower, upper).sum() < k:
            left = scale
        else:
            right = scale
    pi = np.clip(right * weights, lower, upper)
    free = (pi > lower) & (pi < upper)
    # Exact by construction: what the bounds leave is shared in proportion to the weights.
    for _ in range(4):
        if free.any():
            rest = k - math.fsum(pi[~free])
            pi[free] = np.clip(weights[free] * rest / math.fsum(weights[free]), lower, upper)
    return pi


def _apply_control(pi: Array, control: str | None, seed: int) -> Array:
    if control == "uniform":
        return np.full(len(pi), pi.sum() / len(pi))
    if control == "permuted":
        return np.random.default_rng(seed).permutation(pi)
    if control == "reversed":
        result = np.empty_like(pi)
        order = np.argsort(pi, kind="stable")
        result[order] = pi[order[::-1]]
        return result
    return pi


def _justification(profile: "ImportanceProfile", pi: Array) -> tuple[bool, str]:
    """Whether to leave uniform sampling, and why (not)."""
    from lisa_analysis.profile import WORTHWHILE_HEADROOM

    headroom = profile.concentration.headroom
    no = "The evidence does not justify leaving uniform sampling: "
    if profile.initialisation is not None and profile.initialisation.explained:
        return False, no + "the profile is explained by adapter initialisation."
    if profile.unseen:
        return False, no + f"{len(profile.unseen)} of {profile.n_layers} layers were never seen."
    if not profile.sufficient or headroom.low is None:
        return False, no + "the data are insufficient for intervals of the scores."
    if headroom.low <= WORTHWHILE_HEADROOM:
        return False, no + (
            f"the gain to be had is ×{headroom.value:.3f}, and may be as small as "
            f"×{headroom.low:.3f}."
        )
    if profile.reliability.drift:
        return False, no + "the profile drifted during the run."
    gain = float(pi.max() / pi.min())
    return True, (
        f"Sampling by {profile.metric} could gain ×{headroom.value:.2f} over uniform "
        f"(at least ×{headroom.low:.2f}); the most important layer is drawn {gain:.1f} times as "
        "often as the least. Whether the score predicts a lower loss is for a run to show, beside "
        "a uniform and a permuted control."
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
        raise ProbabilitiesError(
            f"control is {control!r}: expected one of {', '.join(CONTROLS)}, or None."
        )


def _neutral(score: Array) -> float:
    known = score[np.isfinite(score)]
    return float(known.mean()) if len(known) else 1.0


def _plain(values: Array) -> tuple[float | None, ...]:
    return tuple(float(v) if math.isfinite(v) else None for v in values)


def _read(path: Path) -> dict[str, Any]:
    """Parse the file and check its version and the types of what the trainer needs."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ProbabilitiesError(
            f"{path} does not exist: give a file written by lisa-analyze --probabilities."
        ) from None
    except OSError as error:
        raise ProbabilitiesError(f"{path} cannot be read ({error.strerror or error}).") from None
    except ValueError as error:
        raise ProbabilitiesError(
            f"{path} is not complete JSON ({error}): write it again with lisa-analyze "
            "--probabilities."
        ) from None
    if not isinstance(record, dict):
        raise ProbabilitiesError(f"{path} holds {type(record).__name__}, expected an object.")
    version = record.get("schema_version")
    try:
        major = parse_version(str(version))[0]
    except ValueError:
        major = -1
    if major != parse_version(SCHEMA_VERSION)[0]:
        raise ProbabilitiesError(
            f"{path} has schema version {version!r}, this lisa_analysis reads {SCHEMA_VERSION}."
        )
    for name in ("layer_names", "inclusion_probabilities"):
        if not isinstance(record.get(name), list):
            raise ProbabilitiesError(f"{path} has no list {name}: it is no probabilities file.")
    if not isinstance(record.get("activated_layers"), int):
        raise ProbabilitiesError(
            f"{path} has activated_layers = {record.get('activated_layers')!r}: expected a whole "
            "number."
        )
    return record


def _check_vector(path: Path, names: list[Any], pi: list[Any], k: int) -> None:
    """Σπ = k and 0 < π ≤ 1, one per layer."""
    if len(names) != len(pi):
        raise ProbabilitiesError(
            f"{path} has {len(names)} layer names and {len(pi)} inclusion probabilities: expected "
            "one per layer."
        )
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise ProbabilitiesError(f"{path} has layer names that are not distinct texts.")
    for layer, value in enumerate(pi):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and 0 < value <= 1):
            raise ProbabilitiesError(
                f"{path} has inclusion probability {value!r} for layer {layer}: expected a number "
                "above 0 and at most 1."
            )
    total = math.fsum(pi)
    if abs(total - k) > 1e-9:
        raise ProbabilitiesError(
            f"{path} has inclusion probabilities that sum to {total:.12g}: expected "
            f"activated_layers = {k}."
        )
