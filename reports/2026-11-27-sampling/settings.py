"""Words of `lisa-train` that runs of all arms share."""

import math

from environments import Environment

PROBED = 16  # batches of a probe
ABLATED = ("--max_examples", "64", "--general", "none")


def common(
    environment: Environment,
    split: str,
    seed: int,
    *,
    steps: int | None = None,
    every: int | None = None,
    trains: bool = True,
    evaluations: int = 1,
) -> list[str]:
    """Return model, data, seed and, where it trains, steps, schedule, evaluations and recording.

    Parameters
    ----------
    environment
        Of the run.
    split, seed
        What is held out, and the order of the rest.
    steps
        None takes those of the environment.
    every
        Steps from one record to the next; None records the last one alone.
    trains
        Whether the run makes steps.
    evaluations
        Of the run, evenly spread; the last stands at the end.
    """
    steps = environment.steps if steps is None else steps
    words = [
        f"--model_name_or_path={environment.model()}",
        f"--dataset_name={environment.data()}", f"--seed={seed}",
        f"--per_device_train_batch_size={environment.batch}", *environment.words,
    ]  # fmt: skip
    if trains:
        words += [
            f"--dataset_test_split={split}", f"--max_steps={steps}",
            "--lr_scheduler_type=cosine", "--warmup_steps=0.05",
            f"--eval_steps={math.ceil(steps / evaluations)}",
            f"--max_eval_samples={environment.evaluated}", "--logging_steps=10",
            f"--record.every={every or steps}", "--record.flush_seconds=3600",
        ]  # fmt: skip
    return words
