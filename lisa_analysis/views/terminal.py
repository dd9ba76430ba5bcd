"""What `lisa-analyze` prints: findings, a table of layers with bars, a comparison of runs."""

import math
import shutil
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.views.states import STATES

if TYPE_CHECKING:
    import pandas as pd

    from lisa_analysis.plans.exports import Export
    from lisa_analysis.plans.sampling import SamplingProbabilities
    from lisa_analysis.profiles.from_run import ImportanceProfile
    from lisa_analysis.rundir.run import Run
    from lisa_analysis.runs.comparison import Comparison
    from lisa_analysis.runs.diagnostics import Diagnostics
    from lisa_analysis.views.analysis import Analysis

_EIGHTHS = " ▏▎▍▌▋▊▉█"
BAR_WIDTH = 24


def overview(analysis: "Analysis", *, every_rule: bool = False) -> str:
    """Findings of every run; of one alone its layers, of several the comparison.

    With `every_rule` the rules that passed or could not run are named as well.

    Runs that are seeds of one arm have a profile over seeds, whose layers follow.
    """
    parts, side_by_side = [], analysis.comparison
    for one in analysis.runs:
        parts.append(findings(one.run, one.diagnostics, every_rule=every_rule, name=one.name))
        if one.profile is None:
            parts.append(f"No profile: {one.why_not}\n")
        elif analysis.alone:
            parts.append(_layers(analysis))
        if one.probe_change is not None and analysis.alone:
            parts.append(textwrap.fill(one.probe_change.statement, min(100, width())) + "\n")
        if one.worth and analysis.alone:
            parts.append(worth_table(one.worth))
    if analysis.validity is not None:
        parts.append(textwrap.fill(analysis.validity.sentence, min(100, width())) + "\n")
    if side_by_side is not None:
        parts.append(run_table(side_by_side))
        if analysis.profile is not None:
            parts.append(_layers(analysis))
        elif len({(one.run.method, one.model) for one in analysis.runs}) == 1:
            # Runs that look like seeds.
            why = f"No profile over all runs: {analysis.why_not}"
            parts.append(textwrap.fill(why, min(100, width())) + "\n")
    return "\n".join(parts)


def _layers(analysis: "Analysis") -> str:
    assert analysis.profile is not None
    found = analysis.probabilities
    return layer_table(analysis.profile, found, analysis.plan.strengths(analysis.profile, found))


def findings(
    run: "Run", diagnostics: "Diagnostics", *, every_rule: bool = False, name: str = ""
) -> str:
    """Header of a run and what is wrong with it, worst first; rules that passed are counted.

    `name` is what the run is called beside others; by itself it goes by its folder.
    """
    model = (run.manifest.get("model") or {}).get("name", "unknown model")
    name = name or run.path.resolve().name
    lines = [f"{name}: {run.method} on {Path(str(model)).name}, {run.status}"]
    lines += [f"  {warning}" for warning in run.warnings]
    by_state = {state: [f for f in diagnostics.findings if f.state == state] for state in STATES}
    for state in STATES if every_rule else ("fail", "warn", "info"):
        for finding in by_state[state]:
            lines.append(f"  {STATES[state][0]} {finding.title}: {finding.evidence}")
            if every_rule:
                lines.append(f"      fires at: {finding.threshold}")
            if state in ("fail", "warn"):
                lines.append(f"      try: {finding.advice}")
    lines.append(
        "  " + ", ".join(f"{len(f)} {state}" for state, f in by_state.items() if f)
        if diagnostics.findings
        else "  no diagnostics"
        if run.has_course
        else "  weights alone: no course of a training to check"
    )
    return "\n".join(lines) + "\n"


def layer_table(
    profile: "ImportanceProfile",
    probabilities: "SamplingProbabilities | None",
    strengths: "pd.DataFrame | None" = None,
) -> str:
    """The layers as a table: score, sampling probability, and a bar that shows the score."""
    frame = profile.to_frame()
    scores = [float(score) for score in frame["score"]]
    pi = None if probabilities is None else probabilities.inclusion_probabilities
    known = [score for score in scores if math.isfinite(score) and score > 0]
    top = max(known, default=0.0)
    name_width = max(5, *(len(str(name)) for name in frame["name"])) if len(frame) else 5
    lines = [
        f"{profile.metric}: {profile.definition}",
        "",
        f"{'layer':<{name_width}}  {'score':>9}  {'π':>6}  of the largest score",
    ]
    for i, (name, score) in enumerate(zip(frame["name"], scores, strict=True)):
        chance = f"{pi[i]:6.3f}" if pi is not None else "     –"
        if math.isfinite(score):
            shown, drawn = f"{score:9.3g}", bar(score / top if top else 0.0)
        else:
            shown, drawn = f"{'unseen':>9}", ""
        lines.append(f"{name!s:<{name_width}}  {shown}  {chance}  {drawn}".rstrip())
    said = [profile.statement, ends_to_middle(profile)]
    if probabilities is not None:
        said.append(probabilities.statement)
        if probabilities.undecided:
            said.append("--ignore-intervals takes the scores as certain.")
        elif strengths is not None:
            said.append(strength_line(strengths))
    lines += ["", *(textwrap.fill(text, min(100, width())) for text in said if text)]
    return "\n".join(lines) + "\n"


