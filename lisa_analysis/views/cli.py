"""`lisa-analyze`: findings, layers and verdict in the terminal; report, JSON and probabilities.

Heavy imports stay inside functions, so that `--help` answers at once.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lisa_analysis.contract.command_line import Parser
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.contract.paths import whole_file

if TYPE_CHECKING:
    from lisa_analysis.plans.exports import Export
    from lisa_analysis.views.analysis import Analysis, RunAnalysis
    from lisa_analysis.views.next_run import AskedExport

PROG = "lisa-analyze"
_EPILOG = """\
exit codes: 0 done; 1 findings at or above --fail-on; 2 bad input

examples:
  lisa-analyze runs/pilot --probabilities probabilities.json
  lisa-analyze runs/pilot --export peft-rank,r=8:lora.json
  lisa-analyze runs/seed-1 runs/seed-2 runs/seed-3 --probabilities probabilities.json
  lisa-analyze runs/uniform runs/learned -o comparison.html
  lisa-analyze runs
  lisa-analyze my-adapter
  lisa-analyze tuned-model --base base-model
  lisa-analyze outputs/checkpoint-500/trainer_state.json
"""
_FIRST = """\
usage: lisa-analyze RUN_DIR [RUN_DIR ...] [options]

Which layers mattered, is the run healthy, what to do next? RUN_DIR is what
lisa-train wrote, a folder of such, an adapter, a model with --base, or a log of
another trainer (trainer_state.json, TensorBoard, trackio).

  -o FILE                  the report (report.html in RUN_DIR)
  --json FILE              everything machine-readable
  --metric NAME            importance metric (of a run grad_rms, of a probe
                           grad_signal)
  --base DIR               the model before, for weights alone
  --probabilities FILE     how often LISA shall draw each layer next time
  --activated-layers K     ... for K layers at a time
  --strength S             ... from 0 (uniform) to 16, or pool
  --export KIND:FILE       for other tools: peft-rank, peft-layers, freeze, lr,
                           axolotl, llamafactory, mergekit, probabilities
  --fail-on warn|fail      exit with 1 when a finding is as bad
  -q, --quiet              print where the files are, and nothing else
  -v, --verbose            print the rules that passed, too
  --help all               every option in full, and examples

