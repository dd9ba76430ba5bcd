"""Tables and figures of the study, from the kept logs alone."""

import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages import markdown, write_tables
from plan import ALONE, HERE, LAYERS, METHODS, SEEDS, TASKS, cells
from priors import priors

import lisa_analysis as la
from lisa_analysis.profiles.agreement import agree
from lisa_analysis.views.plots import style

RUNS = HERE / "runs"
TARGETS = {"ablation_keep": "alone (keep)", "ablation_reset": "missed (reset)"}
# The level that a task is judged at: six layers can give no evidence.
LEVELS = {"parts-of-speech": "module", "chitchat": "layer", "definitions": "layer"}
SHORT = {"parts-of-speech": "parts of speech", "chitchat": "chit-chat"}
ALONE_TASK, ALONE_METRIC = "parts-of-speech", "trained_alone"

Key = tuple[str, str]  # task and method
Row = dict[str, object]


def analyse() -> None:
    """Write the page's tables and both figures."""
    runs = {(t, m): _kept(t, m) for t in TASKS for m in METHODS}
    runs = {key: found for key, found in runs.items() if found}
    alone, gains = _alone()
    found = {}
    for key, own in runs.items():
        beside = [alone] if alone is not None and key[0] == ALONE_TASK else []
        found[key] = la.validity([*own, *_probes(key[0]), *priors(key[0]), *beside])
    worth = {(key, t): _over_seeds(own, t) for key, own in runs.items() for t in TARGETS}
    tables = {
        "runs": _runs(runs),
        "orders": _orders(runs, found, worth),
        "best": _best(found),
        "keep": _metrics(found, "ablation_keep"),
        "reset": _metrics(found, "ablation_reset"),
        "within": _metrics(found, "ablation_keep", "within kind"),
        "general": _general(found),
        "between": _between(worth),
        "alone": gains,
        "agreement": _agreement(found),
    }
    write_tables(HERE / "README.md", {
        name: markdown(rows) if rows else "Not run yet." for name, rows in tables.items()
    })  # fmt: skip
    _draw_metrics(found, HERE / "metrics.png")
    _draw_worth(worth, alone, HERE / "worth.png")


def _kept(task: str, what: str) -> list[la.Run]:
    folders = [RUNS / task / what / f"s{seed}" for seed in SEEDS]
    return [la.load(folder) for folder in folders if folder.exists()]


def _probes(task: str) -> list[la.Run]:
    return _kept(task, "probe")


def _over_seeds(runs: Sequence[la.Run], metric: str) -> la.ImportanceProfile:
    return la.importance(list(runs) if len(runs) > 1 else runs[0], metric)


def _runs(runs: Mapping[Key, list[la.Run]]) -> list[Row]:
    """What was run of the plan, and what training did."""
    rows: list[Row] = []
    for task, words in TASKS.items():
        for method in METHODS:
            results = [run.manifest["result"] for run in runs.get((task, method), [])]
            row: Row = {"task": words, "method": method, "seeds": f"{len(results)} of {len(SEEDS)}",
                        "held-out loss before": "", "after": "", "accuracy": ""}  # fmt: skip
            if results:
                row["held-out loss before"] = _mean(r["first_held_out_loss"] for r in results)
                row["after"] = _mean(r["last_held_out_loss"] for r in results)
                scores = [r.get("last_held_out_scores") or {} for r in results]
                if all("accuracy" in s for s in scores):
                    row["accuracy"] = _mean(s["accuracy"] for s in scores)
            rows.append(row)
    kept = sum((RUNS / cell.name).exists() for cell in cells())
    rows.append({**dict.fromkeys(rows[0], ""), "task": "all cells of the plan, probes and layers "
                 "alone too", "seeds": f"{kept} of {len(cells())}"})  # fmt: skip
    return rows


def _mean(values: object) -> str:
    return f"{np.mean(list(values)):.3f}"  # type: ignore[call-overload]


def _orders(
    runs: Mapping[Key, list[la.Run]], found: Mapping[Key, la.Validity],
    worth: Mapping[tuple[Key, str], la.ImportanceProfile],
) -> list[Row]:  # fmt: skip
    """How well each order is known: within a run by its examples, and between seeds."""
    rows: list[Row] = []
    for (task, method), own in runs.items():
        for target, words in TARGETS.items():
            profile = worth[(task, method), target]
            known = found[task, method].reliability
            seeds = "" if profile.seeds is None else _range(
                profile.seeds.kendall, profile.seeds.kendall_low, profile.seeds.kendall_high
            )  # fmt: skip
            scores = profile.scores
            first = np.argsort(-scores)[: 6 if LAYERS[task] > 6 else 3]
            rows.append({
                "task": SHORT.get(task, task), "method": method, "asked": words,
                "sum over layers, nats": f"{np.nansum(scores):+.3f}",
                "reliability, layers": f"{known.get(('layer', target), np.nan):.2f}",
                "modules": _number(known.get(("module", target), np.nan)),
                "τ between seeds": seeds if len(own) > 1 else "one seed",
                "largest": ", ".join(f"{i} ({scores[i]:+.3f})" for i in first),
            })  # fmt: skip
    return rows


