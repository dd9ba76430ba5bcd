"""`make demo-classify`: full, LoRA, LISA and the head alone on a real classification."""

import argparse
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

from lisa_analysis.contract.errors import LisaError
from lisa_train.command.demo.__main__ import new_folder, run_command, say

STEPS = 80
SETTINGS = str(resources.files("lisa_train.command.demo") / "classify.yaml")
# Name of the run -> its recipe and learning rate, picked by hand.
RUNS = {
    "head-alone": ("head", "3e-3"),
    "lisa-uniform": ("lisa", "2e-4"),
    "lora": ("lora", "1e-3"),
    "full": ("full", "1e-4"),
}


def main() -> int:
    """Run the demo; return 0, 2 for bad input, or the code of the command that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m lisa_train.command.demo.classify", description=__doc__
    )
    parser.add_argument("--model", help="folder or hub id (default: all-MiniLM-L6-v2)")
    parser.add_argument("--data", help="`text` and `label`, as for lisa-train (default: what a "
                        "conversation of BYU Chit-Chat was started with)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=STEPS, help=f"default {STEPS}")
    parser.add_argument("--output_dir", default="runs/demo-classify", help="where the runs go")
    arguments = parser.parse_args()
    try:
        return _demo(arguments)
    except LisaError as error:
        print(f"demo-classify: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        return 130


def _demo(arguments: argparse.Namespace) -> int:
    from lisa_train.command.demo.sources import MINILM, fetch_folder
    from lisa_train.command.demo.topics import topics_folder

    model = arguments.model or str(fetch_folder(MINILM))
    data = arguments.data or str(topics_folder())
    folder = new_folder(Path(arguments.output_dir))
    folder.mkdir(parents=True)
    started = time.monotonic()
    for number, (name, (recipe, rate)) in enumerate(RUNS.items(), 1):
        say(f"{number}  {name}")
        run_command(
            "lisa-train", "--config", recipe, "--config", SETTINGS, "--model_name_or_path", model,
            "--dataset_name", data, f"--max_steps={arguments.steps}", f"--learning_rate={rate}",
            *(["--lisa.interval_steps=5"] if recipe == "lisa" else []),
            "--save_final_model=false", "--output_dir", str(folder / name),
        )  # fmt: skip
    say(f"{len(RUNS) + 1}  Side by side")
    run_command(
        "lisa-analyze", *(str(folder / name) for name in RUNS), "-o", str(folder / "report.html")
    )
    _conclude(folder, time.monotonic() - started)
    return 0


def _conclude(folder: Path, seconds: float) -> None:
    """Say what came out, without claiming more than one short run can show."""
    import lisa_analysis as la

    print(f"\nDone in {seconds:.0f} s. On held-out conversations:")
    print(f"  {'':<13} {'loss':>6} {'accuracy':>9} {'macro-F1':>9} {'trained':>11} {'time':>6}")
    classes = 0
    for name in RUNS:
        run = la.load(folder / name)
        result = run.manifest["result"]
        scores = result["last_held_out_scores"]
        trained = run.metrics(["grad_norm"]).dropna()["param_id"].unique()
        sizes = run.parameters.set_index("param_id")["numel"]
        classes = len(run.manifest["dataset"]["labels"])
        print(
            f"  {name:<13} {result['last_held_out_loss']:>6.3f} {scores['accuracy']:>9.3f} "
            f"{scores['macro_f1']:>9.3f} {int(sizes[trained].sum()):>11,} "
            f"{result['seconds']:>4.0f} s"
        )
    print(
        f"\nGuessing among {classes} classes is right in {1 / classes:.3f}. One seed, learning "
        "rates picked by hand: it shows that\neach method learns and what it costs, not which is "
        "better. `trained` counts tensors that had a gradient\nin a recorded step: for LISA "
        "all that were ever drawn.\n\n"
        f"Look at   {folder / 'report.html'}\nRuns in   {folder}"
    )


if __name__ == "__main__":
    sys.exit(main())
