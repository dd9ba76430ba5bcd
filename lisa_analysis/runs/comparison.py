"""Comparison: what several runs achieved, cost and ranked, as tables and in words."""

import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lisa_analysis.contract.errors import LisaError, suggest
from lisa_analysis.contract.paths import as_path, to_write, whole_file
from lisa_analysis.profiles.plain_values import to_plain

# Columns of the table of runs that a notebook shows, and what it calls them.
_SHOWN = {
    "run": "run", "arm": "arm", "seed": "seed", "steps": "steps", "tokens": "tokens",
    "seconds": "seconds", "peak_memory_bytes": "peak memory, GB", "held_out_loss": "held-out loss",
    "loss_at_equal_steps": "at equal steps", "loss_at_equal_seconds": "at equal time",
}  # fmt: skip

# Tables in the file, and the attributes that hold them.
_FRAMES = {
    "runs": "table", "arms": "arms", "differences": "differences", "profiles": "profiles",
    "rank_agreement": "rank_agreement", "curves": "curves",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs side by side. Made by `compare`.

    Attributes
    ----------
    table
        One row per run: run, arm, method, status, seed, steps, tokens, seconds,
        peak_memory_bytes, held_out_loss (the last), and held-out loss at the largest number of
        steps, tokens and seconds that all runs reached.
    arms
        One row per arm, runs that differ in nothing but the seed: arm, runs, seeds, mean (of the
        held-out loss at equal steps) with low and high (Student's t over seeds, three or more;
        seeds are those with a loss, where any has one),
        method, and kendall, the mean of Kendall's τ between its runs.
    differences
        One row per pair of arms: a, b, mean of a's loss less b's, low, high, pairs of runs of one
        seed behind it (0: not paired, Welch's interval), and lower and higher, the pairs in which
        a is that. Where one of the two samples uniformly or is a placebo it is b.
    profiles
        One row per layer, one column per run: share of the total score; NaN is unknown.
    rank_agreement
        One row per pair of runs, see `lisa_analysis.profiles.agreement.Agreement`.
    concordance
        Kendall's W over all runs with the same layers; NaN for fewer than three.
    curves
        Every evaluation: run, step, tokens, seconds, held_out_loss.
    statement
        The same in words; different models or data are said first.
    """

    metric: str
    table: pd.DataFrame = field(repr=False)
    arms: pd.DataFrame = field(repr=False)
    differences: pd.DataFrame = field(repr=False)
    profiles: pd.DataFrame = field(repr=False)
    rank_agreement: pd.DataFrame = field(repr=False)
    concordance: float
    curves: pd.DataFrame = field(repr=False)
    statement: str = ""

    @property
    def seeds(self) -> pd.DataFrame:
        """The arms under the names that these columns had before."""
        frame = self.arms.rename(columns={"arm": "configuration", "mean": "held_out_loss"})
        return frame[["configuration", "method", "runs", "held_out_loss", "low", "high", "kendall"]]

    def difference(self, a: str, b: str) -> dict[str, Any]:
        """Row of `differences` for two arms, turned so that it is a's loss less b's.

        Raises
        ------
        LisaError
            When there is no such pair of arms.
        """
        names = list(self.arms["arm"])
        for name in (a, b):
            if name not in names:
                raise LisaError(
                    f"there is no arm {name!r}: there are {', '.join(names)}.{suggest(name, names)}"
                )
        rows: list[dict[str, Any]] = self.differences.to_dict("records")  # type: ignore[assignment]
        for row in rows:
            if (row["a"], row["b"]) == (a, b):
                return row
            if (row["a"], row["b"]) == (b, a):
                # A file of an earlier version has no `higher`.
                higher = row.get("higher", row["pairs"] - row["lower"] if row["pairs"] else None)
                return row | {
                    "a": a, "b": b, "mean": -row["mean"], "low": -row["high"],
                    "high": -row["low"], "lower": higher, "higher": row["lower"],
                }  # fmt: skip
        raise LisaError(f"an arm has no difference from itself: got {a!r} twice.")

    def to_frame(self) -> pd.DataFrame:
        """One row per run."""
        return self.table.copy()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        record = {
            "metric": self.metric,
            "statement": self.statement,
            "concordance": self.concordance,
            "runs": self.table.to_dict("records"),
            "arms": self.arms.to_dict("records"),
            "differences": self.differences.to_dict("records"),
            "profiles": self.profiles.to_dict("records"),
            "rank_agreement": self.rank_agreement.to_dict("records"),
            "seeds": self.seeds.to_dict("records"),
        }
        plain: dict[str, Any] = to_plain(record)
        return plain

    def save(self, path: str | Path) -> Path:
        """Write the table of runs as `.csv`, or everything as `.json`, which `load` reads."""
        path = to_write(path, "save")
        if path.suffix == ".json":
            record = self.to_dict() | {
                "curves": to_plain(self.curves.to_dict("records")),
                "columns": {n: list(getattr(self, attribute)) for n, attribute in _FRAMES.items()},
            }
            text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
            with whole_file(path) as file:
                file.write_text(text + "\n", encoding="utf-8")
        elif path.suffix == ".csv":
            with whole_file(path) as file:
                self.table.to_csv(file, index=False, encoding="utf-8")
        else:
            raise LisaError(f"cannot save a comparison as {path.name!r}: use .csv or .json.")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Comparison":
        """Read a comparison that was saved as `.json`.

        Raises
        ------
        LisaError
            When the file cannot be read or holds no comparison.
        """
        path = as_path(path, "Comparison.load")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            frames = {
                attribute: pd.DataFrame(record[name], columns=record["columns"][name])
                for name, attribute in _FRAMES.items()
            }
            concordance = record["concordance"]
            return cls(
                metric=record["metric"],
                concordance=float("nan") if concordance is None else concordance,
                statement=record["statement"],
                **frames,
            )
        except OSError as error:
            raise LisaError(f"{path} cannot be read ({error.strerror or error}).") from None
        except (KeyError, TypeError, ValueError) as error:
            raise LisaError(
                f"{path} holds no comparison ({type(error).__name__}: {error}): give a file that "
                "Comparison.save wrote as .json."
            ) from None

    def __repr__(self) -> str:
        return f"<Comparison of {len(self.table)} runs in {len(self.arms)} arms by {self.metric}>"

    def _repr_html_(self) -> str:
        peak = pd.to_numeric(self.table["peak_memory_bytes"]) / 1e9  # None where unknown
        shown = self.table.assign(peak_memory_bytes=peak)
        table = _to_html(shown[list(_SHOWN)].rename(columns=_SHOWN))
        repeated = "".join(
            _to_html(frame)
            for frame in (self.arms.drop(columns=["method", "kendall"]), self.differences)
            if len(frame) and len(self.arms) < len(self.table)
        )
        pairs = _to_html(self.rank_agreement)
        return (
            f"<section><p>{html.escape(self.statement)}</p>{table}{repeated}"
            f"<details><summary>Agreement of profiles</summary>{pairs}</details></section>"
        )


def _to_html(frame: pd.DataFrame) -> str:
    """Escaped HTML table."""
    return frame.to_html(index=False, border=0, float_format=lambda value: f"{value:.4g}")