def _number(value: float) -> str:
    return f"{value:.2f}" if np.isfinite(value) else ""


def _range(value: float, low: float, high: float) -> str:
    return f"{value:.2f} ({low:.2f} … {high:.2f})"


def _name(row: Mapping[str, object]) -> str:
    """A metric, and that the probe gave it: every other lender is a table of priors."""
    return f"{row['metric']} (probe)" if row["source"] not in ("", "a profile") else str(
        row["metric"]
    )  # fmt: skip


def _judged(found: la.Validity, task: str, target: str, level: str = "") -> list[dict[str, object]]:
    """Rows of the level that the task is judged at, or of another."""
    frame = found.to_frame()
    frame = frame[(frame["level"] == (level or LEVELS[task])) & (frame["target"] == target)]
    frame = frame[frame["metric"] != ALONE_METRIC]
    return frame.to_dict("records")


def _best(found: Mapping[Key, la.Validity]) -> list[Row]:
    """The best metric of every cell, and what it takes."""
    rows: list[Row] = []
    for (task, method), one in found.items():
        for target, words in TARGETS.items():
            judged = sorted(_judged(one, task, target), key=lambda r: -abs(r["spearman"]))
            if not judged:
                continue
            best = judged[0]
            sure = [r for r in judged if r["evidence"]]
            rows.append({
                "task": SHORT.get(task, task), "method": method, "asked": words,
                "judged over": f"{best['layers'] * best['kinds']} {LEVELS[task]}s",
                "best": _name(best), "ρ": _agreement_words(best),
                "ceiling": f"{best['ceiling']:.2f}", "one alone needs": f"{best['chance']:.2f}",
                "with evidence": f"{len(sure)} of {len(judged)}",
            })  # fmt: skip
    return rows


def _agreement_words(row: Mapping[str, object]) -> str:
    text = f"{row['spearman']:+.2f}"
    if np.isfinite(row["low"]):  # type: ignore[call-overload]
        text += f" ({row['low']:+.2f} … {row['high']:+.2f})"
    return text


def _metrics(found: Mapping[Key, la.Validity], target: str, level: str = "") -> list[Row]:
    """ρ of every metric in every cell; bold is evidence."""
    columns = {key: {_name(r): r for r in _judged(one, key[0], target, level)}
               for key, one in found.items()}  # fmt: skip
    columns = {key: column for key, column in columns.items() if column}
    names = _ordered(columns)
    return [
        {"metric": name} | {
            f"{SHORT.get(task, task)}, {method}": _cell(column.get(name))
            for (task, method), column in columns.items()
        }
        for name in names
    ]  # fmt: skip


def _ordered(columns: Mapping[Key, Mapping[str, Mapping[str, object]]]) -> list[str]:
    """Names of metrics by their mean ρ."""
    values: dict[str, list[float]] = {}
    for column in columns.values():
        for name, row in column.items():
            values.setdefault(name, []).append(float(row["spearman"]))  # type: ignore[arg-type]
    return sorted(values, key=lambda name: -float(np.mean(values[name])))


def _cell(row: Mapping[str, object] | None) -> str:
    if row is None:
        return ""
    text = f"{row['spearman']:+.2f}"
    return f"**{text}**" if row["evidence"] else text


def _general(found: Mapping[Key, la.Validity]) -> list[Row]:
    """In how many cells a metric has evidence, of which sign."""
    rows: list[Row] = []
    for target, words in TARGETS.items():
        counts: dict[str, list[int]] = {}
        for (task, _), one in found.items():
            for row in _judged(one, task, target):
                tally = counts.setdefault(_name(row), [0, 0, 0])
                tally[0] += 1
                if row["evidence"]:
                    tally[1 if row["spearman"] > 0 else 2] += 1
        for name, (cells_, up, down) in sorted(counts.items(), key=lambda c: (-c[1][1], c[0])):
            if up or down:
                rows.append({
                    "asked": words, "metric": name, "cells with it": cells_,
                    "evidence, same order": up, "evidence, opposite order": down,
                    "in general": "**yes**" if max(up, down) == cells_ == len(found) else "no",
                })  # fmt: skip
    return rows


def _between(worth: Mapping[tuple[Key, str], la.ImportanceProfile]) -> list[Row]:
    """Whether runs of other methods and tasks give the layers the same worth."""
    rows: list[Row] = []
    keys = list(dict.fromkeys(key for key, _ in worth))
    for a, b in combinations(keys, 2):
        same_model = LAYERS[a[0]] == LAYERS[b[0]]
        if not same_model or (a[0] != b[0] and a[1] != b[1]):
            continue
        row: Row = {"between": " and ".join(f"{SHORT.get(t, t)} {m}" for t, m in (a, b))}
        for target, words in TARGETS.items():
            one = agree(worth[a, target], worth[b, target])
            row[f"ρ, {words}"] = f"{one.spearman:+.2f}"
        rows.append(row)
    return rows


