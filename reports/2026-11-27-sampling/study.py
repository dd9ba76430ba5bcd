"""Does a profile help, of what kind, at equal cost? One command; it goes on where it stopped.

python reports/2026-11-27-sampling/study.py             run what is missing, then page and figures
python reports/2026-11-27-sampling/study.py --page      page and figures from the logs alone
python reports/2026-11-27-sampling/study.py --time      seconds alone, on an idle machine
python reports/2026-11-27-sampling/study.py --only pos  one environment
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import run_cells
from commands import named, parser, run_plans
from environments import environments
from page import write
from plan import Plan

from lisa_analysis.contract.errors import LisaError

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"


def main() -> int:
    """Run what is missing, then write page and figures."""
    arguments = parser(__doc__, "runs/sampling").parse_args()
    try:
        if not arguments.page:
            work, left = arguments.work.resolve(), arguments.minutes
            known = environments(work, mixed=True)
            chosen = [Plan(known[n], RUNS, work) for n in named(arguments.only, list(known))]
            if arguments.time:
                time_alone(chosen, work, left)
            else:
                run_plans(chosen, RUNS, work, arguments.jobs, left)
        plans = [
            Plan(e, RUNS, arguments.work) for e in environments(arguments.work, mixed=True).values()
        ]
        write(plans, HERE)
    except LisaError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


def time_alone(plans: list[Plan], work: Path, minutes: float | None) -> None:
    """Make the timed runs whose sources are there, with every processor and nothing beside them.

    Other runs may be made beside each other and beside other work: their seconds are not read.
    """
    left = None if minutes is None else 60 * minutes
    for plan in plans:
        cells = [plan.timed_probe(), *(plan.timed(arm) for arm in plan.timed_arms())]
        run_cells(cells, RUNS, work, jobs=1, threads=os.cpu_count() or 1, seconds=left)


if __name__ == "__main__":
    sys.exit(main())
