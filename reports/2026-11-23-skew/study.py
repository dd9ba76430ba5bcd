"""Is the bottom/top skew there, and was it learned? Nine runs, one command.

python reports/2026-11-23-skew/study.py            tables, figure and report from the kept logs
python reports/2026-11-23-skew/study.py --fresh    train all nine runs again first
"""

import argparse
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import draw
from pages import markdown, write_tables
from training import train_all

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.profiles.across_seeds import over_seeds
from lisa_analysis.statistics.over_seeds import seed_means
from lisa_analysis.statistics.repetitions import Mean, mean_over

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"
SEEDS = (1, 2, 3)
# Learning rates of the usual size for each method; LISA as in the paper, with two layers of 30.
TRAINING = {
    "lora": ["--learning_rate=1e-3"],
    "full": ["--learning_rate=5e-5"],
    "lisa": ["--learning_rate=2e-4", "--lisa.activated_layers=2", "--lisa.interval_steps=4"],
}
METHODS = {"lora": "LoRA", "full": "full fine-tuning", "lisa": "LISA"}
METRICS = {
    "weight_norm": "mean weight norm (the paper's)",
    "grad_rms": "gradient RMS",
    "l1_descent": "L1 descent",
    "update_ratio": "update over weight, per step",
    "delta_rel": "‖ΔW‖/‖W₀‖ at the end",
}
Profiles = dict[str, list[la.ImportanceProfile]]


def main() -> int:
    """Train what is missing, then write tables, figure and report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--fresh", action="store_true", help="discard the kept logs and train again"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/skew"), help="where training writes"
    )
    arguments = parser.parse_args()
    if arguments.fresh:
        shutil.rmtree(RUNS, ignore_errors=True)
    settings = str(HERE / "settings.yaml")
    runs = {
        f"{method}-{seed}": ["--config", method, "--config", settings, f"--seed={seed}", *words]
        for seed in SEEDS
        for method, words in TRAINING.items()
    }
    try:
        train_all(runs, RUNS, arguments.work, jobs=arguments.jobs)
        analyse()
    except LisaError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


def analyse() -> None:
    """Write everything that the study shows, from the run directories alone."""
    runs = {m: [la.load(RUNS / f"{m}-{seed}") for seed in SEEDS] for m in METHODS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that LISA never drew: they are unknown
        profiles = {
            metric: {m: [la.importance(run, metric) for run in group] for m, group in runs.items()}
            for metric in METRICS
        }
        tables = {
            "setting": setting(runs),
            "losses": losses(runs),
            "initialisation": initialisation(profiles),
            "skew": skew(profiles),
            "embedding": embedding(profiles),
            "layers": layers(profiles),
            "agreement": agreement(runs, profiles),
            "seeds": between_seeds(profiles),
            "within": within_runs(profiles),
        }
        draw.profiles(
            {METRICS[m]: profiles[m] for m in ("weight_norm", "grad_rms", "delta_rel")},
            METHODS, HERE / "profiles.png",
        )  # fmt: skip
        la.report([run for group in runs.values() for run in group]).save(HERE / "report.html")
    write_tables(HERE / "README.md", tables)


def setting(runs: dict[str, list[la.Run]]) -> str:
    """What was trained, as the run directories tell it."""
    manifest = runs["full"][0].manifest
    hardware, versions = manifest["hardware"], manifest["versions"]
    scalars = runs["full"][0].scalars
    return (
        f"Model {manifest['model']['name']} ({len(manifest['layers'])} layers, "
        f"{manifest['model']['parameters'] / 1e6:.1f} M parameters, {manifest['model']['dtype']}), "
        f"data {manifest['dataset']['name']}, {int(scalars['step'].max())} steps, "
        f"{float(scalars['tokens'].max()) / scalars['step'].max():.0f} tokens a step. "
        f"{hardware['device']} ({hardware['name']}), {hardware['threads']} thread(s) a run; "
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"peft {versions['peft']}."
    )


def losses(runs: dict[str, list[la.Run]]) -> str:
    """Held-out loss before and after, over seeds."""
    arms = la.compare(runs).arms.set_index("arm")
    rows = []
    for method, group in runs.items():
        first = [run.manifest["result"]["first_held_out_loss"] for run in group]
        after = arms.loc[method]
        config = next(c for c in TRAINING[method] if "learning_rate" in c)
        rows.append(
            {
                "method": METHODS[method],
                "learning rate": config.split("=")[1],
                "before": f"{np.mean(first):.3f}",
                "after (95 % over seeds)": (
                    f"{after['mean']:.3f} ({after['low']:.3f} … {after['high']:.3f})"
                ),
            }
        )
    return markdown(rows)


def initialisation(profiles: dict[str, Profiles]) -> str:
    """How much of the paper's statistic, and of the gradient, was there before training."""
    rows = []
    for method, title in METHODS.items():
        group = profiles["weight_norm"][method]
        formula = np.nanmean([p.initialisation.expected for p in group])
        start = np.nanmean([p.to_frame()["initial"] for p in group])
        level = mean_over([p.initialisation.level for p in group])
        change = np.nanmean([abs(np.log(p.scores / p.to_frame()["initial"])) for p in group])
        grads = [p.initialisation for p in profiles["grad_rms"][method]]
        shares = [i.share for i in grads if i is not None]
        rows.append(
            {
                "method": title,
                "norm by PEFT's formula": f"{formula:.3g}" if np.isfinite(formula) else "",
                "norm at step 0": f"{start:.3g}",
                "mean norm in training": f"{np.nanmean([p.scores for p in group]):.3g}",
                "level there at step 0": f"{level.value:.1%}",
                "mean change of a layer": f"{np.expm1(change):.2%}",
                "gradient spread there at step 1": f"{np.mean(shares):.0%}"
                if shares
                else "unknown",
            }
        )
    return markdown(rows)


