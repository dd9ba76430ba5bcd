"""What to do next: one sentence and the command for it, from what was found."""

import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_analysis.contract.layers import stacks_of
from lisa_analysis.contract.schema import CONFIG
from lisa_analysis.profiles.cost import PROBE_BATCHES
from lisa_analysis.rundir.configurations import data_of, model_of, seeds_of
from lisa_analysis.rundir.run import Run
from lisa_analysis.statistics.repetitions import MIN_SEEDS
from lisa_analysis.views.analysis import Analysis, RunAnalysis
from lisa_analysis.views.next_run import USUAL_LAYERS


@dataclass(frozen=True)
class NextStep:
    """What to do next.

    Attributes
    ----------
    sentence
        What, and why.
    command
        Lines for a shell; empty where no command does it.
    """

    sentence: str
    command: str = ""


def next_step(analysis: Analysis) -> NextStep:
    """Say what the runs ask for: mend a fault, know more, use the profile, or repeat with seeds."""
    for one in analysis.runs:
        failed = [f for f in one.diagnostics.findings if f.state == "fail"]
        if failed:
            where = "" if analysis.alone else f" in {one.name}"
            return NextStep(f"First mend what is wrong{where}: {failed[0].title}. "
                            f"{failed[0].advice}")  # fmt: skip
    if not analysis.alone:
        return _of_several(analysis)
    [one] = analysis.runs
    if one.run.status == "running":
        return NextStep("Look again later: the run is still going on.",
                        _analyze(one.run))  # fmt: skip
    return _of_one(one) if one.run.has_course else _of_weights(one)


def _of_weights(one: RunAnalysis) -> NextStep:
    run = one.run
    if run.method == "model":
        return NextStep(
            "Say which model these weights came from: beside it is known what each layer changed.",
            _analyze(run, "--base BASE"),
        )
    asked = _as_asked(one)
    certain = "" if "--ignore-intervals" in asked else "--ignore-intervals "
    return NextStep(
        "Give these layers ranks by what they changed; scores of one set of weights have no "
        "intervals, and are taken as certain.",
        _analyze(run, f"{asked}{certain}--export peft-rank:lora.json"),
    )


def _of_one(one: RunAnalysis) -> NextStep:
    profile, run = one.profile, one.run
    if profile is None or not profile.above + profile.below:
        return _know_more(one)
    if run.is_probe:
        sentence = (
            "Train by this profile, and beside it uniformly: only that shows what it is worth."
        )
    elif run.ablation.empty:
        sentence = (
            "See whether the layers that stand out were worth it, or train the next run by them."
        )
    else:
        sentence = "Train the next run by this profile, and a uniform one beside it."
    lines = [_analyze(run, f"{_as_asked(one)}--probabilities probabilities.json")]
    if one.probabilities is not None:
        lines.append(_train("lisa", run, _by_probabilities(one)))
    if not run.is_probe and run.ablation.empty:
        lines.insert(0, f"lisa-ablate {shlex.quote(_name(run))}")
    return NextStep(sentence, "\n".join(lines))


def _as_asked(one: RunAnalysis, home: Path | None = None) -> str:
    """Options of `lisa-analyze` by which its file is the one on the page, a space behind each.

    `home` is the folder that the command is for, that of the run where it is left out.
    """
    home = one.run.path.resolve().parent if home is None else home
    plan, words = one.plan, []
    if one.run.base is not None:
        words.append(f"--base {shlex.quote(os.path.relpath(one.run.base.resolve(), home))}")
    if isinstance(one.metric, str):
        words.append(f"--metric {shlex.quote(one.metric)}")
    if plan.activated_layers is not None:
        words.append(f"--activated-layers {plan.activated_layers}")
    if plan.strength is not None:
        words.append(f"--strength {str(plan.strength).replace(' ', '')}")
    if plan.control not in (None, "none"):
        seed = "" if plan.control_seed is None else f" --control-seed {plan.control_seed}"
        words.append(f"--control {plan.control}{seed}")
    if not plan.use_intervals:
        words.append("--ignore-intervals")
    return "".join(f"{word} " for word in words)


def _by_probabilities(one: RunAnalysis) -> str:
    """Options of `lisa-train` with which it takes the file."""
    assert one.probabilities is not None
    k = one.probabilities.activated_layers
    words = ["--lisa.probabilities probabilities.json"]
    if k != USUAL_LAYERS:
        words.insert(0, f"--lisa.activated_layers {k:g}")
    if k < len(set(stacks_of(one.run.layer_names))):
        words.append("--lisa.stacks together")
    return " ".join(words)


