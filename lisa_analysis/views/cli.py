"""`lisa-analyze`: findings, layers and verdict in the terminal; report, JSON and probabilities.

Heavy imports stay inside functions, so that `--help` answers at once.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import LisaError

if TYPE_CHECKING:
    from lisa_analysis.rundir.run import Run

PROG = "lisa-analyze"
_EPILOG = """\
exit codes: 0 done; 1 findings at or above --fail-on; 2 bad input

examples:
  lisa-analyze runs/pilot --probabilities probabilities.json
  lisa-analyze runs/uniform runs/learned -o comparison.html
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser of `lisa-analyze`."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Which layers mattered, is the run healthy, and how often should each layer "
        "be sampled next time?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="run directory")
    parser.add_argument(
        "-o", "--output", metavar="FILE",
        help="report to write (default: report.html in RUN_DIR, or in the folder that holds "
        "several)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write everything machine-readable")
    parser.add_argument(
        "--probabilities", metavar="FILE", help="write sampling probabilities for lisa-train"
    )
    parser.add_argument("--metric", metavar="NAME", help="importance metric (default: grad_rms)")
    parser.add_argument(
        "--activated-layers", type=int, metavar="K",
        help="layers per interval that the probabilities are for (default: the run's own, or 2)",
    )  # fmt: skip
    parser.add_argument(
        "--ignore-intervals", action="store_true",
        help="make the probabilities from the scores as if they were certain; without this, what "
        "the intervals leave open is sampled uniformly",
    )  # fmt: skip
    parser.add_argument(
        "--fail-on", choices=("never", "warn", "fail"), default="never",
        help="exit with 1 when a finding is at least this bad (default: never)",
    )  # fmt: skip
    parser.add_argument("--title", metavar="TEXT", help="title of the report")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lisa-analyze`; return 0, 1 (see `--fail-on`) or 2 for bad input."""
    arguments = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character shows its code; a name must not end the analysis.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _analyze(arguments)
        sys.stdout.flush()
        return code
    except LisaError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `… | head`: nobody reads on
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the exit
        return 0
    except OSError as error:
        what = f"cannot read {error.filename}: " if error.filename else ""
        print(f"{PROG}: {what}{error.strerror or error}.", file=sys.stderr)
        return 2


def _analyze(arguments: argparse.Namespace) -> int:
    import lisa_analysis as la
    from lisa_analysis.views import terminal

    if arguments.activated_layers is not None and arguments.activated_layers < 1:
        raise LisaError(f"--activated-layers is {arguments.activated_layers}; expected at least 1.")
    if arguments.probabilities and len(arguments.run_dirs) > 1:
        raise LisaError(
            f"--probabilities takes one run to learn from, got {len(arguments.run_dirs)}; "
            "name the pilot run alone."
        )
    runs = [la.load(path) for path in arguments.run_dirs]
    written: list[tuple[str, Path]] = []
    results = [_Result.of(run, arguments) for run in runs]
    metric = {} if arguments.metric is None else {"metric": arguments.metric}
    comparison = la.compare(runs, **metric) if len(runs) > 1 else None

    for result in results:
        print(terminal.findings(result.run, result.diagnostics))
        if comparison is None and result.profile is not None:
            print(terminal.profile(result.profile, result.probabilities))
        elif result.profile is None:
            print(f"No profile: {result.why_not}\n")
    if comparison is not None:
        print(terminal.comparison(comparison))

    if arguments.probabilities:
        _write(Path(arguments.probabilities), results[0].probabilities_or_raise().save)
        written.append(("probabilities", Path(arguments.probabilities)))
    if arguments.json:
        from lisa_analysis.views.json_output import to_json

        text = to_json(results, comparison)
        _write(Path(arguments.json), lambda path: path.write_text(text, encoding="utf-8"))
        written.append(("json", Path(arguments.json)))
    output = Path(arguments.output) if arguments.output else _default_output(runs)
    report = la.report(
        runs, metric=arguments.metric, probabilities=results[0].probabilities, title=arguments.title
    )
    _write(output, report.save)
    written.append(("report", output))
    print(terminal.written(written))
    return _exit_code(arguments.fail_on, results)


def _write(path: Path, save: Callable[[Path], object]) -> None:
    try:
        save(path)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LisaError(f"cannot write {path}: {error.strerror or error}.") from None


def _default_output(runs: "list[Run]") -> Path:
    if len(runs) == 1:
        return runs[0].path / "report.html"
    return runs[0].path.resolve().parent / "report.html"


class _Result:
    """What is known of one run: diagnostics, profile and, where possible, probabilities."""

    def __init__(self, run: "Run", diagnostics: Any, profile: Any) -> None:
        self.run, self.diagnostics, self.profile = run, diagnostics, profile
        self.probabilities: Any = None
        self.why_not: LisaError | None = None

    @classmethod
    def of(cls, run: "Run", arguments: argparse.Namespace) -> "_Result":
        import lisa_analysis as la

        metric = {} if arguments.metric is None else {"metric": arguments.metric}
        result = cls(run, la.diagnose(run), None)
        try:
            result.profile = la.importance(run, **metric)
        except LisaError as error:
            if arguments.metric is not None:
                raise
            result.why_not = error  # a run that has just begun has findings all the same
            return result
        k = arguments.activated_layers or (run.manifest.get("lisa") or {}).get("activated_layers")
        try:
            result.probabilities = la.sampling_probabilities(
                result.profile,
                activated_layers=k or min(2, run.n_layers),
                use_intervals=not arguments.ignore_intervals,
            )
        except LisaError as error:
            if arguments.activated_layers:
                raise
            result.why_not = error
        return result

    def probabilities_or_raise(self) -> Any:
        if self.probabilities is None:
            raise self.why_not or LisaError(f"{self.run.path} gives no probabilities.")
        return self.probabilities


def _exit_code(fail_on: str, results: list[_Result]) -> int:
    bad = {"never": set(), "warn": {"warn", "fail"}, "fail": {"fail"}}[fail_on]
    states = {finding.state for result in results for finding in result.diagnostics.findings}
    return 1 if states & bad else 0