def skew(profiles: dict[str, Profiles]) -> str:
    """Ends to middle, headroom and end layers, each an interval over seeds."""
    rows = []
    for metric, title in METRICS.items():
        for method, name in METHODS.items():
            group = profiles[metric][method]
            ratio = mean_over([p.concentration.ends_to_middle.value for p in group], log=True)
            rows.append(
                {
                    "metric": title,
                    "method": name,
                    "ends over middle (95 % over seeds)": f"{ratio:.2f}",
                    "headroom": f"{np.mean([p.concentration.headroom.value for p in group]):.2f}",
                    "skew": _verdict(ratio),
                }
            )
    return markdown(rows)


def _verdict(ratio: Mean) -> str:
    """Words for a ratio of ends to middle: only beyond 5 % either way is it called a skew."""
    if ratio.low > 1.05:
        return "**ends above**"
    if ratio.high < 1 / 1.05:
        return "**ends below**"
    return "none" if ratio.high < 1.05 and ratio.low > 1 / 1.05 else "undecided"


def embedding(profiles: dict[str, Profiles]) -> str:
    """The embedding, which is the head as well in this model, over the layers' mean."""
    rows = []
    for metric, title in METRICS.items():
        row: dict[str, object] = {"metric": title}
        for method in ("full", "lisa"):
            if (metric, method) == ("delta_rel", "lisa"):
                # The embedding trained in every step, a layer in one of fifteen.
                row[METHODS[method]] = "not comparable"
                continue
            ratios = [
                float(p.outside.set_index("name").loc["embed", "score"])
                / np.exp(np.nanmean(np.log(p.scores)))
                for p in profiles[metric][method]
            ]
            row[METHODS[method]] = f"{mean_over(ratios, log=True):.2f}"
        rows.append(row)
    return markdown(rows)