def _know_more(one: RunAnalysis) -> NextStep:
    if one.run.is_probe:
        batches = 2 * max(_batches(one.run), PROBE_BATCHES)
        return NextStep("Probe more batches: these leave the order of the layers open.",
                        _train("probe", one.run, f"--probe.batches {batches}"))  # fmt: skip
    return NextStep(
        "Ask a probe: it passes independent batches through the untouched model and names layers "
        "without training.",
        _train("probe", one.run),
    )


def _batches(run: Run) -> int:
    batch = run.probes["batch"].dropna()
    return int(batch.max()) + 1 if len(batch) else 0


def _of_several(analysis: Analysis) -> NextStep:
    at = _ways([one.run for one in analysis.runs])
    names = " ".join(map(shlex.quote, at.values()))
    profile = analysis.profile
    if profile is not None and not (profile.above or profile.below):
        return NextStep(
            "Ask a probe, which names layers without training, or add seeds: over these no layer "
            "is told from the others, and a file by them would be uniform.",
            _train("probe", analysis.runs[0].run),
        )
    if profile is not None:
        return NextStep(
            "Train the next run by the profile over seeds, and a uniform one beside it.",
            f"lisa-analyze {names} {_as_asked(analysis.runs[0], _home(at))}"
            "--probabilities probabilities.json",
        )
    comparison = analysis.comparison
    assert comparison is not None
    losses = comparison.arms.dropna(subset=["mean"])
    few = losses[losses["seeds"].fillna(0) < MIN_SEEDS]
    if len(few) and len(losses) > 1:
        arm = few.iloc[0]["arm"]
        row = comparison.table[comparison.table["arm"] == arm].iloc[0]
        inside = set(comparison.table["run"][comparison.table["arm"] == arm])
        arm_runs = [one.run for one in analysis.runs if one.name in inside]
        seed = _next_seed(arm_runs)
        first = next(one.run for one in analysis.runs if one.name == row["run"])
        command = (
            f"lisa-train --config {shlex.quote(at[first])}/config.yaml --seed {seed} "
            f"--output_dir {shlex.quote(f'{at[first]}-seed-{seed}')}"
        )
        return NextStep(
            f"Repeat every arm until it has {MIN_SEEDS} seeds: before that, seeds may explain "
            f"every difference. {row['run']} first{':' if _can_repeat(first) else '.'}",
            command if _can_repeat(first) else "",
        )
    trained = [one.run for one in analysis.runs if one.run.has_course and one.run.has_layers]
    trained = [run for run in trained if not run.is_probe and run.ablation.empty]
    if trained:
        return NextStep(
            "See what the layers’ changes were worth, and whether the profile predicted it.",
            f"lisa-ablate {shlex.quote(at[trained[0]])}",
        )
    return NextStep("Nothing is left to do with these runs alone.")


def _next_seed(runs: Sequence[Run]) -> int:
    """Return a seed that no run of an arm has."""
    known = [s for run in runs for s in seeds_of(run).values() if isinstance(s, int)]
    return max(known, default=0) + 1


def _can_repeat(run: Run) -> bool:
    """Whether lisa-train made a run; somebody else's script is not ours to write down."""
    return (run.path / CONFIG).exists()


def _analyze(run: Run, options: str = "") -> str:
    return f"lisa-analyze {shlex.quote(_name(run))} {options}".rstrip()


def _train(config: str, run: Run, options: str = "") -> str:
    model, data = (
        _of(model_of(run), "MODEL", run, "model"),
        _of(data_of(run), "DATA", run, "dataset"),
    )
    command = f"lisa-train --config {config} --model_name_or_path {model} --dataset_name {data}"
    return f"{command} \\\n    {options}" if options else command


def _of(short: str, placeholder: str, run: Run, key: str) -> str:
    """Name of a model or data set as a command takes it; of a folder without the way to it."""
    entry: Any = run.manifest.get(key)
    name = entry.get("name") if isinstance(entry, dict) else None
    if not name:
        return placeholder
    return shlex.quote(short if Path(str(name)).is_absolute() else str(name))


def _ways(runs: Sequence[Run]) -> dict[Run, str]:
    """Where every run is, seen from the folder that holds them all."""
    home = _home(runs)
    return {run: run.path.resolve().relative_to(home).as_posix() for run in runs}


def _home(runs: Iterable[Run]) -> Path:
    """Return the folder that holds all runs."""
    return Path(os.path.commonpath([run.path.resolve().parent for run in runs]))


def _name(run: Run) -> str:
    return run.path.resolve().name