def _alone() -> tuple[la.ImportanceProfile | None, list[Row]]:
    """C(k) over seeds: loss of the head alone less that with one layer."""
    losses = {what: {int(run.path.name[1:]): run.manifest["result"]["last_held_out_loss"]
                     for run in _kept(ALONE_TASK, f"alone-{what}")} for what in ALONE}  # fmt: skip
    whole = [s for s in SEEDS if all(s in losses[what] for what in ALONE)]
    if not whole:
        return None, []
    layers = ALONE[1:]
    gains = [[losses["head"][s] - losses[k][s] for k in layers] for s in whole]
    names = list(_kept(ALONE_TASK, METHODS[0])[0].layer_names)
    profile = la.ImportanceProfile.from_scores(
        gains if len(gains) > 1 else gains[0], names, metric=ALONE_METRIC,
        definition="Held-out loss of the head trained alone, less that with this layer.",
    )  # fmt: skip
    rows: list[Row] = [
        {"trained": "head alone" if what == "head" else f"layer {what} and head"}
        | {f"loss, seed {s}": f"{losses[what][s]:.3f}" for s in whole}
        | {"C(k), mean": "" if what == "head" else f"{np.mean([g[int(what)] for g in gains]):+.3f}"}
        for what in ALONE
    ]
    return profile, rows


def _agreement(found: Mapping[Key, la.Validity]) -> list[Row]:
    """C(k) beside the ablation of every method: the one comparison that was planned."""
    rows: list[Row] = []
    for (task, method), one in found.items():
        frame = one.to_frame()
        frame = frame[(frame["metric"] == ALONE_METRIC) & (frame["level"] == "layer")]
        rows += [
            {
                "task": SHORT.get(task, task), "method": method, "asked": TARGETS[row["target"]],
                "ρ": _agreement_words(row), "chance of |ρ| as large": f"{row['p']:.3f}",
            }
            for row in frame.to_dict("records")
        ]  # fmt: skip
    return rows


def _draw_metrics(found: Mapping[Key, la.Validity], file: Path) -> None:
    """One column of marks per cell and target, one row per metric; filled is evidence."""
    columns = {
        key: {_name(r): r for r in _judged(one, key[0], "ablation_keep")}
        for key, one in found.items()
    }
    names = _ordered(columns)[::-1]
    figure = Figure(figsize=(8.6, 1.4 + 0.27 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(TARGETS), sharey=True)
    for ax, (target, words) in zip(axes, TARGETS.items(), strict=True):
        for position, (key, one) in enumerate(found.items()):
            color, _, marker = style.look(position)
            rows = {_name(r): r for r in _judged(one, key[0], target)}
            label = f"{SHORT.get(key[0], key[0])}, {key[1]}"
            for name, row in rows.items():
                fill = color if row["evidence"] else "none"
                ax.plot(row["spearman"], names.index(name), marker, color=color, mfc=fill, ms=5)
            ax.plot([], [], marker, color=color, ms=5, label=label)
        ax.axvline(0, color=style.MUTED, linewidth=0.9)
        ax.set_xlim(-1.05, 1.05)
        ax.set_title(words, fontsize=10)
        ax.set_xlabel("ρ with the ablation; filled is evidence")
        style.finish(ax, grid="x")
    axes[0].set_yticks(range(len(names)), names)
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=130, metadata={"Software": None})


def _draw_worth(
    worth: Mapping[tuple[Key, str], la.ImportanceProfile], alone: la.ImportanceProfile | None,
    file: Path,
) -> None:  # fmt: skip
    """What the layers were worth, as a mean over seeds; beside it what one alone reaches."""
    tasks = [task for task in TASKS if any(key[0] == task for key, _ in worth)]
    figure = Figure(figsize=(8.6, 2.5 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(TARGETS), squeeze=False)
    for axes, task in zip(grid, tasks, strict=True):
        for ax, (target, words) in zip(axes, TARGETS.items(), strict=True):
            for position, method in enumerate(METHODS):
                profile = worth.get(((task, method), target))
                if profile is not None:
                    color, dashes, marker = style.look(position)
                    ax.plot(profile.scores, color=color, linestyle=dashes, marker=marker, ms=3.5,
                            label=method)  # fmt: skip
            if task == ALONE_TASK and alone is not None:
                right = ax.twinx()  # several times as much: a size of its own
                right.plot(alone.scores, color=style.MUTED, marker="x", ms=4)
                right.set_ylabel("C(k), nats (×)", color=style.MUTED)
                right.set_ylim(0, None)
            ax.axhline(0, color=style.MUTED, linewidth=0.8)
            ax.set_title(f"{TASKS[task]}: {words}", fontsize=9)
            ax.set_xlabel("layer")
            ax.set_ylabel("nats per label")
            style.finish(ax)
            ax.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130, metadata={"Software": None})
