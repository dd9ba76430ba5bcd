"""Tables and figure of the page, from the kept logs alone."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from plan import SEEDS, Plan

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from differences import Losses, difference
from pages import markdown

import lisa_analysis as la
from lisa_analysis.statistics.repetitions import MIN_SEEDS, mean_over

MISSING = "not yet"
FIRST = 2  # steps of a timed run that do not count: caches fill
COSTS = ("weights that train, M", "seconds a step", "peak memory, GB")
BESIDE = {  # what a method's loss is compared with, within seeds: heading
    "full": "less full (95 %)",
    "lisa": "less LISA (95 %)",
}
METRICS = {  # of a task: name in the log, in words, decimals
    "pos": ("eval_accuracy", "accuracy", 3),
    "fashion": ("eval_accuracy", "accuracy", 3),
    "voice": ("eval_word_error_rate", "word error rate", 3),
}
NAMES = {  # in the order of the figure
    "full": "full", "lisa": "LISA", "lora": "LoRA", "ia3": "IA³", "bitfit": "select: BitFit",
    "last": "select: last layers", "probe": "select: top of the probe",
    "random": "select: random layers", "prompt": "prompt", "head": "head alone",
}  # fmt: skip


def tables(plans: Sequence[Plan]) -> dict[str, str]:
    """Return every table of the page by its mark."""
    found = {
        "state": [_state(plan) for plan in plans],
        "results": [row for plan in plans for row in _results(plan)],
        "rates": [row for plan in plans for row in _rates(plan)],
    }
    return {name: markdown(rows) for name, rows in found.items()}


def _state(plan: Plan) -> dict[str, object]:
    cells = plan.cells()
    finished = sum((plan.kept / cell.name).exists() for cell in cells)
    timed = sum((plan.kept / plan.timed(m).name).exists() for m in plan.methods.values())
    return {
        "task": plan.task.name,
        "methods with a rate": f"{_settled(plan)} of {len(plan.methods)}",
        "runs finished": f"{finished} of {len(cells)} known so far",
        "timed": f"{timed} of {len(plan.methods)}",
    }


def _settled(plan: Plan) -> int:
    return sum(plan.rate(method) is not None for method in plan.methods.values())


def outcomes(plan: Plan, name: str, metric: str, *, before: bool = False) -> Losses:
    """Return the last held-out value of a metric, or the first, by seed, of the runs there are."""
    found = {}
    for seed in SEEDS:
        folder = plan.kept / plan.cell(plan.methods[name], seed).name
        if folder.exists():
            events = la.load(folder).events
            measured = events[events["event"] == "evaluate"]["metrics"]
            found[seed] = float(measured.iloc[0 if before else -1][metric])
    return found


def _results(plan: Plan) -> list[dict[str, object]]:
    rows = []
    others = {name: outcomes(plan, name, "eval_loss") for name in BESIDE}
    for name, method in plan.methods.items():
        losses = outcomes(plan, name, "eval_loss")
        row: dict[str, object] = {
            "task": plan.task.name,
            "method": NAMES[name],
            "held-out loss (95 %)": _with_interval(losses, 3),
        }
        for other, found in others.items():
            apart = difference(losses, found) or MISSING
            row[BESIDE[other]] = "" if name == other else apart
        rows.append(row | _metric(plan, name) | _costs(plan, plan.timed(method).name))
    start = outcomes(plan, "full", "eval_loss", before=True)
    first: dict[str, object] = {
        "task": plan.task.name,
        "method": "before training",
        "held-out loss (95 %)": _with_interval(start, 3),
    } | dict.fromkeys(BESIDE.values(), "")
    return [first | _metric(plan, "full", before=True) | dict.fromkeys(COSTS, ""), *rows]


def _metric(plan: Plan, name: str, *, before: bool = False) -> dict[str, object]:
    if (given := METRICS.get(plan.task.name)) is None:
        return {"task's metric": ""}
    metric, words, digits = given
    values = outcomes(plan, name, metric, before=before)
    return {"task's metric": f"{words} {_with_interval(values, digits)}"}


def _with_interval(values: Losses, digits: int) -> str:
    if len(values) < MIN_SEEDS:
        return MISSING
    mean = mean_over(np.array(list(values.values())))
    return f"{mean.value:.{digits}f} ({mean.low:.{digits}f} … {mean.high:.{digits}f})"


def _costs(plan: Plan, name: str) -> dict[str, object]:
    """What a step takes with the machine to itself, and what the process held at most."""
    if not (plan.kept / name).exists():
        return dict.fromkeys(COSTS, MISSING)
    run = la.load(plan.kept / name)
    memory = run.manifest["result"]["peak_memory_bytes"]
    trained = run.manifest["model"]["trainable_parameters"]
    draws = run.events[run.events["event"] == "lisa_draw"]
    if len(draws):  # LISA: at a time
        trained *= float(draws["trainable_share"].mean())
    seconds = run.scalars["step_seconds"].iloc[FIRST:].mean()
    values = (f"{trained / 1e6:.3g}", f"{seconds:.2f}", f"{memory / 1e9:.2f}")
    return dict(zip(COSTS, values, strict=True))


def _rates(plan: Plan) -> list[dict[str, object]]:
    rows = []
    for name, method in plan.methods.items():
        grid = plan.tried(method)
        losses = plan.losses(method, grid)
        said: dict[str, object] = {"chosen": MISSING, "tuning losses": ""}
        if losses is not None:
            chosen = plan.rate(method)
            edge = " (edge of the grid)" if chosen in (grid[0], grid[-1]) else ""
            each = ", ".join(f"{rate:.3g}: {losses[rate]:.4f}" for rate in grid)
            said = {"chosen": f"{chosen:.3g}{edge}", "tuning losses": each}
        rows.append({"task": plan.task.name, "method": NAMES[name], **said})
    return rows


def draw(plans: Sequence[Plan], path: Path) -> None:
    """Draw held-out losses, one panel a task; bars are Student's, over seeds.

    Where no method has runs of every seed yet, nothing is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = {plan.task.name: _points(plan) for plan in plans}
    shown = {name: found for name, found in points.items() if found}
    if not shown:
        return
    order = list(reversed(NAMES.values()))
    figure, axes = plt.subplots(
        1, len(shown), figsize=(2.2 + 2.4 * len(shown), 3.4), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis, (name, found) in zip(axes[0], shown.items(), strict=True):
        axis.axvline(found["full"][0] if "full" in found else np.nan, color="0.8", zorder=0)
        for label, (mean, low, high) in found.items():
            axis.errorbar(
                mean, order.index(label), xerr=[[mean - low], [high - mean]], fmt="o", capsize=2,
                color="tab:red" if label == "LISA" else "tab:blue",
            )  # fmt: skip
        axis.set(title=name, xlabel="held-out loss, nats", yticks=range(len(order)))
        axis.set_yticklabels(order)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _points(plan: Plan) -> dict[str, tuple[float, float, float]]:
    """Mean loss and its interval, of the methods that have runs of every seed."""
    found = {}
    for name in plan.methods:
        losses = outcomes(plan, name, "eval_loss")
        if len(losses) == len(SEEDS):
            mean = mean_over(np.array(list(losses.values())))
            found[NAMES[name]] = (mean.value, mean.low, mean.high)
    return found
