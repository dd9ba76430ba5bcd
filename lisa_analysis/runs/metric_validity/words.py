"""What the table of agreements says, in sentences."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

WORTH = {
    "ablation_keep": "what a change is worth alone (keep)",
    "ablation_reset": "what it is missed for (reset)",
}
# Below this an ablation says little about the order that it is asked for.
TELLING = 0.5


def sentences(
    table: pd.DataFrame,
    reliability: Mapping[tuple[str, str], float],
    runs: int,
    strange: Sequence[str],
    confidence: float,
) -> str:
    """Say which metric predicts the ablation, level by level, or that none does.

    And what was given that stands beside none of it.
    """
    said = []
    if not table["evidence"].any():
        said.append(_none(table, confidence))
    for level, rows in table.groupby("level", sort=False):
        if rows["evidence"].any():
            said.append(f"{_over(rows)}: {_found(rows)}.")
        elif table["evidence"].any():
            said.append(f"{_over(rows)}: no metric better than chance ({_best(rows)}).")
        said += _unsure(str(level), rows, reliability)
    layers = int(table["layers"].min())
    if layers < 10 and {*table["level"]} == {"layer"}:
        said.append(
            f"{layers} layers tell little: lisa-ablate --by kind compares the modules within them."
        )
    if runs < 3:
        said.append(
            f"{'One run says' if runs == 1 else 'Two runs say'} nothing of other seeds or tasks."
        )
    if strange:
        which = ", ".join(strange)
        said.append(f"Left out, having none of the layers or modules that were ablated: {which}.")
    return " ".join(said)


def _none(table: pd.DataFrame, confidence: float) -> str:
    parts = [
        f"{_over(rows).lower()} {_best(rows)}" for _, rows in table.groupby("level", sort=False)
    ]
    metrics = table.groupby(["metric", "source"]).ngroups
    what = "No metric predicts" if metrics > 1 else f"{table['metric'].iloc[0]} does not predict"
    return (
        f"{what} what the layers were worth better than chance at {confidence:.0%}"
        f"{f' ({metrics} were tried)' if metrics > 1 else ''}: {'; '.join(parts)}."
    )


def _over(rows: pd.DataFrame) -> str:
    """What was ranked."""
    least, kinds = int(rows["layers"].min()), int(rows["kinds"].min())
    most, all_kinds = (  # a table of an earlier version has neither
        int(rows[f"{name}_at_most" if f"{name}_at_most" in rows else name].max())
        for name in ("layers", "kinds")
    )
    level = rows["level"].iloc[0]
    if level == "layer":
        return f"Over {_reach(least, most)} layers"
    if level == "module":
        return f"Over {_reach(least * kinds, most * all_kinds)} modules"
    return f"Over {_reach(least, most)} layers within {_reach(kinds, all_kinds)} kinds"


def _reach(least: int, most: int) -> str:
    """Return ``6``, or ``6 to 30`` over runs of several models."""
    return f"{least}" if least == most else f"{least} to {most}"


def _best(rows: pd.DataFrame) -> str:
    """The best agreement, and what one metric alone would need."""
    best = rows.iloc[int(rows["spearman"].abs().to_numpy().argmax())]
    need = best["chance"]
    needed = f", {need:.2f} needed of one alone" if np.isfinite(need) else ""
    return f"the best is {_name(best)} with ρ = {_number(best)}{needed}"


def _found(rows: pd.DataFrame) -> str:
    """Metrics with evidence, per target, the surest first."""
    parts = []
    for target, of in rows[rows["evidence"]].groupby("target", sort=False):
        of = of.sort_values("spearman", key=np.abs, ascending=False)
        names = [f"{_name(row)} (ρ = {_number(row)})" for _, row in of.head(3).iterrows()]
        more = f" and {len(of) - 3} more" if len(of) > 3 else ""
        verb = "predicts" if len(of) == 1 else "predict"
        ceiling = float(of["ceiling"].max())
        limit = (
            f"; noise would leave {ceiling:.2f} of a perfect agreement" if ceiling < 0.995 else ""
        )
        parts.append(f"{', '.join(names)}{more} {verb} {WORTH[str(target)]}{limit}")
    return "; ".join(parts)


def _unsure(
    level: str, rows: pd.DataFrame, reliability: Mapping[tuple[str, str], float]
) -> list[str]:
    """Say of which target the order itself is not known, and what that means for the others."""
    poor, found = [], False
    for target, of in rows.groupby("target", sort=False):
        value = reliability.get((level, str(target)), float("nan"))
        if np.isfinite(value) and value < TELLING:
            poor.append(f"{str(target).removeprefix('ablation_')} ({value:.2f})")
            found |= bool(of["evidence"].any())
    if not poor:
        return []
    so = "a metric that shows no agreement may have one" if found else (
        "no metric could be seen to agree"
    )  # fmt: skip
    return [
        f"{_over(rows)} the examples hardly tell the order of {' and '.join(poor)} itself "
        f"(reliability in brackets): {so}; ablate with more examples."
    ]


def _name(row: pd.Series) -> str:
    return f"{row['metric']} of {row['source']}" if row["source"] else str(row["metric"])


def _number(row: pd.Series) -> str:
    text = f"{row['spearman']:.2f}"
    if np.isfinite(row["low"]):
        text += f" [{row['low']:.2f}, {row['high']:.2f}]"
    return text.replace("-", "−")
