"""What arms read: losses and profiles of earlier runs."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from environments import Environment

import lisa_analysis as la
from lisa_analysis.contract.multipliers_file import SCHEMA


def held_out_loss(folder: Path) -> float | None:
    """Return a run's held-out loss after its last step; infinite where it is not a number.

    None where there is no run.
    """
    return result(folder)["loss"] if folder.exists() else None


@functools.cache
def result(folder: Path) -> dict[str, float]:
    """Return a kept run's held-out loss, and the task's own score by its name."""
    found = la.load(folder).manifest["result"]
    loss = found["last_held_out_loss"]
    finite = loss is not None and math.isfinite(loss)
    scores = found.get("last_held_out_scores") or {}
    return {**scores, "loss": float(loss) if finite else math.inf}


@functools.cache
def profile_of(folder: Path, metric: str) -> la.ImportanceProfile:
    """Return what a kept run says of a metric; such a run does not change any more."""
    return la.importance(la.load(folder), metric)


class Sources:
    """Runs that profiles are read from, and the profiles.

    Parameters
    ----------
    environment
        Of the runs.
    kept
        Folder of the study's logs.
    work
        Folder for files that runs are given.
    """

    def __init__(self, environment: Environment, kept: Path, work: Path) -> None:
        self.environment, self.kept, self.work = environment, kept, work

    def run(self, arm: str, seed: int) -> str:
        """Return the name of the run of an arm, or of what is read, of one seed."""
        return f"{self.environment.name}/{arm}/s{seed}"

    def name(self, kind: str, seed: int) -> str:
        """Return the name of the run that a profile of this kind is read from."""
        return self.run(f"source-{kind}", seed)  # `pilot` is the name of an arm

    def there(self, kind: str, seed: int) -> bool:
        """Whether that run is finished."""
        return (self.kept / self.name(kind, seed)).exists()

    def profile(self, kind: str, seed: int) -> la.ImportanceProfile:
        """Return the profile that an arm of a seed uses: of the next seed's run."""
        if kind == "spectrum":
            return self._spectrum
        metric = {"probe": "grad_signal", "pilot": "grad_rms", "ablation": "ablation_keep"}[kind]
        return self.metric(kind, seed, metric)

    def metric(self, kind: str, seed: int, metric: str) -> la.ImportanceProfile:
        """Return what the next seed's run of a kind says of a metric."""
        return profile_of(self.kept / self.name(kind, seed + 1), metric)

    def top(self, kind: str, seed: int, *, lowest: bool = False) -> list[int]:
        """Return the layers that stand highest in the profile of a seed."""
        return self.environment.top(list(self.profile(kind, seed).scores), lowest=lowest)

    @functools.cached_property
    def _spectrum(self) -> la.ImportanceProfile:
        """Of the weights alone, the same whatever the seed; kept, so the page needs no model."""
        file = self.kept / self.environment.name / "spectrum.json"
        if not file.exists():
            found = la.importance(la.load(self.environment.model()), "spectrum_snr")
            file.parent.mkdir(parents=True, exist_ok=True)
            replace(found, model=Path(found.model).name).save(file)  # no folder of this machine
        return la.ImportanceProfile.load(file)

    def multipliers(
        self, name: str, seed: int, layers: Sequence[float], groups: Mapping[str, float] = {}
    ) -> str:
        """Return the word for learning rates by layer, and by group, whose file it writes."""
        file = self.file(name, seed)
        factors = {str(i): factor for i, factor in enumerate(layers)} | dict(groups)
        file.write_text(json.dumps({"schema": SCHEMA, "multipliers": factors}), encoding="utf-8")
        return f"--lr_multipliers={file}"

    def file(self, name: str, seed: int) -> Path:
        """Return the file of what an arm of a seed is given."""
        folder = self.work / "files" / self.environment.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}-s{seed}.json"
