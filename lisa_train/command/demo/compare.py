"""Several methods on one task, with the commands that a user would type, and what came out."""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from lisa_analysis.contract.errors import LisaError
from lisa_train.command.demo.__main__ import new_folder, run_command, say


@dataclass(frozen=True)
class Comparison:
    """A demo that trains one model on one task by several methods.

    Attributes
    ----------
    name
        Of the target of make, and of the folder of its runs.
    about
        What it does, in a sentence.
    steps
        Optimizer steps of every run, unless the user says otherwise.
    model, data
        Return the folder of the model or data, fetching it on first use.
    model_words, data_words
        What these are.
    rates
        Learning rate of each method: head, lisa, lora and full, picked by hand.
    scores
        Heading of a column -> score of the task.
    held_out
        What is held out, in the plural.
    yardstick
        A sentence on the scores, from one of the runs.
    """

    name: str
    about: str
    steps: int
    model: Callable[[], Path]
    model_words: str
    data: Callable[[], Path]
    data_words: str
    rates: Mapping[str, str]
    scores: Mapping[str, str]
    held_out: str
    yardstick: Callable[[Any], str]

    @property
    def settings(self) -> str:
        """The settings that its runs share."""
        file = f"{self.name.removeprefix('demo-')}.yaml"
        return str(resources.files("lisa_train.command.demo") / file)

    @property
    def runs(self) -> Mapping[str, tuple[str, str]]:
        """Name of a run -> its recipe and learning rate."""
        names = {"head": "head-alone", "lisa": "lisa-uniform"}
        return {names.get(recipe, recipe): (recipe, rate) for recipe, rate in self.rates.items()}


def run_comparison(demo: Comparison, words: Sequence[str] | None = None) -> int:
    """Run a demo; return 0, 2 for bad input, or the code of the command that failed."""
    parser = argparse.ArgumentParser(
        prog=f"python -m lisa_train.command.demo.{demo.name.removeprefix('demo-')}",
        description=demo.about,
    )
    parser.add_argument("--model", help=f"folder or hub id (default: {demo.model_words})")
    parser.add_argument("--data", help=f"as for lisa-train (default: {demo.data_words})")
    parser.add_argument("--steps", type=int, default=demo.steps, help=f"default {demo.steps}")
    parser.add_argument("--output_dir", default=f"runs/{demo.name}", help="where the runs go")
    arguments = parser.parse_args(words)
    try:
        return _run(demo, arguments)
    except LisaError as error:
        print(f"{demo.name}: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        return 130


def _run(demo: Comparison, arguments: argparse.Namespace) -> int:
    model = arguments.model or str(demo.model())
    data = arguments.data or str(demo.data())
    folder = new_folder(Path(arguments.output_dir))
    folder.mkdir(parents=True)
    started = time.monotonic()
    for number, (name, (recipe, rate)) in enumerate(demo.runs.items(), 1):
        say(f"{number}  {name}")
        run_command(
            "lisa-train", "--config", recipe, "--config", demo.settings,
            "--model_name_or_path", model, "--dataset_name", data,
            f"--max_steps={arguments.steps}", f"--learning_rate={rate}",
            *(["--lisa.interval_steps=5"] if recipe == "lisa" else []),
            "--save_final_model=false", "--output_dir", str(folder / name),
        )  # fmt: skip
    say(f"{len(demo.runs) + 1}  Side by side")
    run_command(
        "lisa-analyze", *(str(folder / name) for name in demo.runs),
        "-o", str(folder / "report.html"),
    )  # fmt: skip
    _conclude(demo, folder, time.monotonic() - started)
    return 0


def _conclude(demo: Comparison, folder: Path, seconds: float) -> None:
    """Say what came out, without claiming more than one short run can show."""
    import lisa_analysis as la

    runs = {name: la.load(folder / name) for name in demo.runs}
    first = next(iter(runs.values()))
    events = first.events
    before = events[events["event"] == "evaluate"]["metrics"].iloc[0]
    print(f"\nDone in {seconds:.0f} s. On held-out {demo.held_out}:")
    headings = "".join(f"{heading:>16}" for heading in demo.scores)
    print(f"  {'':<13} {'loss':>6}{headings} {'trained':>11} {'time':>6}")
    scores = "".join(f"{before[f'eval_{score}']:>16.3f}" for score in demo.scores.values())
    print(f"  {'before':<13} {first.manifest['result']['first_held_out_loss']:>6.3f}{scores}")
    for name, run in runs.items():
        result = run.manifest["result"]
        found = result["last_held_out_scores"]
        trained = run.metrics(["grad_norm"]).dropna()["param_id"].unique()
        sizes = run.parameters.set_index("param_id")["numel"]
        print(
            f"  {name:<13} {result['last_held_out_loss']:>6.3f}"
            + "".join(f"{found[score]:>16.3f}" for score in demo.scores.values())
            + f" {int(sizes[trained].sum()):>11,} {result['seconds']:>4.0f} s"
        )
    print(
        f"\n{demo.yardstick(first)} One seed, learning rates picked by hand: it shows that\n"
        "each method learns and what it costs, not which is better. `trained` counts tensors that "
        "had a gradient\nin a recorded step: for LISA all that were ever drawn.\n\n"
        f"Look at   {folder / 'report.html'}\nRuns in   {folder}"
    )


def chance(run: Any) -> str:
    """Say what guessing among the classes of a run would reach."""
    classes = len(run.manifest["dataset"]["labels"])
    return f"Guessing among {classes} classes is right in {1 / classes:.3f}."
