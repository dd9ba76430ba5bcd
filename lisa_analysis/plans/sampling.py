"""Profile -> inclusion probabilities for the next run, and what each strength would give."""

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_analysis.contract.layers import stacks_of
from lisa_analysis.plans.budget import CONTROLS as CONTROLS
from lisa_analysis.plans.budget import Control, seed_of_control
from lisa_analysis.plans.budget import inclusion_probabilities as inclusion_probabilities
from lisa_analysis.plans.budget import safe_scores as safe_scores
from lisa_analysis.plans.evidence import Evidence, check_profile
from lisa_analysis.plans.gains import STUDIED, spread_of
from lisa_analysis.plans.gains import gain as gain
from lisa_analysis.plans.probabilities import SamplingProbabilities as SamplingProbabilities
from lisa_analysis.plans.stacks import Division, stages_by_stack
from lisa_analysis.plans.stages import Stages
from lisa_analysis.plans.strength import Strength

if TYPE_CHECKING:
    import pandas as pd

    from lisa_analysis.profiles.profile import ImportanceProfile

Array = NDArray[np.float64]

STAGES = ("score", "low", "high", "safe", "power", "mixed")
# What the table of strengths shows, from uniform to the most concentrated.
STRENGTHS: tuple[float | str, ...] = (0.0, 0.5, 1.0, 2.0, 4.0, "pool")


def sampling_probabilities(
    profile: "ImportanceProfile",
    activated_layers: int = 2,
    *,
    strength: float | str = 1.0,
    gamma: float | None = None,
    mix: float = 0.25,
    floor: float = 0.25,
    cap: float = 4.0,
    use_intervals: bool = True,
    control: Control | None = "none",
    seed: int | None = None,
) -> SamplingProbabilities:
    """Turn a profile into inclusion probabilities.

    score with interval → careful score → power → mix with uniform → floor and cap with Σπ = k.

    A layer of a higher score never gets a smaller π than one of a lower score, where both are
    known; a layer that is unknown (without a score, or without an interval) gets its uniform share
    k/L. A profile that is undecided (no layer has an interval, none stands apart from the others,
    or it is that of the adapters' initialisation) gives uniform probabilities, and says so.

    Of several stacks (encoder and decoder) each gets its part of k in proportion to its depth, at
    least one layer, and everything here happens within a stack; where k is less than one of each,
    all layers are taken as one stack (train with ``lisa.stacks='together'``).

    Parameters
    ----------
    profile
        A profile by layer; scores from elsewhere become one with `ImportanceProfile.from_scores`.
    activated_layers
        k, layers that train in each period; any 1 … number of layers.
    strength
        How strongly π follows the scores: 0 is uniform (LISA), 1 the deliberately mild default, up
        to 16. It is the power on the scores; above 1, `mix` and `floor` fall in proportion and
        `cap` rises. ``"pool"`` shares k equally among the layers that stand above the mean with
        their whole interval, ``"pool=6"`` among the six best; the others have π = 0 and are never
        drawn.
    gamma
        A power on the scores that leaves `mix`, `floor` and `cap` as they are; it takes the place
        of `strength`.
    mix
        Share ε of uniform mixed in, so that no layer depends on its score alone.
    floor, cap
        Bounds of π in units of k/L; never above 1. A pool has neither them nor a mix.
    use_intervals
        Pull every score towards the common level of the layers by how little is known of it
        (empirical Bayes on logarithms, from the interval of each layer by itself). False takes
        the scores as if they were certain. Either way a layer that no gradient reached, or
        that scored below zero, counts as 0: it gets what `mix` and `floor` give it.
    control
        The same probabilities given to other layers, to tell importance from mere inequality:
        ``permuted`` at random, ``reversed`` in rank (the most important layer gets the smallest
        π), or ``uniform``; ``none`` or None is no control.
    seed
        Of the permutation, 0 where it is not given; written to the file. Refused where `control`
        is left out; None said outright is for a loop over controls.

    Returns
    -------
    SamplingProbabilities
        `justified` says whether the evidence is reason to leave uniform sampling at all.

    Raises
    ------
    ProbabilitiesError
        For values out of range, bounds that no Σπ = k can meet, a pool of fewer than k layers or
        of an undecided profile, or a profile not by layer.
    """
    evidence = _evidence(profile, use_intervals)
    seed = seed_of_control(control, seed)
    settings = Strength.of(strength, mix=mix, floor=floor, cap=cap, gamma=gamma)
    control = None if control == "none" else control
    if settings.pool is not None:
        _check_pool(strength, evidence)
    frame = profile.layers
    division = _division(profile, activated_layers)
    stages = stages_by_stack(evidence, division, settings, control, seed)
    raw = [frame[c].to_numpy(dtype=np.float64) for c in ("score", "low", "high")]
    shown = (raw[0], *(raw[1:] if evidence.undecided else (stages.low, stages.high)),
             stages.safe, stages.power, stages.mixed)  # fmt: skip
    plain = dict(zip(STAGES, map(_plain, shown), strict=True))
    justified, statement = _judged(profile, evidence, stages, division, control, seed)
    known = frame["n_eff"][frame["score"].notna()]
    return SamplingProbabilities(
        model=profile.model,
        layer_names=tuple(frame["name"]),
        activated_layers=int(activated_layers),
        inclusion_probabilities=tuple(stages.pi.tolist()),
        scores=plain["score"],
        metric=profile.metric,
        gamma=settings.power,
        mix=settings.mix,
        floor=settings.floor,
        cap=settings.cap,
        n_eff=float(known.min()) if known.notna().any() else None,
        source_runs=profile.sources,
        verdict=profile.verdict,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        control=control,
        seed=seed,
        justified=justified,
        statement=statement,
        strength=Strength.read(strength) if gamma is None else settings.power,
        unknown=tuple(np.flatnonzero(~stages.known).tolist()),
        undecided=evidence.undecided,
        gain=_finite(gain(stages.pi, raw[0], division)),
        spread=_finite(spread_of(raw[0], division)),
        stages=plain,
    )


