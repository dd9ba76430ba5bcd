"""Finding and Diagnostics: what the rules found, as objects and as a table."""

import html
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lisa_analysis.contract import reprs as notebook
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.paths import as_path, to_write, whole_file

if TYPE_CHECKING:
    import pandas as pd

State = Literal["ok", "info", "warn", "fail", "could not run"]
# Worst first; a rule that could not run is worse than one that passed.
STATES: tuple[State, ...] = ("fail", "warn", "could not run", "info", "ok")


@dataclass(frozen=True)
class Finding:
    """What one rule found.

    Attributes
    ----------
    id, title
        Of the rule.
    state
        ``ok``, ``info``, ``warn``, ``fail`` or ``could not run``.
    evidence
        Numbers of this run, in a sentence; the reason when the rule could not run.
    threshold
        When the rule fires.
    meaning, advice
        Why it matters and what to try.
    layers
        Layers concerned.
    step
        First step concerned, or None.
    """

    id: str
    state: State
    title: str
    evidence: str
    threshold: str
    meaning: str
    advice: str
    layers: tuple[int, ...] = ()
    step: int | None = None


@dataclass(frozen=True)
class Diagnostics:
    """All findings of a run, worst first."""

    run_id: str
    findings: tuple[Finding, ...] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: no finding is ``warn`` or ``fail``."""
        return not any(finding.state in ("warn", "fail") for finding in self.findings)

    def __getitem__(self, rule: str) -> Finding:
        """Finding of the rule with this id; `KeyError` when it does not apply to the run."""
        for finding in self.findings:
            if finding.id == rule:
                return finding
        raise KeyError(rule)

    def counts(self) -> dict[str, int]:
        """Number of findings by state, worst first."""
        return {s: sum(finding.state == s for finding in self.findings) for s in STATES}

    def to_frame(self) -> "pd.DataFrame":
        """One row per finding."""
        import pandas as pd

        return pd.DataFrame([asdict(finding) for finding in self.findings])

    def save(self, path: str | Path) -> Path:
        """Write the findings as `.json` or `.csv`."""
        path = to_write(path, "save")
        if path.suffix == ".json":
            records = [asdict(finding) for finding in self.findings]
            content = {"run_id": self.run_id, "findings": records}
            text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
            with whole_file(path) as file:
                file.write_text(text + "\n", encoding="utf-8")
        elif path.suffix == ".csv":
            with whole_file(path) as file:
                self.to_frame().to_csv(file, index=False, encoding="utf-8")
        else:
            raise LisaError(f"cannot save findings as {path.name!r}: use .csv or .json.")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Diagnostics":
        """Read findings that were saved as `.json`.

        Raises
        ------
        LisaError
            When the file cannot be read or holds no findings.
        """
        path = as_path(path, "Diagnostics.load")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            rows = [row | {"layers": tuple(row["layers"])} for row in record["findings"]]
            return cls(str(record["run_id"]), tuple(Finding(**row) for row in rows))
        except OSError as error:
            raise LisaError(f"{path} cannot be read ({error.strerror or error}).") from None
        except (KeyError, TypeError, ValueError) as error:
            raise LisaError(
                f"{path} holds no findings ({type(error).__name__}: {error}): give a file that "
                "Diagnostics.save wrote as .json."
            ) from None

    def __repr__(self) -> str:
        found = ", ".join(f"{count} {state}" for state, count in self.counts().items() if count)
        return f"<Diagnostics of {self.run_id}: {found or 'no rule applies'}>"

    def _repr_html_(self) -> str:
        rows: list[tuple[str, ...]] = [
            (f.state, f.title, f.evidence, f.advice if f.state in ("warn", "fail") else "")
            for f in self.findings
        ]
        headings = ["state", "rule", "evidence", "try"]
        if not any(row[3] for row in rows):
            headings, rows = headings[:3], [row[:3] for row in rows]
        return f"<p>{html.escape(repr(self)[1:-1])}</p>{notebook.sentences(headings, rows)}"
