"""What does LISA cost and gain beside other methods? One command; it goes on where it stopped.

python reports/2026-11-27-methods/study.py             run what is missing, then page and figure
python reports/2026-11-27-methods/study.py --page      page and figure from the logs alone
python reports/2026-11-27-methods/study.py --time      seconds and memory alone: on an idle machine
python reports/2026-11-27-methods/study.py --only pos  one task
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import run_cells
from commands import named, parser, run_plans
from methods import tasks
from page import draw, tables
from pages import write_tables
from plan import SEEDS, Plan

from lisa_analysis.contract.errors import LisaError

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"


def main() -> int:
    """Run what is missing, then write page and figure."""
    arguments = parser(__doc__, "runs/methods").parse_args()
    work = arguments.work.resolve()
    try:
        plans = {name: Plan(task, RUNS) for name, task in tasks(work).items()}
        if not arguments.page:
            chosen = [plans[name] for name in named(arguments.only, list(plans))]
            if arguments.time:
                time_alone(chosen, work)
            else:
                run_plans(chosen, RUNS, work, arguments.jobs, arguments.minutes)
        write_tables(HERE / "README.md", tables(list(plans.values())))
        draw(list(plans.values()), HERE / "methods.png")
    except LisaError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


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
