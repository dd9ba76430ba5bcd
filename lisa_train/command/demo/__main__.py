"""`make demo`: run the main job with the two commands that a user would type."""

import argparse
import shlex
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

from lisa_analysis.contract.errors import LisaError

STEPS = 40
SETTINGS = str(resources.files("lisa_train.command.demo") / "demo.yaml")


def main() -> int:
    """Run the demo; return 0, 2 for bad input, or the code of the command that failed."""
    parser = argparse.ArgumentParser(prog="python -m lisa_train.demo", description=__doc__)
    parser.add_argument("--model", help="folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", help="dataset as for lisa-train (default: BYU Chit-Chat)")
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})"
    )
    parser.add_argument("--output_dir", default="runs/demo", help="where the runs go")
    arguments = parser.parse_args()
    try:
        return _demo(arguments)
    except LisaError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        return 130


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.steps < 20:
        raise LisaError(
            f"--steps is {arguments.steps}; expected at least 20, or there is no profile."
        )
    from lisa_train.command.demo.chitchat import chitchat_folder
    from lisa_train.command.demo.smollm2 import smollm2_folder

    model = arguments.model or str(smollm2_folder())
    data = arguments.data or str(chitchat_folder())
    folder = new_folder(Path(arguments.output_dir))
    folder.mkdir(parents=True)
    precision = "--bf16=true" if _fast_bf16() else "--bf16=false"
    shared = [
        "--config", SETTINGS, "--model_name_or_path", model, "--dataset_name", data,
        f"--max_steps={arguments.steps}", precision,
        f"--max_train_samples={4 * arguments.steps}",  # what is never reached need not be read
    ]  # fmt: skip
    pilot, uniform, learned = (
        folder / "lora-pilot",
        folder / "lisa-uniform",
        folder / "lisa-learned",
    )
    probabilities = folder / "probabilities.json"
    lisa = ["--learning_rate=2e-4", "--lisa.interval_steps=2", "--save_final_model=false"]
    started = time.monotonic()

    say("1  A LoRA pilot records what every layer does")
    run_command("lisa-train", "--config", "lora", *shared, "--learning_rate=1e-3",
         "--output_dir", str(pilot))  # fmt: skip
    say("2  The analysis turns the log into importance and sampling probabilities")
    # So short a pilot gives no intervals: the demo takes the scores as they are, and says so.
    run_command(
        "lisa-analyze", str(pilot), "--probabilities", str(probabilities), "--ignore-intervals"
    )
    say("3  LISA, two of the layers at a time, drawn uniformly")
    run_command("lisa-train", "--config", "lisa", *shared, *lisa, "--output_dir", str(uniform))
    say("4  LISA again: same data, steps and seed, layers drawn with those probabilities")
    run_command("lisa-train", "--config", "lisa-learned", *shared, *lisa,
         f"--lisa.probabilities={probabilities}", "--output_dir", str(learned))  # fmt: skip
    say("5  Did it help? The three runs side by side")
    run_command("lisa-analyze", str(pilot), str(uniform), str(learned),
         "-o", str(folder / "report.html"))  # fmt: skip
    _conclude(folder, time.monotonic() - started)
    return 0


def new_folder(wanted: Path) -> Path:
    """Return `wanted`, or `wanted-2`, … when it is taken: no earlier run is overwritten."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def _fast_bf16() -> bool:
    """Whether bf16 arithmetic is faster than fp32 here; the weights stay fp32 either way."""
    import torch

    from lisa_train.private_names import check

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    check("demo")
    return bool(torch.cpu._is_avx512_bf16_supported())


def run_command(command: str, *words: str) -> None:
    """Run one of the two commands as its user would, in the interpreter of this demo."""
    print(f"$ {shlex.join([command, *words])}", flush=True)
    module = {"lisa-train": "lisa_train", "lisa-analyze": "lisa_analysis"}[command]
    subprocess.run([sys.executable, "-m", module, *words], check=True)


def say(title: str) -> None:
    """Print the title of a step."""
    print(f"\n── {title}", flush=True)


def _conclude(folder: Path, seconds: float) -> None:
    """Say what came out and where to look, without claiming more than one short run can show."""
    import lisa_analysis as la

    runs = ("lora-pilot", "lisa-uniform", "lisa-learned")
    results = {name: la.load(folder / name).manifest["result"] for name in runs}
    last = {name: result["last_held_out_loss"] for name, result in results.items()}
    before = results["lisa-uniform"]["first_held_out_loss"]
    print(f"\nDone in {seconds:.0f} s. Held-out loss {before:.3f} before training; after:")
    for name, result in results.items():
        print(f"  {name:<13} {last[name]:.3f}   in {result['seconds']:.0f} s, evaluation included")
    print(
        f"\nLearned minus uniform sampling: {last['lisa-learned'] - last['lisa-uniform']:+.3f}. "
        "This is one seed and a short run:\nit shows that the loop works, not which sampler is "
        "better; that takes several seeds and a\npermuted-profile control.\n\n"
        f"Look at   {folder / 'report.html'}\nRuns in   {folder}"
    )


if __name__ == "__main__":
    sys.exit(main())
