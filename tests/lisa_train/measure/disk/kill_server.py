"""Runs of a tiny model, killed at random moments; forked from one process that imported torch.

Usage: kill_server.py FOLDER RUNS SEED. Prints one line per run: what it did and what was found
is asserted here, where the process that was killed is known.
"""

import gc
import itertools
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from helpers_recording import arguments, examples, llama
from transformers import Trainer, TrainerCallback

import lisa_train as lt
from lisa_analysis.contract.errors import RunDirectoryError
from lisa_analysis.rundir.opening import load

STEPS, SAVE, FLUSH = 30, 6, 0.1


class Tell(TrainerCallback):
    """Tells the parent the number and the time of every step that is done."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_step_end(self, args, state, control, **kwargs):
        os.write(self.pipe, f"{state.global_step} {time.monotonic()}\n".encode())


def train(folder, pipe):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trainer = Trainer(
        llama(layers=2), train_dataset=examples(),
        args=arguments(
            folder / "checkpoints", max_steps=STEPS, save_strategy="steps", save_steps=SAVE,
            logging_strategy="no", save_total_limit=2,
        ),
        callbacks=[Tell(pipe)],
    )  # fmt: skip
    saved = sorted(
        (int(path.name.split("-")[1]), path)
        for path in (folder / "checkpoints").glob("checkpoint-*")
        # Trainer makes one step too many when it continues from the very last one.
        if is_whole(path) and not path.name.endswith(f"-{STEPS}")
    )
    lisa = lt.LisaConfig(activated_layers=1, interval_steps=4)
    record = lt.RecordConfig(str(folder), every=1, flush_seconds=FLUSH)
    resume = (folder / "run.json").exists()
    lt.attach(trainer, lisa=lisa, record=record, resume=resume)
    trainer.train(resume_from_checkpoint=str(saved[-1][1]) if saved else None)


def is_whole(checkpoint):
    """Whether the kill left this checkpoint of Trainer's, whose last file is this one, whole."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return True


def run(folder, moment=None):
    """Fork a training run and return the steps it told of, the time of its end and its status.

    Parameters
    ----------
    moment
        (step, seconds): kill it so long after it told of that step; None lets it finish.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            train(folder, writer)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    told = b""
    if moment is not None:
        step, seconds = moment
        while step and f"{step} ".encode() not in b"\n" + told and (p := os.read(reader, 65536)):
            told += p
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    while piece := os.read(reader, 65536):
        told += piece
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    steps = [line.split() for line in told.decode().splitlines() if line.count(" ") == 1]
    return [(int(s), float(t)) for s, t in steps], killed, status


def check_killed(folder, steps, killed):
    """A killed run opens, is interrupted, and misses no more than the flush window."""
    try:
        found = load(folder)
    except RunDirectoryError as error:
        if not (folder / "run.json").exists() and not steps:
            return "nothing"  # killed before there was a run
        raise AssertionError(f"{folder}: {error}") from error
    assert found.status == "interrupted", found.status
    metrics = found.metrics()
    assert not metrics.duplicated(["step", "param_id"]).any()
    recorded = sorted(metrics["step"].unique())
    assert recorded == list(range(len(recorded))), recorded
    logged = found.scalars["step"].tolist()
    assert logged == list(range(1, len(logged) + 1)), logged
    # The newest step waits for the one after it, and the flush stands in front of a step.
    durations = [b[1] - a[1] for a, b in itertools.pairwise(steps)]
    slack = FLUSH + 3 * max(durations, default=0) + 0.1
    must = max((s for s, t in steps if t < killed - slack), default=0)
    assert max(recorded, default=0) >= must, (recorded, must)
    assert max(logged, default=0) >= must, (logged, must)
    return f"{len(logged)} of {steps[-1][0] if steps else 0}"


def check_finished(folder):
    """A resumed run is whole: every step once, in the order of the schedule."""
    found = load(folder)
    assert found.status == "finished", found.status
    assert found.warnings == [], found.warnings
    assert found.scalars["step"].tolist() == list(range(1, STEPS + 1))
    metrics = found.metrics()
    assert not metrics.duplicated(["step", "param_id"]).any()
    assert sorted(metrics["step"].unique()) == list(range(STEPS + 1))
    whole = len(found.parameters) - found.parameters["tied_to"].notna().sum()
    assert (metrics[metrics["step"] % SAVE == 0].groupby("step").size() == whole).all()
    draws = found.events[found.events["event"] == "lisa_draw"]
    assert draws["step"].tolist() == list(range(0, STEPS, 4))
    return metrics


def main(folder, runs, seed):
    gc.freeze()  # the runs' `gc.collect()` looks at what they made, not at all that was imported
    rng = random.Random(seed)
    steps, _, status = run(folder / "reference")
    assert status == 0
    reference = check_finished(folder / "reference")
    between = (steps[-1][1] - steps[0][1]) / (STEPS - 1)
    for number in range(runs):
        path = folder / str(number)
        step = rng.randrange(STEPS)
        wait = rng.random() * (20 if step == 0 else 2) * between
        steps, killed, _ = run(path, (step, wait))
        outcome = check_killed(path, steps, killed) if load_status(path) != "finished" else "all"
        if outcome != "all":
            _, _, status = run(path)
            assert status == 0, number
        metrics = check_finished(path)
        # The resumed run computed what the uninterrupted one did.
        a, b = (m.sort_values(["step", "param_id"])["weight_norm"] for m in (metrics, reference))
        assert (a.to_numpy() == b.to_numpy()).all()
        segment = load(path).manifest["segment"]
        print(number, outcome, "segment", segment, flush=True)


def load_status(path):
    try:
        return load(path).status
    except RunDirectoryError:
        return None


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
