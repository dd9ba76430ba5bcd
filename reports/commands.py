"""What the command of a study of many runs takes, and how it goes through its plans."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cells import Cell, run_cells

from lisa_analysis.contract.errors import LisaError


class Planned(Protocol):
    """A plan: what is to be run as far as the logs at hand tell it."""

    def cells(self) -> list[Cell]:
        """Return every run that is known so far, finished ones as well."""


def parser(about: str | None, work: str) -> argparse.ArgumentParser:
    """Return the parser of a study's words; `work` is where training writes."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawTextHelpFormatter)
    made.add_argument("--page", action="store_true", help="train nothing")
    made.add_argument("--time", action="store_true", help="only what is timed, one run at a time")
    made.add_argument("--only", help="some of them, separated by commas")
    made.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    made.add_argument("--minutes", type=float, help="begin no further run after so long")
    made.add_argument("--work", type=Path, default=Path(work), help="where training writes")
    return made


def named(only: str | None, known: Sequence[str]) -> list[str]:
    """Return the names that `--only` gives, or all."""
    names = only.split(",") if only else list(known)
    unknown = set(names) - set(known)
    if unknown:
        raise LisaError(f"--only names {min(unknown)}; there are {', '.join(known)}.")
    return names


def run_plans(
    plans: Sequence[Planned], kept: Path, work: Path, jobs: int, minutes: float | None
) -> None:
    """Run what is missing of each plan; a rate that is found makes new runs known.

    Raises
    ------
    LisaError
        When runs of some plans fail; the other plans are gone through first.
    """
    begun = time.monotonic()
    failed = []
    for plan in plans:
        try:
            while any(not (kept / cell.name).exists() for cell in plan.cells()):
                left = None if minutes is None else 60 * minutes - (time.monotonic() - begun)
                if left is not None and left <= 0:
                    break
                run_cells(plan.cells(), kept, work, jobs=jobs, seconds=left)
        except LisaError as error:
            failed.append(str(error))
    if failed:
        raise LisaError("\n".join(failed))