def layers(profiles: dict[str, Profiles]) -> str:
    """Layers that stand out in all seeds together."""
    rows = []
    for metric in ("grad_rms", "l1_descent", "delta_rel"):
        for method, name in METHODS.items():
            above, below = _standing(profiles[metric][method])
            rows.append(
                {
                    "metric": METRICS[metric],
                    "method": name,
                    "above": _layer_list(above.head(6)),
                    "below": _layer_list(below.head(6)),
                }
            )
    return markdown(rows)


def _standing(group: Profiles) -> tuple[pd.Series, pd.Series]:
    """Layers above and below the geometric mean of all, the furthest first; all at once."""
    logs = np.log(np.stack([profile.scores for profile in group]))
    means = seed_means(logs, log=True, confidence=0.95, rng=np.random.default_rng(0))
    level = float(np.nanmean(means.effect))
    relative = pd.Series(np.exp(means.effect - level))
    above = relative[means.joint_low > level].sort_values(ascending=False)
    return above, relative[means.joint_high < level].sort_values()


def _layer_list(relative: pd.Series) -> str:
    return ", ".join(f"{layer} (×{value:.2f})" for layer, value in relative.items()) or "none"


def agreement(runs: dict[str, list[la.Run]], profiles: dict[str, Profiles]) -> str:
    """Kendall's τ between seeds of a method and between methods."""
    rows = []
    for metric in ("grad_rms", "l1_descent", "delta_rel"):
        known = [p for method in runs for p in profiles[metric][method]]
        comparison = la.compare(runs, metric, profiles=known)
        pairs, arm = comparison.rank_agreement, comparison.table.set_index("run")["arm"]
        pairs = pairs.assign(a=pairs["run_a"].map(arm), b=pairs["run_b"].map(arm))
        for (a, b), found in pairs.groupby(["a", "b"], sort=False):
            taus = found["kendall"]
            rows.append(
                {
                    "metric": METRICS[metric],
                    "runs": f"{METHODS[a]}, seed against seed"
                    if a == b
                    else f"{METHODS[a]} against {METHODS[b]}",
                    "τ, mean (range)": f"{taus.mean():.2f} ({taus.min():.2f} … {taus.max():.2f})",
                    "pairs": len(taus),
                }
            )
    return markdown(rows)


def within_runs(profiles: dict[str, Profiles]) -> str:
    """What each single run could say by itself: its own verdict and effective observations."""
    rows = []
    for metric in ("grad_rms", "l1_descent"):
        for method, name in METHODS.items():
            group = profiles[metric][method]
            rows.append(
                {
                    "metric": METRICS[metric],
                    "method": name,
                    "effective observations of the least known layer": ", ".join(
                        f"{np.nanmin(p.to_frame()['n_eff']):.0f}" for p in group
                    ),
                    "verdict of each run": ", ".join(str(p.verdict) for p in group),
                    "layers never seen": ", ".join(
                        str(int((~np.isfinite(p.scores)).sum())) for p in group
                    ),
                }
            )
    return markdown(rows)


def between_seeds(profiles: dict[str, Profiles]) -> str:
    """What differs between seeds, beside what one run states for itself."""
    rows = []
    for metric in ("grad_rms", "l1_descent"):
        for method, name in METHODS.items():
            group = profiles[metric][method]
            seeds = over_seeds(group, [f"seed {seed}" for seed in SEEDS]).seeds
            spread = seeds.spread
            within, total = (
                np.sqrt(np.nanmean(spread[column].to_numpy(float) ** 2))
                if spread[column].notna().any()
                else np.nan
                for column in ("within", "total")
            )
            rows.append(
                {
                    "metric": METRICS[metric],
                    "method": name,
                    "between seeds": f"{total:.1%}",
                    "one run states": "no interval" if np.isnan(within) else f"{within:.1%}",
                    "ratio": "" if np.isnan(seeds.ratio) else f"{seeds.ratio:.1f}",
                }
            )
    return markdown(rows)


if __name__ == "__main__":
    sys.exit(main())
