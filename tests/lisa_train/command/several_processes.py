"""What several processes do as torchrun starts them, or by torchrun: commands, one after another.

By torchrun they import everything anew, which takes longer than most of these commands.
"""

import json
import os
import signal
import sys

from lisa_train.command.cli import main


def die_at(step: int) -> None:
    """Let the second process vanish, as one does that the kernel has killed."""
    from lisa_train.trainer.lisa_callback import LisaCallback

    goes_on = LisaCallback.on_step_end

    def on_step_end(self, args, state, *rest, **kwargs):
        if state.global_step == step and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return goes_on(self, args, state, *rest, **kwargs)

    LisaCallback.on_step_end = on_step_end


def split(arguments: list[str]) -> int:
    """Train a model that accelerate splits."""
    from helpers_accelerate import fsdp2_on_a_cpu  # it loads torch, which the command does

    with fsdp2_on_a_cpu():
        return main(arguments)


def ablate_until_one_dies(words: list[str], losses: int) -> int:
    """`lisa-ablate` over small batches, whose second process vanishes after so many losses."""
    from lisa_train.command import ablate, ablate_run
    from lisa_train.measure.ablation.file import AblationFile

    goes_on, calls = AblationFile.add, []

    def add(self, *arguments):
        goes_on(self, *arguments)
        calls.append(1)
        if len(calls) == losses and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    AblationFile.add = add
    ablate_run._TOKENS["cpu"] = 40
    return ablate.main(words)


def process(rank: int, folder: str, given: list[tuple[int, list[str]]]) -> None:
    """`lisa-train` several times in a row, each with what it is to return."""
    for expected, arguments in given:
        code = split(arguments) if "fsdp" in "".join(arguments) else main(arguments)
        if code != expected:
            sys.exit(f"{arguments} returned {code}, expected {expected}")


def dying(rank: int, folder: str, step: int, words: list[str]) -> None:
    """`lisa-train` whose second process vanishes; the first ends with what it returns."""
    die_at(step)
    sys.exit(main(words))


if __name__ == "__main__":
    if sys.argv[1] == "ablate":
        sys.exit(ablate_until_one_dies(sys.argv[3:], int(sys.argv[2])))
    if len(sys.argv) > 2:
        die_at(int(sys.argv[2]))
    process(int(os.environ["RANK"]), "", json.loads(sys.argv[1]))
