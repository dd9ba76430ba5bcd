"""Does a profile help, of what kind, at equal cost? One command; it goes on where it stopped.

python reports/2026-11-27-sampling/study.py             run what is missing, then page and figures
python reports/2026-11-27-sampling/study.py --page      page and figures from the logs alone
python reports/2026-11-27-sampling/study.py --time      seconds alone, on an idle machine
python reports/2026-11-27-sampling/study.py --only pos  one environment
"""

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import Cell, run_cells
from environments import environments
from page import tables
from pages import write_tables
from plan import Plan

from lisa_analysis.contract.errors import LisaError

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"


def main() -> int:
    """Run what is missing, then write page and figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="train nothing")
    parser.add_argument("--time", action="store_true", help="only what is timed, one run at a time")
    parser.add_argument("--only", help="environments, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--minutes", type=float, help="begin no further run after so long")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/sampling"), help="where training writes"
    )
    arguments = parser.parse_args()
    try:
        if not arguments.page:
            names = arguments.only.split(",") if arguments.only else None
            work, left = arguments.work.resolve(), arguments.minutes
            chosen = _plans(names, work)
            if arguments.time:
                time_alone(chosen, work, left)
            else:
                run(chosen, work, arguments.jobs, left)
        plans = [Plan(e, RUNS, arguments.work) for e in environments(arguments.work).values()]
        write_tables(HERE / "README.md", tables(plans))
    except LisaError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


def _plans(names: list[str] | None, work: Path) -> list[Plan]:
    known = environments(work)
    unknown = set(names or ()) - set(known)
    if unknown:
        raise LisaError(f"--only names {min(unknown)}; there are {', '.join(known)}.")
    return [Plan(known[name], RUNS, work) for name in names or known]


def run(plans: list[Plan], work: Path, jobs: int, minutes: float | None) -> None:
    """Run the plans of some environments; rates first, since everything else waits for them."""
    begun = time.monotonic()
    for plan in plans:
        while cells := _missing(plan):
            left = None if minutes is None else 60 * minutes - (time.monotonic() - begun)
            if left is not None and left <= 0:
                return
            run_cells(cells, RUNS, work, jobs=jobs, seconds=left)


def time_alone(plans: list[Plan], work: Path, minutes: float | None) -> None:
    """Make the timed runs whose sources are there, with every processor and nothing beside them.

    Other runs may be made beside each other and beside other work: their seconds are not read.
    """
    left = None if minutes is None else 60 * minutes
    for plan in plans:
        cells = [plan.timed_probe(), *(plan.timed(arm) for arm in plan.arms.values())]
        run_cells(cells, RUNS, work, jobs=1, threads=os.cpu_count() or 1, seconds=left)


def _missing(plan: Plan) -> list[Cell]:
    cells = plan.cells()
    return cells if any(not (RUNS / cell.name).exists() for cell in cells) else []


if __name__ == "__main__":
    sys.exit(main())
