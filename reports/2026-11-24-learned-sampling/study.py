"""Does sampling layers by a profile lower the loss? Uniform, learned, permuted; one command.

python reports/2026-11-24-learned-sampling/study.py            tables and figure from the logs
python reports/2026-11-24-learned-sampling/study.py --fresh    train all runs again first
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pages import markdown, write_tables
from training import train_all

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.views.plots import style

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"
PILOT = HERE.parent / "2026-11-23-skew" / "runs" / "lora-1"
ARMS = ("uniform", "learned", "permuted")
SEEDS = (1, 2, 3, 4)


def main() -> int:
    """Train what is missing, then write tables and figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--fresh", action="store_true", help="train everything again")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/learned-sampling"), help="where training writes"
    )
    arguments = parser.parse_args()
    if arguments.fresh:
        shutil.rmtree(RUNS, ignore_errors=True)
    try:
        if not all((RUNS / f"{arm}-{seed}").exists() for arm in ARMS for seed in SEEDS):
            arguments.work.mkdir(parents=True, exist_ok=True)
            train_all(commands(arguments.work), RUNS, arguments.work, jobs=arguments.jobs)
        analyse()
    except LisaError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


def commands(work: Path) -> dict[str, list[str]]:
    """Words of every run's command line; every seed has a permutation of its own."""
    profile = la.importance(la.load(PILOT), "grad_rms")
    found = {}
    for seed in SEEDS:
        for arm in ARMS:
            # When this was run so short a pilot gave no intervals: scores are taken as they are.
            probabilities = la.sampling_probabilities(
                profile, 2, use_intervals=False, seed=seed,
                control=None if arm == "learned" else arm,
            )  # fmt: skip
            file = probabilities.save(work / f"{arm}-{seed}.json")
            found[f"{arm}-{seed}"] = [
                "--config", str(HERE / "settings.yaml"), f"--seed={seed}",
                f"--lisa.probabilities={file}",
            ]  # fmt: skip
    return found


def analyse() -> None:
    """Write the tables and the figure from the run directories alone."""
    runs = {arm: [la.load(RUNS / f"{arm}-{seed}") for seed in SEEDS] for arm in ARMS}
    # Found from the content of what was sampled, not told: the arms are to be those of the names.
    comparison = la.compare([run for group in runs.values() for run in group])
    table = comparison.table.set_index("run")
    found = {arm: table.loc[[f"{arm}-{seed}" for seed in SEEDS]] for arm in ARMS}
    if any((rows["arm"] != arm).any() for arm, rows in found.items()):
        raise LisaError(f"{RUNS} does not hold the arms {', '.join(ARMS)}: train again, --fresh.")
    losses = {arm: rows["loss_at_equal_steps"].to_numpy(float) for arm, rows in found.items()}
    write_tables(
        HERE / "README.md",
        {
            "losses": markdown(_losses(losses, comparison)),
            "differences": markdown(_differences(comparison)),
            "visits": markdown(_visits(runs)),
        },
    )
    _draw(losses, HERE / "losses.png")


def _losses(losses: dict[str, np.ndarray], comparison: la.Comparison) -> list[dict[str, object]]:
    means = comparison.arms.set_index("arm")["mean"]
    return [
        {
            "probabilities": arm,
            **{f"seed {seed}": f"{x:.4f}" for seed, x in zip(SEEDS, values, strict=True)},
            "mean": f"{means[arm]:.4f}",
        }
        for arm, values in losses.items()
    ]


def _differences(comparison: la.Comparison) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for a, b in (("learned", "uniform"), ("learned", "permuted"), ("permuted", "uniform")):
        found = comparison.difference(a, b)
        mean, low, high = (f"{found[name]:+.4f}" for name in ("mean", "low", "high"))
        rows.append(
            {
                "difference": f"{a} − {b}",
                "mean (95 %)": f"{mean} ({low} … {high})",
                "lower in": f"{found['lower']} of {found['pairs']}",
                "verdict": _verdict(found["low"], found["high"]),
            }
        )
    return rows


def _verdict(low: float, high: float) -> str:
    if high < 0:
        return "**lower**"
    return "**higher**" if low > 0 else "no difference shown"


def _visits(runs: dict[str, list[la.Run]]) -> list[dict[str, object]]:
    """Whether the schedules did what the probabilities say."""
    rows = []
    for arm, group in runs.items():
        worst, unseen, ends = 0.0, 0, []
        for run in group:
            draws = run.events[run.events["event"] == "lisa_draw"]
            visits = np.array(draws["visits"].iloc[-1])
            expected = np.array(draws["inclusion_probabilities"].iloc[-1]) * len(draws)
            worst = max(worst, float(np.abs(visits - expected).max()))
            unseen += int((visits == 0).sum())
            ends.append(visits[[0, 1, 2, 11, 29]].sum() / visits.sum())
        rows.append(
            {
                "probabilities": arm,
                "visits in layers 0, 1, 2, 11, 29": f"{np.mean(ends):.0%}",
                "largest difference from expected": f"{worst:.1f}",
                "layers never drawn": unseen,
            }
        )
    return rows


def _draw(losses: dict[str, np.ndarray], file: Path) -> None:
    """One line per seed: what the choice of layers changes beside what the seed changes."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    ax = figure.subplots()
    for position, seed in enumerate(SEEDS):
        color, dashes, marker = style.look(position)
        ax.plot(
            range(len(ARMS)), [losses[arm][position] for arm in ARMS], color=color,
            linestyle=dashes, marker=marker, label=f"seed {seed}",
        )  # fmt: skip
    ax.set_xticks(range(len(ARMS)), ARMS)
    ax.set_ylabel("held-out loss after training")
    style.finish(ax)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    sys.exit(main())
