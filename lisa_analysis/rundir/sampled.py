"""What a run sampled: the content of its probabilities, not the path that they came from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lisa_analysis.contract.errors import ProbabilitiesError
from lisa_analysis.contract.probabilities_file import read_record
from lisa_analysis.rundir.events import draw_events
from lisa_analysis.rundir.input_files import candidates
from lisa_analysis.rundir.run import Run

_TOLERANCE = 1e-6
# What of a probabilities file is no choice, or may differ between seeds of one arm.
_CIRCUMSTANCES = (
    "schema_version", "model", "layer_names", "activated_layers", "inclusion_probabilities",
    "scores", "n_eff", "source_runs", "verdict", "created", "control", "seed", "justified",
    "statement", "stages", "gain", "spread", "unknown", "undecided",
)  # fmt: skip


@dataclass(frozen=True)
class Sampled:
    """How often the layers of a run were to be drawn, and by which choice.

    Attributes
    ----------
    pi
        Inclusion probability of every layer; empty when all are equal, None when nothing tells.
        Where the run learns, those that it began with.
    control
        ``permuted``, ``reversed`` or ``uniform``, by the file or by the run's own setting; None
        for none, or when nothing tells.
    options
        Metric and settings that the probabilities were made with, as JSON; None when the file is
        gone.
    draws
        Whether the run draws layers at all.
    learns
        Whether the probabilities are learned while the layers train.
    """

    pi: tuple[float, ...] | None
    control: str | None = None
    options: str | None = None
    draws: bool = True
    learns: bool = False

    def agrees(self, other: "Sampled") -> bool:
        """Whether two runs sampled by one choice: seeds of a permuted control differ in order.

        Where a file is gone nothing tells a permuted control, and the order decides.
        """
        if self.pi is None or other.pi is None or len(self.pi) != len(other.pi):
            return False
        learns = self.learns or other.learns
        if learns and (self.learns, self.control) != (other.learns, other.control):
            return False
        if not self.pi:
            return True
        known = self.options is not None and other.options is not None
        if known and (self.control, self.options) != (other.control, other.options):
            return False
        a, b = np.array(self.pi), np.array(other.pi)
        if self.control == other.control == "permuted":
            a, b = np.sort(a), np.sort(b)
        return bool(np.allclose(a, b, rtol=0, atol=_TOLERANCE))

    @property
    def word(self) -> str:
        """What to call it beside other arms; empty where nothing is drawn."""
        if not self.draws:
            return ""
        if self.pi is None:
            return "unknown sampling"
        if self.learns:
            return self.control or "learning"
        return self.control or "learned" if self.pi else "uniform"


def read_sampled(run: Run, given: str, asked: str = "none", *, learns: bool = False) -> Sampled:
    """Find out what `run` sampled.

    Parameters
    ----------
    run
        The run.
    given
        The setting of its probabilities, as written: ``null``, a path, or numbers.
    asked
        The setting of its control, as written.
    learns
        Whether it learns its probabilities.
    """
    control = asked.strip(" '\"") or None
    control = None if control in ("none", "null") else control
    if given.strip() in ("", "null", "~", "[]"):
        draws = bool(run.manifest.get("lisa") or draw_events(run))
        return Sampled((), control if learns else None, draws=draws, learns=learns)
    drawn = next((tuple(map(float, pi)) for _, _, pi in draw_events(run) if pi is not None), None)
    numbers = _numbers_in(given)
    record = None if numbers is not None else _record(run.path, given)
    if record is not None:
        kept = _floats(record["inclusion_probabilities"])
        # The path may hold another file by now: the draws tell.
        if kept is not None and (drawn is None or _could_be(drawn, kept, control)):
            options = {name: record[name] for name in sorted(record.keys() - {*_CIRCUMSTANCES})}
            told = record.get("control")
            control = control or (told if isinstance(told, str) and told != "none" else None)
            return _equal_or(Sampled(drawn or kept, control, json.dumps(options), learns=learns))
    return _equal_or(Sampled(drawn if drawn is not None else numbers, control, learns=learns))


def _could_be(drawn: tuple[float, ...], kept: tuple[float, ...], control: str | None) -> bool:
    """Whether a run with this control of its own may have drawn by the probabilities kept."""
    if control == "uniform":
        return len(drawn) == len(kept)
    if control in ("permuted", "reversed"):
        return _close(tuple(sorted(drawn)), tuple(sorted(kept)))
    return _close(drawn, kept)


def _equal_or(found: Sampled) -> Sampled:
    if found.control == "uniform" or (found.pi and np.ptp(found.pi) <= _TOLERANCE):
        return Sampled((), found.control if found.learns else None, learns=found.learns)
    return found


def _close(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return len(a) == len(b) and bool(np.allclose(a, b, rtol=0, atol=_TOLERANCE))


def _numbers_in(given: str) -> tuple[float, ...] | None:
    """Probabilities that stand in the setting itself, as YAML or JSON lists them."""
    items = given.replace("[", " ").replace("]", " ").replace(",", " ").split()
    return _floats([item for item in items if item != "-"])


def _floats(values: Any) -> tuple[float, ...] | None:
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return None
    return found or None


def _record(folder: Path, given: str) -> dict[str, Any] | None:
    """Probabilities file of a run: the copy in its folder, or the one at the path; None if gone."""
    for path in candidates(folder, given):
        try:
            return read_record(path)
        except (OSError, ValueError, ProbabilitiesError):
            continue
    return None