Example: lisa-analyze runs/pilot --export peft-rank,r=8:lora.json
         lisa-analyze runs/uniform runs/learned -o comparison.html"""


def build_parser() -> argparse.ArgumentParser:
    """Build the argument parser of `lisa-analyze`."""
    parser = Parser(
        prog=PROG,
        first_screen=_FIRST,
        description="Which layers mattered, is the run healthy, and how often should each layer "
        "be sampled next time?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run_dirs", nargs="+", metavar="RUN_DIR",
        help="run directory, or a folder of them; or a PEFT adapter's or a model's folder, of "
        "which weights are all there is; or another trainer's log (trainer_state.json, "
        "TensorBoard's event files, a trackio .db)",
    )  # fmt: skip
    parser.add_argument(
        "--base", metavar="DIR",
        help="the model before, in safetensors: what a tuned model or an adapter is compared with, "
        "and where a run's base model is",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="FILE",
        help="report to write (default: report.html in RUN_DIR, or in the folder that holds "
        "several; of weights NAME-report.html here)",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write everything machine-readable")
    parser.add_argument(
        "--metric", metavar="NAME",
        help="importance metric (default: of a run grad_rms, of a probe grad_signal; of weights "
        "alone delta_rel, without their base delta_norm, of a model by itself base_norm)",
    )  # fmt: skip
    parser.add_argument(
        "--fail-on", choices=("never", "warn", "fail"), default="never",
        help="exit with 1 when a finding is at least this bad (default: never)",
    )  # fmt: skip
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument(
        "-q", "--quiet", action="store_true", help="print where the files are, and nothing else"
    )
    volume.add_argument(
        "-v", "--verbose", action="store_true",
        help="print every rule with its evidence and threshold, those that passed too",
    )  # fmt: skip
    parser.add_argument("--title", metavar="TEXT", help="title of the report")
    _add_plans(parser)
    return parser


def _add_plans(parser: argparse.ArgumentParser) -> None:
    """Options of what the next run is to do with a profile."""
    group = parser.add_argument_group("for the next run")
    group.add_argument(
        "--probabilities", metavar="FILE",
        help="write sampling probabilities for lisa-train; of several runs, which must be seeds of "
        "one arm, those of the profile over seeds",
    )  # fmt: skip
    group.add_argument(
        "--activated-layers", type=int, metavar="K",
        help="layers per period that the probabilities are for (default: the run's own, or 2)",
    )  # fmt: skip
    group.add_argument(
        "--export", action="append", default=[], metavar="KIND:FILE",
        help="write the configuration of another tool; KIND is peft-rank, peft-layers, freeze, "
        "axolotl, llamafactory, lr, mergekit or probabilities, with options as in "
        "peft-rank,r=8:lora.json (docs/steering.md)",
    )  # fmt: skip
    group.add_argument(
        "--strength", metavar="S",
        help="how strongly they follow the scores: a power from 0 (uniform) to 16, 'pool' (only "
        "the layers above the mean are drawn) or 'pool=6' (only the six best); the default, 1, is "
        "mild",
    )  # fmt: skip
    group.add_argument(
        "--control", default="none", choices=("none", "permuted", "reversed", "uniform"),
        help="give the same probabilities to other layers: a placebo to compare with",
    )  # fmt: skip
    group.add_argument(
        "--control-seed", type=int, metavar="N",
        help="seed of the permutation of --control permuted (default: 0); it is written to the "
        "file",
    )  # fmt: skip
    group.add_argument(
        "--ignore-intervals", action="store_true",
        help="take the scores as if they were certain; without this, layers that are unknown get "
        "their uniform share, and all of them do where the profile is undecided",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lisa-analyze`; return 0, 1 (see `--fail-on`), 2 for bad input, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character shows its code; a name must not end the analysis.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _analyze(build_parser().parse_args(argv))
        sys.stdout.flush()
        return code
    except LisaError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted; what was not written yet is as it was.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `… | head`: nobody reads on
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the exit
        return 0
    except OSError as error:
        what = f"cannot read {error.filename}: " if error.filename else ""
        print(f"{PROG}: {what}{error.strerror or error}.", file=sys.stderr)
        return 2


def _analyze(arguments: argparse.Namespace) -> int:
    from lisa_analysis.plans.strength import Strength
    from lisa_analysis.rundir.opening import load, runs_at
    from lisa_analysis.views import terminal
    from lisa_analysis.views.analysis import Analysis
    from lisa_analysis.views.next_run import AskedExport

    if arguments.activated_layers is not None and arguments.activated_layers < 1:
        raise LisaError(f"--activated-layers is {arguments.activated_layers}; expected at least 1.")
    exports = [AskedExport.read(text) for text in arguments.export]
    strength = None if arguments.strength is None else Strength.read(arguments.strength)
    analysis = Analysis.of(
        [load(one, base=arguments.base) for path in arguments.run_dirs for one in runs_at(path)],
        arguments.metric,
        activated_layers=arguments.activated_layers,
        use_intervals=not arguments.ignore_intervals,
        strength=strength,
        control=arguments.control,
        control_seed=arguments.control_seed,
    )
    for one in analysis.runs:
        _insist(one, arguments)
    if arguments.probabilities and not analysis.alone and analysis.why_not is not None:
        raise analysis.why_not
    made = [(asked, analysis.export(asked)) for asked in exports]
    if not arguments.quiet:
        print(terminal.overview(analysis, every_rule=arguments.verbose))
    print(terminal.written(_write_files(analysis, made, arguments)))
    return _exit_code(arguments.fail_on, analysis)


def _write_files(
    analysis: "Analysis",
    made: "Sequence[tuple[AskedExport, Export]]",
    arguments: argparse.Namespace,
) -> list[tuple[str, Path]]:
    """Write what was asked for, the report last; return what each file is, and where."""
    from lisa_analysis.views import terminal
    from lisa_analysis.views.html_report import report_of

    written: list[tuple[str, Path]] = []
    if arguments.probabilities:
        if analysis.probabilities is None:
            raise analysis.why_not or LisaError(
                f"{analysis.runs[0].run.path} gives no probabilities."
            )
        _write(Path(arguments.probabilities), analysis.probabilities.save)
        written.append(("probabilities", Path(arguments.probabilities)))
    for asked, export in made:
        if not arguments.quiet:
            print(terminal.exported(export))
        _write(asked.path, export.save)
        written.append((asked.kind, asked.path))
    if arguments.json:
        from lisa_analysis.views.json_output import to_json

        text = to_json(analysis)
        _write(Path(arguments.json), lambda path: _write_text(path, text))
        written.append(("json", Path(arguments.json)))
    output = Path(arguments.output) if arguments.output else _default_output(analysis)
    report = report_of(analysis, probabilities=analysis.probabilities, title=arguments.title)
    _write(output, report.save)
    written.append(("report", output))
    return written


def _insist(one: "RunAnalysis", arguments: argparse.Namespace) -> None:
    """Look at a run; what was asked for by name and cannot be had ends the command."""
    _ = one.diagnostics
    if arguments.metric is not None and one.why_no_profile is not None:
        raise one.why_no_profile
    asked = arguments.activated_layers or arguments.strength is not None
    if asked and one.profile is not None and one.why_not is not None:
        raise one.why_not


def _write(path: Path, save: Callable[[Path], object]) -> None:
    try:
        save(path)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise LisaError(f"cannot write {path}: {error.strerror or error}.") from None


def _write_text(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write_text(text, encoding="utf-8")


def _default_output(analysis: "Analysis") -> Path:
    run = analysis.runs[0].run
    path = run.path
    if not (run.has_course and run.has_layers):  # nothing is put into what others wrote
        return Path(f"{path.resolve().name}-report.html")
    return path / "report.html" if analysis.alone else path.resolve().parent / "report.html"


def _exit_code(fail_on: str, analysis: "Analysis") -> int:
    bad = {"never": set(), "warn": {"warn", "fail"}, "fail": {"fail"}}[fail_on]
    states = {finding.state for one in analysis.runs for finding in one.diagnostics.findings}
    return 1 if states & bad else 0
