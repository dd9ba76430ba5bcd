"""An ablation as text: losses before and after, gain against forgetting per unit, and the cost."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lisa_train.command.ablate_run import Ablation
    from lisa_train.measure.ablation.summary import Summary, UnitEffects


def in_words(ablation: "Ablation") -> str:
    """Return what `lisa-ablate` prints."""
    summary = ablation.summary
    parts = [*losses_in_words(summary), "", *_table(summary), "", *_conclusions(summary)]
    return "\n".join([*parts, _cost(ablation), f"Losses per example: {ablation.path}"])


def losses_in_words(summary: "Summary") -> list[str]:
    """Say what training did on both sets."""
    said = []
    for name, what, change, word in (
        ("held_out", "held-out", summary.gain, "gain"),
        ("general", "general", summary.forgetting, "forgetting"),
    ):
        if change is None:
            continue
        before, after = summary.losses[name]
        about = summary.data[name]
        said.append(
            f"{what} loss {before:.4f} → {after:.4f}, {word} {change} nats per label "
            f"({about['examples']} of {about['available']} examples, {about['tokens']:,} labels)"
        )
    return said


def _table(summary: "Summary") -> list[str]:
    """One line a unit; ± is half of the 95 % interval over examples."""
    forgetting = summary.forgetting is not None
    head = ["unit", "taken out costs", "alone gains"]
    head += ["forgetting of it", ""] if forgetting else [""]
    rows = [head] + [_row(unit, forgetting) for unit in summary.units]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _row(unit: "UnitEffects", forgetting: bool) -> list[str]:
    if not unit.unit.parts:
        return [str(unit.unit), "unchanged", *[""] * (3 if forgetting else 2)]
    cells = [str(unit.unit), str(unit.reset), str(unit.keep)]
    if forgetting:
        cells.append("" if unit.forgetting is None else str(unit.forgetting))
    return [*cells, "put back?" if unit.costs_without_gain else ""]


def _conclusions(summary: "Summary") -> list[str]:
    said = []
    layers = [u for u in summary.units if u.unit.kind is None and "-" not in u.unit.name]
    if layers:
        out, alone = (sum(e.value for e in es) for es in zip(
            *((u.reset, u.keep) for u in layers), strict=True
        ))  # fmt: skip
        said.append(
            f"Taken out one at a time the units cost {out:.4f} together, alone they gain "
            f"{alone:.4f}; all of them gain {summary.gain.value:.4f}: what the two sums differ by, "
            "layers do for each other."
        )
    measured = summary.data["held_out"]
    more = min(4 * measured["examples"], measured["available"])
    advice = f" (--max_examples {more})" if more > measured["examples"] else ""
    said.append(
        f"{measured['examples']} examples tell a unit's worth to ± {summary.precision:.4f} nats "
        f"per label (median); four times as many would halve that{advice}."
    )
    if summary.proposed:
        words = ",".join(summary.proposed)
        said.append(
            f"Layers that surely cost more on general text than they can help here: {words}. Each "
            "was taken out by itself; what they do together --restore measures before it writes: "
            f"--restore {words} --output DIR (or --restore auto)."
        )
    elif summary.forgetting is not None:
        said.append(
            "No layer surely costs more on general text than it can help here: none to put back."
        )
    return said


def _cost(ablation: "Ablation") -> str:
    cost = ablation.cost
    if not cost.passes:
        return "Everything was measured before; no pass was made."
    a_pass = cost.whole_seconds / cost.whole if cost.whole else float("nan")
    whole = f", as long as {cost.seconds / a_pass:.1f} whole passes" if a_pass > 0 else ""
    return (
        f"{cost.passes:.1f} passes in {cost.seconds:.0f} s{whole} "
        f"(one by one, without reuse: {ablation.naive:.0f})"
    )