def own_activated_layers(run: Any) -> int | None:
    """Layers in each draw of a run that LISA trained; None of any other run."""
    k: int | None = (getattr(run, "manifest", {}).get("lisa") or {}).get("activated_layers")
    return k


def _check_pool(strength: float | str, evidence: Evidence) -> None:
    """Refuse a pool of layers that nothing names."""
    if evidence.undecided:
        raise ProbabilitiesError(
            f"strength is {strength!r}, but the profile is undecided ({evidence.undecided}), and "
            "names no layers for a pool; take the scores as certain (--ignore-intervals, "
            "use_intervals=False), or measure more."
        )


def _division(profile: "ImportanceProfile", k: Any) -> Division:
    """Return the stacks of a profile, and how many layers of each a draw takes."""
    stacks = stacks_of(profile.layers["name"])
    whole = isinstance(k, int | np.integer) and not isinstance(k, bool)
    return Division.of(stacks if whole else [""] * len(stacks), k)  # what is not is refused


def strengths(
    profile: "ImportanceProfile",
    activated_layers: int = 2,
    *,
    use_intervals: bool = True,
    values: tuple[float | str, ...] = STRENGTHS,
) -> "pd.DataFrame":
    """What each strength would give: one row each, with why not where it gives nothing.

    Returns
    -------
    pandas.DataFrame
        ``strength``; ``least`` and ``most``, the bounds of π above 0; ``never_drawn``, how many
        layers have π = 0; ``gain``, see `gain`; ``why_not``, empty where there are probabilities;
        ``pi``, an array of shape (L,), None where there are none.

    Raises
    ------
    ProbabilitiesError
        For what no strength could cure: see `sampling_probabilities`.
    """
    import pandas as pd

    evidence = _evidence(profile, use_intervals)
    division = _division(profile, activated_layers)
    rows = []
    for value in values:
        row: dict[str, Any] = {"strength": value if isinstance(value, str) else f"{value:g}"}
        settings = Strength.of(value)
        try:
            if settings.pool is not None and evidence.undecided:
                raise ProbabilitiesError(f"the profile is undecided: {evidence.undecided}.")
            pi = stages_by_stack(evidence, division, settings, None, 0).pi
        except ProbabilitiesError as error:
            if settings.pool is None:
                raise
            rows.append(row | {"why_not": str(error), "pi": None})
            continue
        rows.append(
            row
            | {"least": pi[pi > 0].min(), "most": pi.max(), "never_drawn": int((pi == 0).sum()),
               "gain": gain(pi, evidence.score, division), "why_not": "", "pi": pi}
        )  # fmt: skip
    columns = ["strength", "least", "most", "never_drawn", "gain", "why_not", "pi"]
    return pd.DataFrame(rows, columns=columns)


def _evidence(profile: "ImportanceProfile", use_intervals: bool) -> Evidence:
    check_profile(profile)
    if profile.by != "layer":
        raise ProbabilitiesError(
            f"sampling probabilities need a profile by layer, got one by {profile.by}; make it by "
            "layer, whose π every part of it takes over where lisa.by parts layers."
        )
    return Evidence.of(profile, use_intervals)


