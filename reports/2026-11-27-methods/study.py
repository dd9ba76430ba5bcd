"""What does LISA cost and gain beside other methods? One command; it goes on where it stopped.

python reports/2026-11-27-methods/study.py             run what is missing, then page and figure
python reports/2026-11-27-methods/study.py --page      page and figure from the logs alone
python reports/2026-11-27-methods/study.py --time      seconds and memory alone: on an idle machine
python reports/2026-11-27-methods/study.py --only pos  one task
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import Cell, run_cells
from methods import tasks
from page import draw, tables
from pages import write_tables
from plan import SEEDS, Plan

from lisa_analysis.contract.errors import LisaError

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"


def main() -> int:
    """Run what is missing, then write page and figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="train nothing")
    parser.add_argument("--time", action="store_true", help="only what is timed, one run at a time")
    parser.add_argument("--only", help="tasks, separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--minutes", type=float, help="begin no further run after so long")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/methods"), help="where training writes"
    )
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    try:
        plans = {name: Plan(task, RUNS) for name, task in tasks(work).items()}
        if not arguments.page:
            names = arguments.only.split(",") if arguments.only else list(plans)
            unknown = set(names) - set(plans)
            if unknown:
                raise LisaError(f"--only names {min(unknown)}; there are {', '.join(plans)}.")
            chosen = [plans[name] for name in names]
            if arguments.time:
                time_alone(chosen, work)
            else:
                run(chosen, work, arguments.jobs, arguments.minutes)
        write_tables(HERE / "README.md", tables(list(plans.values())))
        draw(list(plans.values()), HERE / "methods.png")
    except LisaError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


def run(plans: Sequence[Plan], work: Path, jobs: int, minutes: float | None) -> None:
    """Run what is missing of each task; a rate that is found makes new runs known."""
    begun = time.monotonic()
    for plan in plans:
        while cells := _missing(plan):
            left = None if minutes is None else 60 * minutes - (time.monotonic() - begun)
            if left is not None and left <= 0:
                return
            run_cells(cells, RUNS, work, jobs=jobs, seconds=left)


def _missing(plan: Plan) -> list[Cell]:
    return [cell for cell in plan.cells() if not (RUNS / cell.name).exists()]


def time_alone(plans: Sequence[Plan], work: Path) -> None:
    """Make the timed runs, each in a process of its own, with every processor and nothing beside.

    A process that made another run before would report that one's memory.
    """
    threads = os.cpu_count() or 1
    for plan in plans:
        run_cells([plan.probe(SEEDS[0] + 1)], RUNS, work, jobs=1)
        for method in plan.methods.values():
            run_cells([plan.timed(method)], RUNS, work, jobs=1, threads=threads)


if __name__ == "__main__":
    sys.exit(main())
