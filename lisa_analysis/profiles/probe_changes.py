"""What training changed: the gradient that the data agree on, at two probes of one run."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics.log import measurements
from lisa_analysis.metrics.registry import find_metric
from lisa_analysis.profiles.from_run import importance
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.rundir.opening import RunLike, opened
from lisa_analysis.rundir.run import Run
from lisa_analysis.statistics.estimate import MIN_INDEPENDENT
from lisa_analysis.statistics.paired import change

_MOST = 10


@dataclass(frozen=True, eq=False)
class ProbeChange:
    """Two probes of a run side by side. Made by `probe_change`.

    Attributes
    ----------
    first, last
        Optimizer steps after which they were taken.
    before, after
        Their profiles by ``grad_signal``.
    layers
        One row per layer: layer, name, before, after, ratio (after over before, 0 where nothing is
        left), difference (after less before) with the bounds low and high of the layer by itself,
        joint_low and joint_high of all layers at once, and change: ``rose``, ``fell``, ``within``
        (zero lies in the joint band) or ``unknown``.
    paired
        Whether both probes are of the same batches, as those of one run are since they carry the
        number of their draw.
    statement
        The same in a sentence.
    """

    first: int
    last: int
    before: ImportanceProfile = field(repr=False)
    after: ImportanceProfile = field(repr=False)
    layers: pd.DataFrame = field(repr=False)
    statement: str = ""
    paired: bool = False

    @property
    def profiles(self) -> dict[str, ImportanceProfile]:
        """Both profiles under the steps that they are of."""
        return {f"after {s} steps": p for s, p in
                ((self.first, self.before), (self.last, self.after))}  # fmt: skip


def probed_steps(run: Run) -> list[int]:
    """Steps after which a run was probed with several batches."""
    if run.probes.empty:
        return []
    batches = run.probes.dropna(subset=["batch"]).groupby("step")["batch"].nunique()
    return sorted(int(step) for step in batches.index[batches > 1])


def probe_change(run: RunLike, first: int | None = None, last: int | None = None) -> ProbeChange:
    """Say of which layers the gradient that the data agree on rose or fell between two probes.

    Parameters
    ----------
    run
        A run directory, opened or as a path, that was probed with several batches at two steps or
        more (``record.probe_every`` with ``record.probe_batches``).
    first, last
        Optimizer steps after which the probes were taken; None for the first and the newest.

    Returns
    -------
    ProbeChange
        A layer rose or fell where the joint band of its difference (95 % for all layers at once)
        leaves zero out. With as many batches in both probes the difference is taken batch by
        batch; the probes of one run are of the same batches, so that what these have in common
        falls out of it.

    Raises
    ------
    LisaError
        When the run has no two such probes, or none at a step that was asked for.
    """
    run = opened(run, "probe_change")
    steps = probed_steps(run)
    if len(steps) < 2:
        raise LisaError(
            f"run {run.run_id} was probed with several batches at {len(steps)} steps, and a change "
            "is one between two: train with --record.probe_every and --record.probe_batches 8."
        )
    first, last = steps[0] if first is None else first, steps[-1] if last is None else last
    before, after = (importance(run, f"grad_signal@{step}") for step in (first, last))
    layers = _changes(run, before, after, first, last)
    draws = _draws(run)
    paired = draws.get(first) is not None and draws.get(first) == draws.get(last)
    said = _words(layers, first, last, paired)
    return ProbeChange(first, last, before, after, layers, said, paired)


def _draws(run: Run) -> dict[int, int]:
    """Number of the draw of batches, by step; the newest where a step was probed again."""
    events = run.events
    if "draw" not in events:
        return {}
    known = events[(events["event"] == "probe") & events["draw"].notna()]
    return dict(zip(known["step"].astype(int), known["draw"].astype(int), strict=True))


def _changes(
    run: Run, before: ImportanceProfile, after: ImportanceProfile, first: int, last: int
) -> pd.DataFrame:
    data = measurements(run, "layer")
    inside = data.table.groups.inside
    metrics = [find_metric(f"grad_signal@{step}") for step in (first, last)]
    values = [np.asarray(metric(data)[:, :inside], dtype=np.float64) for metric in metrics]
    found = change(
        *values, confidence=before.confidence, rng=np.random.default_rng(0), least=MIN_INDEPENDENT
    )
    old, new = before.to_frame(), after.to_frame()
    word = np.full(len(old), "within", dtype=object)
    with np.errstate(invalid="ignore", divide="ignore"):
        word[found.joint_low > 0] = "rose"
        word[found.joint_high < 0] = "fell"
        # The estimate is unbiased, and below zero here and there: there it is of nothing left.
        left, was = (np.maximum(f["score"].to_numpy(dtype=np.float64), 0.0) for f in (new, old))
        ratio = left / np.where(was > 0, was, np.nan)
    word[~np.isfinite(found.joint_low)] = "unknown"
    return pd.DataFrame({
        "layer": old["layer"], "name": old["name"], "before": old["score"], "after": new["score"],
        "ratio": ratio, "difference": found.difference, "low": found.low, "high": found.high,
        "joint_low": found.joint_low, "joint_high": found.joint_high, "change": word,
    })  # fmt: skip


def _words(layers: pd.DataFrame, first: int, last: int, paired: bool) -> str:
    lead = f"From step {first} to step {last} the gradient that the data agree on"
    parts = []
    for word in ("rose", "fell"):
        rows = layers[layers["change"] == word]
        if len(rows):
            ratios = rows["ratio"]
            span = f"×{ratios.min():.2f}" if len(rows) == 1 else (
                f"×{ratios.min():.2f} … ×{ratios.max():.2f}"
            )  # fmt: skip
            parts.append(f"{word} in {_listed(rows['layer'].tolist(), len(layers))} ({span})")
    unknown = int((layers["change"] == "unknown").sum())
    rest = f" {unknown} of {len(layers)} layers are unknown." if unknown else ""
    rest += " Both probes are of the same batches, compared batch by batch." if paired else ""
    if not parts:
        return f"{lead} did not change in any layer beyond its noise.{rest}"
    return f"{lead} {'; it '.join(parts)}.{rest}"


def _listed(rows: list[int], count: int) -> str:
    if len(rows) == count:
        return "all layers"
    shown = ", ".join(map(str, rows[:_MOST]))
    more = f" and {len(rows) - _MOST} more" if len(rows) > _MOST else ""
    return f"layer{'s' if len(rows) > 1 else ''} {shown}{more}"
