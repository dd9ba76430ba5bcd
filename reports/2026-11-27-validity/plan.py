"""What the study runs: two models, three tasks, three methods, three seeds, layers alone."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import Cell

HERE = Path(__file__).resolve().parent
SEEDS = (1, 2, 3)
METHODS = ("lora", "full", "lisa")
# Task -> words of a table, and how many layers its model has.
TASKS = {
    "parts-of-speech": "MiniLM, parts of speech",
    "chitchat": "SmolLM2, chit-chat",
    "definitions": "SmolLM2, definitions",
}
LAYERS = {"parts-of-speech": 6, "chitchat": 30, "definitions": 30}
# Picked by hand before the study, on other seeds or data; tuned for nothing.
RATES = {
    ("parts-of-speech", "lora"): "2e-3",
    ("parts-of-speech", "full"): "2e-4",
    ("parts-of-speech", "lisa"): "5e-4",
    ("chitchat", "lora"): "1e-3",
    ("chitchat", "full"): "5e-5",
    ("chitchat", "lisa"): "2e-4",
    ("definitions", "lora"): "1e-3",
    ("definitions", "full"): "5e-5",
    ("definitions", "lisa"): "2e-4",
}
ALONE_RATE = "5e-4"
ALONE = ("head", *map(str, range(LAYERS["parts-of-speech"])))  # the head alone; with one layer
# The small model is ablated by kind too: six layers alone are no evidence.
ABLATED = {
    "parts-of-speech": ("--by", "both", "--max_examples", "64"),
    "chitchat": ("--general", "none", "--max_examples", "16"),
    "definitions": ("--general", "none", "--max_examples", "32"),
}


def cells() -> list[Cell]:
    """Return the whole plan, what is cheap first: it is of use where it was not run to its end."""
    small, *large = TASKS
    plan = [_probe(small)]
    plan += [_trained(small, method, seed) for seed in SEEDS for method in METHODS]
    plan += [_alone(what, seed) for seed in SEEDS[:2] for what in ALONE]
    plan += [_probe("chitchat"), *(_trained("chitchat", "lora", seed) for seed in SEEDS)]
    plan += [_alone(what, seed) for seed in SEEDS[2:] for what in ALONE]
    plan += [_probe("definitions")]
    there = {cell.name for cell in plan}
    rest = (_trained(t, m, seed) for seed in SEEDS for t in reversed(large) for m in METHODS)
    return plan + [cell for cell in rest if cell.name not in there]


def model_folder(task: str) -> Path:
    """Return the folder of a task's model, fetching it on first use."""
    if task == "parts-of-speech":
        from lisa_train.command.demo.sources import MINILM, fetch_folder

        return fetch_folder(MINILM)
    from lisa_train.command.demo.smollm2 import smollm2_folder

    return smollm2_folder()


def _data_folder(task: str) -> Path:
    if task == "chitchat":
        from lisa_train.command.demo.chitchat import chitchat_folder

        return chitchat_folder()
    from lisa_train.command.demo.wordnet import definitions_folder, parts_of_speech_folder

    return definitions_folder() if task == "definitions" else parts_of_speech_folder()


def _trained(task: str, method: str, seed: int) -> Cell:
    words = [f"--learning_rate={RATES[task, method]}"]
    if method == "lisa":  # every layer is drawn as often, as far as it goes
        words += ["--lisa.interval_steps=2", "--lisa.sampling=balanced"]
    return Cell(
        f"{task}/{method}/s{seed}", _words(task, method, seed, words), ablated=ABLATED[task]
    )


def _alone(what: str, seed: int) -> Cell:
    """The head alone, or one layer with it, at the settings of the other runs."""
    words = [f"--learning_rate={ALONE_RATE}", "--save_final_model=false", "--record.every=60"]
    words += [] if what == "head" else [f"--select.layers={what}"]
    task = "parts-of-speech"
    return Cell(f"{task}/alone-{what}/s{seed}", _words(task, "head", seed, words))


def _probe(task: str) -> Cell:
    words = ["--probe.batches=16", "--bf16=false"]
    return Cell(f"{task}/probe/s1", _words(task, "probe", 1, words))


def _words(task: str, recipe: str, seed: int, more: list[str]) -> Callable[[], list[str]]:
    def words() -> list[str]:
        return [
            "--config", recipe, "--config", str(HERE / f"{task}.yaml"),
            "--model_name_or_path", str(model_folder(task)),
            "--dataset_name", str(_data_folder(task)), f"--seed={seed}", *more,
        ]  # fmt: skip

    return words
