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
PROBED = 16  # batches: a minute on two cores
SHARE = 5  # adapters go into every fifth layer: six of SmolLM2's thirty
SEED = 1  # of the placebo: which layers are drawn at random
SETTINGS = str(resources.files("lisa_train.command.demo") / "demo.yaml")
# run -> what it is compared with
PAIRS = {"lora-named": "lora-random", "lisa-probe": "lisa-uniform"}


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
            f"--steps is {arguments.steps}; expected at least 20, or nothing can be told apart."
        )
    import lisa_analysis as la
    from lisa_train.command.demo.chitchat import chitchat_folder
    from lisa_train.command.demo.smollm2 import smollm2_folder

    model = arguments.model or str(smollm2_folder())
    data = arguments.data or str(chitchat_folder())
    folder = new_folder(Path(arguments.output_dir))
    folder.mkdir(parents=True)
    shared = [
        "--config", SETTINGS, "--model_name_or_path", model, "--dataset_name", data,
        "--bf16=true" if _fast_bf16() else "--bf16=false",
        f"--max_train_samples={4 * max(arguments.steps, PROBED)}",  # the rest is never reached
    ]  # fmt: skip
    trained = [*shared, f"--max_steps={arguments.steps}", "--save_final_model=false"]
    probe, probabilities = folder / "probe", folder / "probabilities.json"
    started = time.monotonic()

    say("1  A probe measures the gradients of every layer; nothing trains")
    run_command("lisa-train", "--config", "probe", *shared, f"--probe.batches={PROBED}",
         "--output_dir", str(probe))  # fmt: skip
    say("2  The analysis names layers, and writes files for the next run")
    named, random = folder / "named.json", folder / "random.json"
    some = max(1, len(la.load(probe).manifest["layers"]) // SHARE)
    run_command("lisa-analyze", str(probe), "--probabilities", str(probabilities),
         "--export", f"peft-layers,layers={some}:{named}")  # fmt: skip
    answered = time.monotonic() - started
    say(f"3  LoRA in the {some} layers of the highest scores, and in {some} drawn at random")
    run_command("lisa-analyze", str(probe), "--control", "permuted", "--control-seed", str(SEED),
         "--export", f"peft-layers,layers={some}:{random}",
         "-o", str(folder / "random.html"), quietly=True)  # fmt: skip
    for name, layers in (("lora-named", named), ("lora-random", random)):
        run_command("lisa-train", "--config", "lora", *trained, "--learning_rate=1e-3",
             "--lora", str(layers), "--output_dir", str(folder / name))  # fmt: skip
    say("4  LISA, two of the layers at a time: uniform, and with the probe's probabilities")
    lisa = [
        "--config", "lisa", *trained, "--learning_rate=2e-4", "--lisa.interval_steps=2",
        "--lisa.sampling=balanced",
    ]  # fmt: skip
    run_command("lisa-train", *lisa, "--output_dir", str(folder / "lisa-uniform"))
    run_command("lisa-train", *lisa, "--lisa.probabilities", str(probabilities),
         "--output_dir", str(folder / "lisa-probe"))  # fmt: skip
    say("5  What came out, side by side")
    runs = [str(folder / name) for pair in PAIRS.items() for name in pair]
    run_command("lisa-analyze", str(probe), *runs, "-o", str(folder / "report.html"))
    _conclude(folder, answered, time.monotonic() - started)
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


def run_command(command: str, *words: str, quietly: bool = False) -> None:
    """Run one of the two commands as its user would, in the interpreter of this demo."""
    print(f"$ {shlex.join([command, *words])}", flush=True)
    module = {"lisa-train": "lisa_train", "lisa-analyze": "lisa_analysis"}[command]
    said = subprocess.DEVNULL if quietly else None
    subprocess.run([sys.executable, "-m", module, *words], check=True, stdout=said)


def say(title: str) -> None:
    """Print the title of a step."""
    print(f"\n── {title}", flush=True)


def _conclude(folder: Path, answered: float, seconds: float) -> None:
    """Say what came out and where to look, without claiming more than one short run can show."""
    import lisa_analysis as la

    names = [name for pair in PAIRS.items() for name in pair]
    results = {name: la.load(folder / name).manifest["result"] for name in names}
    last = {name: result["last_held_out_loss"] for name, result in results.items()}
    before = results[names[0]]["first_held_out_loss"]
    print(
        f"\nDone in {seconds:.0f} s; the probe had answered after {answered:.0f} s. "
        f"Held-out loss {before:.3f} before training; after:"
    )
    for name, result in results.items():
        print(f"  {name:<13} {last[name]:.3f}   in {result['seconds']:.0f} s, evaluation included")
    print()
    for name, other in PAIRS.items():
        print(f"{name} minus {other}: {last[name] - last[other]:+.3f}")
    if (folder / "named.json").read_text() == (folder / "random.json").read_text():
        print("The probe knows no layer to stand apart: the compared runs are of one kind.")
    print(
        "\nOne seed and a short run: it shows that the loop works. Whether a choice of layers is "
        "better\nthan chance takes several seeds, and several random choices.\n\n"
        f"Look at   {folder / 'probe' / 'report.html'}   (which layers, how surely)\n"
        f"          {folder / 'report.html'}   (the runs side by side)\nRuns in   {folder}"
    )


if __name__ == "__main__":
    sys.exit(main())