def strength_line(strengths: "pd.DataFrame") -> str:
    """What a draw collects at each strength, in a line."""
    known = strengths[strengths["why_not"] == ""]
    parts = [
        f"{row['strength']} ×{row['gain']:.2f}" + (" of fewer layers" if row["never_drawn"] else "")
        for row in known.to_dict("records")
    ]
    return f"Score of a draw over a uniform one, by --strength (1 is mild): {', '.join(parts)}."


def worth_table(worth: "Mapping[str, ImportanceProfile]") -> str:
    """What the layers' changes were worth: a column per way of asking, with its interval."""
    frames = {metric: profile.to_frame() for metric, profile in worth.items()}
    first = next(iter(frames.values()))
    names = [str(name) for name in first["name"]]
    name_width = max(5, *map(len, names)) if names else 5
    heads = "  ".join(f"{metric:>30}" for metric in frames)
    lines = ["What the layers were worth, nats per token", "", f"{'layer':<{name_width}}  {heads}"]
    for row, name in enumerate(names):
        cells = [_worth_cell(frame.iloc[row]) for frame in frames.values()]
        lines.append(f"{name:<{name_width}}  " + "  ".join(f"{cell:>30}" for cell in cells))
    said = [profile.statement for metric, profile in worth.items() if metric != "ablation_reset"]
    said = said or [profile.statement for profile in worth.values()]
    lines += ["", *(textwrap.fill(text, min(100, width())) for text in said)]
    return "\n".join(lines) + "\n"


def _worth_cell(row: "pd.Series") -> str:
    if not math.isfinite(row["score"]):
        return "not ablated"
    text = f"{row['score']:.3g}"
    return f"{text} [{row['low']:.3g}, {row['high']:.3g}]" if math.isfinite(row["low"]) else text


def ends_to_middle(profile: "ImportanceProfile") -> str:
    """Say how the bottom and top of the stack compare with its middle; empty of several stacks."""
    if profile.stacks:
        return ""
    ratio = profile.concentration.ends_to_middle
    if not math.isfinite(ratio.value):
        return "Bottom and top against the middle: unknown, too few layers were seen."
    known = ratio.low is not None and ratio.high is not None
    interval = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if known else " (no interval)"
    return (
        f"Bottom and top eighth of the layers score ×{ratio.value:.2f}{interval} the middle half."
    )


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """A horizontal bar for a share in [0, 1], in eighths of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")


def run_table(comparison: "Comparison") -> str:
    """Runs side by side: held-out loss, time, peak memory; then the arms and their differences."""
    columns: list[tuple[str, str, Any]] = [
        ("run", "run", str),
        ("arm", "arm", str),
        ("method", "method", str),
        ("status", "status", str),
        ("steps", "steps", _whole),
        ("held_out_loss", "held-out loss", _decimals(4)),
        ("seconds", "seconds", _decimals(1)),
        ("peak_memory_bytes", "peak memory", _bytes),
    ]
    from lisa_analysis.runs.losses import score_columns

    scores = score_columns(comparison.table)
    columns[6:6] = [(name, name.replace("_", " "), _decimals(4)) for name in scores]
    repeated = len(comparison.arms) < len(comparison.table)
    if not repeated:
        columns = [column for column in columns if column[0] != "arm"]
    parts = [_table(comparison.to_frame(), columns)]
    if repeated:
        bounds = [("low", "low", _decimals(4)), ("high", "high", _decimals(4))]
        mean = ("mean", "held-out loss at equal steps", _decimals(4))
        counts = [("runs", "runs", _whole), ("seeds", "seeds", _whole)]
        parts.append(_table(comparison.arms, [("arm", "arm", str), *counts, mean, *bounds]))
    if comparison.differences["low"].notna().any():
        signs = [(name, title, _signed) for name, title in
                 (("mean", "a − b"), ("low", "low"), ("high", "high"))]  # fmt: skip
        pairs = ("pairs", "pairs of one seed", _whole)
        parts.append(
            _table(comparison.differences, [("a", "a", str), ("b", "b", str), *signs, pairs])
        )
    if comparison.statement:
        parts.append(textwrap.fill(comparison.statement, min(100, width())))
    return "\n\n".join(parts) + "\n"


def _table(frame: "pd.DataFrame", columns: list[tuple[str, str, Any]]) -> str:
    """Rows under their titles; words to the left, numbers to the right."""
    rows = [[title for _, title, _ in columns]]
    rows += [[show(row[name]) for name, _, show in columns] for _, row in frame.iterrows()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            f"{cell:<{w}}" if show is str else f"{cell:>{w}}"
            for cell, w, (_, _, show) in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in rows
    )


def exported(export: "Export") -> str:
    """What a file for another tool holds, in its own words."""
    return textwrap.fill(f"{export.kind}: {export.statement}", min(100, width())) + "\n"


def written(files: list[tuple[str, Path]]) -> str:
    """Where the output is, one file a line."""
    return "\n".join(f"{what + ':':<15}{path}" for what, path in files)


def width() -> int:
    """Columns of the terminal."""
    return shutil.get_terminal_size().columns


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _whole(value: Any) -> str:
    return "–" if _missing(value) else f"{int(value):,}"


def _decimals(places: int) -> Any:
    return lambda value: "–" if _missing(value) else f"{float(value):.{places}f}"


def _signed(value: Any) -> str:
    return "–" if _missing(value) else f"{float(value):+.4f}"


def _bytes(value: Any) -> str:
    return "–" if _missing(value) else f"{float(value) / 2**30:.2f} GiB"
