"""What it would cost to know more: steps, the cadence they are recorded at, or a probe."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lisa_analysis.profiles.verdict import Judgement
from lisa_analysis.statistics.fit import Fit

if TYPE_CHECKING:
    from lisa_analysis.rundir.run import Run

# What `lisa-train --config probe` measures unless told otherwise (its recipe).
PROBE_BATCHES = 32


@dataclass(frozen=True)
class Cadence:
    """How a run was recorded.

    Attributes
    ----------
    every
        Optimizer steps from one record to the next.
    batch_seconds
        Time of one batch forwards and backwards, from the run's own clock; None where unknown.
    gradients
        Whether the metric is of gradients, which a probe measures as well.
    batches
        Whether its rows are batches of a probe.
    """

    every: int = 1
    batch_seconds: float | None = None
    gradients: bool = False
    batches: bool = False


def cadence(run: "Run", *, gradients: bool, batches: bool) -> Cadence:
    """Read how a run was recorded, and how long its steps took."""
    recording = run.manifest.get("recording") or {}
    every = recording.get("every")
    every = every if isinstance(every, int) and every > 0 else 1
    return Cadence(every, _batch_seconds(run), gradients, batches)


def _batch_seconds(run: "Run") -> float | None:
    scalars = run.scalars
    if "step_seconds" not in scalars or run.is_probe:
        return None
    seconds = scalars["step_seconds"].to_numpy(dtype=np.float64, na_value=np.nan)
    seconds = seconds[np.isfinite(seconds) & (seconds > 0)]
    if not len(seconds):
        return None
    segments = run.manifest.get("segments") or [{}]
    batches = segments[-1].get("accumulation") if isinstance(segments[-1], dict) else None
    batches = batches if isinstance(batches, int) and batches > 0 else 1
    return float(np.median(seconds)) / batches


def cost_words(fit: Fit, judged: Judgement, reliable: float, by: str, known: Cadence) -> str:
    """Say what more it takes until every layer has an interval and the ranking is reliable.

    Recording every step gives the more, the less of an observation the next one already knows
    (`Fit.fresh`): the part that is forgotten averages out as often as it is recorded, a course
    over many records does not.
    """
    needed = judged.reliability.steps_needed
    if needed is None or judged.reliability.enough or not 0 < needed < np.inf:
        return ""
    end = f"every {by} has an interval and" if not fit.known[fit.seen].all() else "the ranking of"
    goal = f"Until {end} {'the ranking is' if 'interval' in end else f'the {by}s is'} reliable"
    if known.batches:
        return f"{goal} ({reliable:g}) it takes about {needed:,.0f} more batches."
    at = f" at every={known.every}" if known.every > 1 else ""
    ways = [f"about {needed:,.0f} more steps{at}"]
    if known.every > 1:
        fewer = _steps_recorded_always(needed, fit, known.every)
        if fewer < 0.9 * needed:
            ways.append(f"about {fewer:,.0f} at every=1")
    if known.gradients:
        seconds = known.batch_seconds
        took = "" if seconds is None else f", about {_time(PROBE_BATCHES * seconds)}"
        ways.append(f"no training but a probe (--config probe, {PROBE_BATCHES} batches{took})")
    listed = ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])}, or {ways[-1]}"
    return f"{goal} ({reliable:g}) it takes {listed}."


def _steps_recorded_always(needed: float, fit: Fit, every: int) -> float:
    """Steps that give the same precision when every step is recorded."""
    seen = fit.seen & (fit.n_eff > 0)
    stretch = float(np.median(fit.observations[seen] / fit.n_eff[seen])) if seen.any() else 1.0
    fresh = min(fit.fresh, stretch)
    share = (fresh + every * (stretch - fresh)) / (every * stretch)
    return float(np.ceil(needed * share))


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} minutes"
