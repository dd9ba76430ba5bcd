"""Which proxy of a layer's importance predicts what the layer's change was worth? One command.

python reports/2026-11-27-validity/study.py                 run what is missing; page and figures
python reports/2026-11-27-validity/study.py --analyse       page and figures from the kept logs
python reports/2026-11-27-validity/study.py --minutes 60    begin no further run after an hour
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cells import run_cells
from findings import RUNS, analyse
from plan import METHODS, SEEDS, TASKS, cells
from priors import keep_priors

from lisa_analysis.contract.errors import LisaError


def main() -> int:
    """Run what is missing, then write tables and figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--analyse", action="store_true", help="run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default 2)")
    parser.add_argument("--minutes", type=float, help="begin no further run after so many")
    parser.add_argument("--only", default="", help="runs whose name begins so")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/validity"), help="where training writes"
    )
    arguments = parser.parse_args()
    try:
        if not arguments.analyse:
            chosen = [cell for cell in cells() if cell.name.startswith(arguments.only)]
            seconds = None if arguments.minutes is None else 60 * arguments.minutes
            run_cells(chosen, RUNS, arguments.work, jobs=arguments.jobs, seconds=seconds,
                      say=lambda line: print(line, flush=True))  # fmt: skip
            keep_priors(_first_of_every_task())
        analyse()
    except LisaError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


def _first_of_every_task() -> dict[str, Path]:
    kept = [(t, RUNS / t / m / f"s{s}") for t in TASKS for m in METHODS for s in SEEDS]
    return {task: folder for task, folder in reversed(kept) if folder.exists()}


if __name__ == "__main__":
    sys.exit(main())