def _judged(
    profile: "ImportanceProfile",
    evidence: Evidence,
    stages: Stages,
    division: Division,
    control: str | None,
    seed: int,
) -> tuple[bool, str]:
    """Whether to leave uniform sampling, and everything that is to be said."""
    if control is not None:
        of_seed = f" of seed {seed}" if control == "permuted" else ""
        return False, (
            f"A {control} control{of_seed}: the same probabilities, given to other layers than "
            "the scores would; not meant to be better than uniform."
        )
    justified, reason = _justification(profile, evidence, stages, division)
    said = [reason] + ([division.sentence()] if len(division) > 1 else [])
    if len(division) < len(set(stacks_of(profile.layers["name"]))):
        said.append(
            "There are more stacks than layers in a draw, so that they are drawn together: train "
            "with lisa.stacks='together'."
        )
    if not evidence.undecided:
        said += _unknown(stages, division.uniform)
        if (never := stages.pi == 0).any():
            said.append(f"Never drawn: {_name(never)}.")
        if evidence.doubt:
            said.append(f"The scores are taken as certain, although {evidence.doubt}.")
    if profile.reliability.drift and not evidence.undecided:
        said.append(
            "The profile drifted during the run: its scores are averages of stages, and no firm "
            "reason to leave uniform sampling."
        )
    said += profile.remarks
    below = profile.layers["high"].to_numpy(dtype=np.float64) < 0
    count = int(below.sum()) + len(profile.zero)
    if count and not evidence.undecided and stages.strength.pool is None:
        them = "They get" if count > 1 else "It gets"
        said.append(f"{them} no more than mix and floor give.")
    return justified, " ".join(said)


def _justification(
    profile: "ImportanceProfile", evidence: Evidence, stages: Stages, division: Division
) -> tuple[bool, str]:
    """Whether to leave uniform sampling, and why (not)."""
    pi = stages.pi / division.uniform  # layers of one stack have one uniform share
    if evidence.undecided:
        return False, (
            "The evidence does not justify leaving uniform sampling, and the probabilities are "
            f"uniform: {evidence.undecided}."
        )
    if np.ptp(pi) < 1e-9:
        return False, (
            "Every layer is drawn as often as any other: these settings (activated_layers, "
            "strength, gamma, mix, floor, cap, use_intervals) make the probabilities uniform."
        )
    value = gain(stages.pi, evidence.score, division)
    spread = spread_of(evidence.score, division)
    collects = (
        f"a draw collects ×{value:.2f} the score of a uniform one, and the spread of the scores "
        f"(1 + CV²) is {spread:.2f}"
    )
    inside = pi[pi > 0]
    times = float(inside.max() / inside.min())
    limits = profile.thresholds
    # What is left of the spread at the lower end of its interval can be counted on.
    low = profile.concentration.headroom.low
    if low is None or evidence.low is None:
        low = spread_of(stages.safe, division)
    least = min(spread, low)
    if np.ptp(inside) / inside.max() < limits.material / (1 + limits.material) and pi.min() > 0:
        return False, (
            f"The probabilities hardly differ from uniform ones: no layer is drawn "
            f"{limits.material:.0%} more often than another, and {collects}."
        )
    if least <= limits.headroom:
        return False, (
            f"The probabilities follow the scores, but little is to be had: {collects}; that may "
            f"be as small as {least:.3f}, where more than {limits.headroom:g} is asked for."
        )
    of_its = "measured by its stack's uniform share, " if len(division) > 1 else ""
    often = (
        f"{of_its}the layer drawn most is drawn {times:.1f} times as often as the one drawn least"
        if times > 1 + 1e-9
        else f"{len(inside)} layers share the draws equally"
    )
    said = (
        f"Sampling by {profile.metric}: {collects}; {often}. Whether the score predicts a lower "
        "loss is for a run to show, beside a uniform and a permuted control."
        + (STUDIED if profile.method == "probe" else "")
    )
    return not evidence.doubt and not profile.reliability.drift, said


def _unknown(stages: Stages, uniform: Array) -> list[str]:
    """What becomes of unknown layers."""
    unknown = ~stages.known
    if not unknown.any():
        return []
    if stages.strength.pool is not None:
        return [f"Unknown, and not in the pool: {_name(unknown)}."]
    whose = "their" if unknown.sum() > 1 else "its"
    shares = dict.fromkeys(f"{share:.3g}" for share in uniform[unknown])
    return [f"Unknown, and at {whose} uniform share {' or '.join(shares)}: {_name(unknown)}."]


def _name(chosen: NDArray[np.bool_]) -> str:
    from lisa_analysis.profiles.sentences import name_rows

    return name_rows("layer", (), chosen)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(values: Array) -> tuple[float | None, ...]:
    return tuple(float(v) if math.isfinite(v) else None for v in values)
