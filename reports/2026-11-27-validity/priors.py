"""Scores of the untouched weights, kept as profiles: what a run directory without weights lacks."""

from pathlib import Path

from plan import HERE, TASKS, model_folder

import lisa_analysis as la

METRICS = ("spectrum_snr", "heavy_tail_alpha", "base_norm")
PRIORS = HERE / "priors"
# Two tasks share a model.
MODELS = {"parts-of-speech": "minilm", "chitchat": "smollm2", "definitions": "smollm2"}


def keep_priors(kept: dict[str, Path]) -> None:
    """Compute the priors of every model of which a run is kept, once.

    Parameters
    ----------
    kept
        Task -> a run directory of it: the layers are to have its names.
    """
    for task, run_dir in kept.items():
        folder = PRIORS / MODELS[task]
        if folder.exists():
            continue
        print(f"spectra of the weights of {MODELS[task]} …", flush=True)
        run = la.load(run_dir, base=model_folder(task))
        partial = folder.with_name(f".{folder.name}")
        partial.mkdir(parents=True, exist_ok=True)
        for metric in METRICS:
            for by in ("layer", "module"):
                la.importance(run, metric, by=by).save(partial / f"{metric}-{by}.json")
        partial.replace(folder)


def priors(task: str) -> list[la.ImportanceProfile]:
    """Return the kept priors of a task's model."""
    files = sorted((PRIORS / MODELS[task]).glob("*.json"))
    return [la.ImportanceProfile.load(file) for file in files]


assert set(MODELS) == set(TASKS)
