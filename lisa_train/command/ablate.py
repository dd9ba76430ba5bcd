"""`lisa-ablate`: what every layer's change was worth in a finished run. No torch up here."""

import argparse
import sys
import traceback
from collections.abc import Sequence

from lisa_analysis.contract.command_line import Parser
from lisa_analysis.contract.errors import ConfigError, LisaError
from lisa_train.command.interruption import stop_on_signals
from lisa_train.command.together import (
    LostProcessError,
    all_are_done,
    first_alone,
    is_first,
    is_to_say,
)
from lisa_train.command.volume import at_volume

PROG = "lisa-ablate"
_FIRST = """\
usage: lisa-ablate RUN_DIR [options]
       lisa-ablate RUN_DIR --restore 3,17 --output DIR

What was every layer's change worth? Held-out loss with the change taken out of
the trained model, and put into the base alone; what it costs on general text.

  --data DATASET           examples to measure (what the run held out)
  --general FILE|none      general text (64 passages of books)
  --by layer|kind|both     units: layers, the kinds within each, or both (layer)
  --range N                also every run of N layers
  --max_examples N|all     examples of each data (64)
  --bf16                   compute in bfloat16
  --restore LAYERS         write the model with these put back, to --output DIR
  --model DIR, --base DIR  where they are, if not where the run says
  -q, --quiet              print where the file is, and errors alone
  -v, --verbose            what the libraries say too, and tracebacks
  --help all               every option in full

Example: lisa-ablate runs/lora-20260101-120000 --by kind
Next: lisa-analyze RUN_DIR"""
_EXTRA = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "jsonargparse", "yaml"}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of `lisa-ablate`."""
    parser = Parser(
        prog=PROG,
        first_screen=_FIRST,
        description="Measure what every layer's change was worth: held-out loss with the change "
        "taken out of the trained model, and put into the base alone; and what it costs on general "
        "text. The losses are written to RUN_DIR/ablation.parquet, and a table is printed.",
        epilog="An interrupted call goes on where it stopped; another --by or --range adds its "
        "rows. Example: lisa-ablate runs/lora-20260101-120000 --by kind",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a finished run of lisa-train")
    _add_measuring(parser)
    parser.add_argument(
        "--restore",
        metavar="LAYERS",
        help="write the model or adapter with these put back, as 3,17,20-22,embed; 'auto': those "
        "that the ablation proposes",
    )
    parser.add_argument("--output", metavar="DIR", help="where --restore writes; a new folder")
    parser.add_argument(
        "--model", metavar="DIR", help="trained weights or adapter, if not in RUN_DIR"
    )
    parser.add_argument(
        "--base", metavar="DIR", help="the base model, if not where the run's config.yaml says"
    )
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="print where the file is, and errors alone"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true",
        help="print what the libraries say too, and the traceback of what is refused",
    )  # fmt: skip
    return parser


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    """Add the options of what is measured, and on what."""
    parser.add_argument(
        "--data",
        metavar="DATASET",
        help="examples to measure, as for lisa-train; default: what the run held out",
    )
    parser.add_argument(
        "--general",
        metavar="FILE",
        help="general text: a .txt file of paragraphs, or a dataset with text; 'none' leaves it "
        "out; default: 64 passages of books in the public domain, for language models",
    )
    parser.add_argument(
        "--by",
        choices=("layer", "kind", "both"),
        default="layer",
        help="layers and groups (embed, head, norm), every layer's kinds (attn.q, …), or both",
    )
    parser.add_argument(
        "--range",
        metavar="N",
        help="also every run of N layers; or ranges themselves, as 0-3,4-7",
    )
    parser.add_argument(
        "--max_examples",
        metavar="N",
        default="64",
        help="examples of each data at most, evenly spread, or 'all' (default 64); the precision "
        "that it buys is printed: four times as many halve the intervals",
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="compute in bfloat16: faster where the processor has it, and less precise",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `lisa-ablate`; return 0, 2 for bad input, or 130 after Ctrl-C or SIGTERM."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        stop_on_signals()
        arguments = build_parser().parse_args(words)
        _check(arguments)
        with at_volume(quiet=arguments.quiet, verbose=arguments.verbose):
            _run(arguments)
    except LisaError as error:
        if {"-v", "--verbose"} & set(words):
            traceback.print_exc()
        if is_to_say(str(error), consequence=isinstance(error, LostProcessError)):
            print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _EXTRA:
            raise
        print(
            f"{PROG}: {error.name} is not installed; an ablation needs an extra: "
            'pip install "lisa-toolkit[train]"',
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        if is_to_say("interrupted", consequence=True):
            print(
                f"{PROG}: interrupted; what was measured is kept, the same call goes on from "
                "there.",
                file=sys.stderr,
            )
        return 130
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.restore is None) != (arguments.output is None):
        given, missing = ("--restore", "--output DIR") if arguments.restore else (
            "--output", "--restore LAYERS"
        )  # fmt: skip
        raise ConfigError(f"{given} needs {missing} beside it.")
    measuring = arguments.range or arguments.by != "layer" or arguments.bf16
    if arguments.restore is not None and measuring:
        raise ConfigError(
            "--restore writes weights and measures no units: leave out --by, --range and --bf16."
        )
    if arguments.quiet and arguments.verbose:
        raise ConfigError("--quiet and --verbose ask for opposite things; leave one of them out.")
    if arguments.max_examples != "all" and not arguments.max_examples.isdecimal():
        raise ConfigError(
            f"--max_examples is {arguments.max_examples!r}; expected a number of examples, or all."
        )


def _run(arguments: argparse.Namespace) -> None:
    most = None if arguments.max_examples == "all" else int(arguments.max_examples)
    shared = {
        "data": arguments.data,
        "general": False if arguments.general == "none" else arguments.general,
        "max_examples": most,
        "model": arguments.model,
        "base": arguments.base,
    }
    if arguments.restore is not None:
        if not first_alone():
            return
        from lisa_train.command.ablate_restore import restore

        say = _nothing if arguments.quiet else print
        found = restore(arguments.run_dir, arguments.restore, arguments.output, say=say, **shared)
        if arguments.quiet:
            print(found.path)
        return
    from lisa_train.command.ablate_run import ablate, note

    try:
        done = ablate(
            arguments.run_dir, by=arguments.by, ranges=arguments.range, bf16=arguments.bf16,
            progress=False if arguments.quiet else None, say=_nothing if arguments.quiet else note,
            **shared,
        )  # fmt: skip
        if is_first():
            print(done.path if arguments.quiet else done)
        all_are_done()
    except RuntimeError as error:
        from lisa_train.model.parallel import lost_a_process

        if not lost_a_process(error):
            raise
        raise LostProcessError(
            f"another process ended, and this one cannot go on alone ({error}); what was measured "
            "is kept, the same call goes on from there."
        ) from error


def _nothing(text: str) -> None:
    """Take what a quiet command does not say."""


if __name__ == "__main__":
    sys.exit(main())
