"""`ablate(run_dir)`: what every layer of a finished run learned, taken out and put in alone."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.schema import LOCK
from lisa_train.checks import whole
from lisa_train.command.ablate_examples import general_rows, held_out_rows
from lisa_train.command.ablate_inputs import TrainedRun, load_trained, open_run
from lisa_train.command.together import agreed, all_are_here, is_first, meet

if TYPE_CHECKING:
    from torch import nn

    from lisa_train.measure.ablation.ablating import Cost
    from lisa_train.measure.ablation.file import AblationFile, Measured
    from lisa_train.measure.ablation.losses import ExampleLosses, Examples
    from lisa_train.measure.ablation.summary import Summary
    from lisa_train.measure.ablation.units import AblatedUnit, By, Ranges

MAX_EXAMPLES = 64
# Positions of a batch: enough for the products to be large, few enough for the logits of a large
# vocabulary (100 MB for 49,152).
_TOKENS = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class Ablation:
    """What `ablate` found; the losses themselves are in `path`.

    Attributes
    ----------
    path
        ablation.parquet.
    summary
        Gain, worth and forgetting, unit by unit.
    cost
        Passes and seconds of this call.
    naive
        Passes of the whole model that what this call measured takes without any reuse.
    """

    path: Path
    summary: "Summary"
    cost: "Cost"
    naive: float

    def __str__(self) -> str:
        from lisa_train.command.ablate_table import in_words

        return in_words(self)


def note(text: str) -> None:
    """Say something that a reader should know."""
    print(f"note: {text}.", file=sys.stderr, flush=True)


def ablate(
    run_dir: str | Path,
    *,
    data: Any = None,
    general: str | Path | bool | None = None,
    max_examples: int | None = MAX_EXAMPLES,
    by: "By" = "layer",
    ranges: "Ranges" = None,
    model: "nn.Module | str | Path | None" = None,
    base: str | Path | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    bf16: bool = False,
    progress: bool | None = None,
    say: Callable[[str], None] = note,
) -> Ablation:
    """Measure what every layer's change was worth, on held-out examples and on general text.

    Every unit's learned change is taken out of the trained model (``reset``) and put into the base
    alone (``keep``); neither removes a layer. The losses of every example are written to
    ablation.parquet in the run directory, exact to the last bit: all changes taken out are the
    base. What an interrupted call measured is kept and not measured again; a call with another
    `by`, range or text adds its rows.

    Several processes (torchrun) that call it together share the batches among them; the first one
    writes, and the losses are those of one process. None of them may be left out.

    Parameters
    ----------
    run_dir
        A finished run: full fine-tuning, LISA or an adapter.
    data
        None takes the examples that the run held out. Else a dataset as for `lisa-train`, or
        examples as its Trainer took them: mappings with `labels`.
    general
        None takes the text that comes with the package, if the run trained a language model on
        text of `lisa-train`; False none. Else a .txt file of paragraphs, or a dataset with text.
    max_examples
        So many examples of each at most, evenly spread over what there is; None takes all. Four
        times as many halve the intervals.
    by
        ``layer``: every layer, and embedding, head, norm; ``kind``: every layer's attn.q, mlp.up, …
        (groups too); ``both``.
    ranges
        Runs of layers as well: 4 for every run of four, or ``["4-7", …]``.
    model
        The trained model or its folder, where the run directory holds none.
    base
        Folder or hub id of the base, where it is not where config.yaml says.
    collate
        With examples: makes a batch of some of them; None stacks those of equal shapes.
    bf16
        Compute in that precision by autocast: faster where the processor has it, good enough for
        ``keep`` and coarse for ``reset`` (`docs/ablation.md` has figures).
    progress
        True shows a bar, false nothing; None a bar on a terminal, and a few lines elsewhere.
    say
        Takes what a reader should know, each without its full stop.

    Returns
    -------
    Ablation
        Its text is the table that `lisa-ablate` prints.

    Raises
    ------
    ConfigError
        For settings, data or a base that cannot be used; nothing is written then.
    RunDirectoryError
        When the run is being trained, has no trained weights, or cannot be written.
    """
    from lisa_train.measure.ablation.ablating import ablate_units
    from lisa_train.measure.ablation.file import AblationFile
    from lisa_train.measure.ablation.summary import summarize
    from lisa_train.measure.ablation.units import make_units, read_ranges

    check_max_examples(max_examples)
    meet()
    run = open_run(run_dir)
    read_ranges(ranges, run.n_layers)
    say = say if is_first() else _nothing
    with _alone(run.path):
        trained = load_trained(run, model, base, data)
        units = make_units(trained.change.parts, trained.change.kinds, by, ranges)
        losses, examples = prepare_examples(trained, data, general, max_examples, collate, bf16)
        measured = {name: one.measured for name, one in examples.items()}
        file = agreed(lambda: AblationFile(run.path, trained.about, measured))
        file.writes = is_first()
        _check_same_examples(file, measured)
        if file.unfinished.exists():
            say("this goes on where an interrupted call stopped")
        naive = _one_by_one(file, units, list(examples))
        cost = ablate_units(
            trained.change, losses, examples, units, file, progress=progress, say=say
        )
        return Ablation(file.path, summarize(file, units), cost, naive)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one ablation at a time measure a run, and no training beside it."""
    from lisa_train.measure.disk.storage import RunLock, describe_os_error

    held: list[RunLock] = []

    def lock() -> None:
        try:
            held.append(RunLock(path / LOCK))
        except OSError as error:
            raise describe_os_error(path, error) from error

    all_are_here()  # to whom the run would be in use, once it is locked
    agreed(lock)
    try:
        yield
    finally:
        for one in held:
            one.release()


def _check_same_examples(file: "AblationFile", mine: "Mapping[str, Measured]") -> None:
    """`ConfigError` where this process does not have the first one's examples."""
    for name, one in mine.items():
        theirs = file.about["data"][name]
        if theirs["digest"] != one.about["digest"]:
            raise ConfigError(
                f"the processes have different {name} examples ({theirs['examples']} and "
                f"{one.about['examples']} of {one.about['name']}): let all of them read the same "
                "files."
            )


def _nothing(text: str) -> None:
    """Take what only the first process says."""


def _one_by_one(file: "AblationFile", units: "list[AblatedUnit]", names: list[str]) -> float:
    """Passes over all examples that are still to be made, without any reuse."""
    from lisa_train.measure.ablation.file import Key

    units = [unit for unit in units if unit.parts]
    keys = [Key(None, None, mode, name) for mode in ("trained", "base") for name in names]
    keys += [
        Key(unit.name, unit.kind, mode, name)
        for unit in units for mode in ("reset", "keep") for name in names
    ]  # fmt: skip
    return sum(len(file.missing(key)) / len(file.tokens[key.data]) for key in keys)


def prepare_examples(
    trained: TrainedRun,
    data: Any,
    general: str | Path | bool | None,
    max_examples: int | None,
    collate: Callable[[list[Any]], Any] | None = None,
    bf16: bool = False,
) -> "tuple[ExampleLosses, dict[str, Examples]]":
    """Return how losses are taken, and the examples of ``held_out`` and ``general``."""
    from lisa_train.measure.ablation.losses import ExampleLosses, choose_examples

    with trained.change.as_found():
        rows = {"held_out": held_out_rows(trained, data, collate)}
        trained.model.eval()
        losses = ExampleLosses(trained.model, rows["held_out"], bf16=bf16)
        if bf16:
            trained.about["dtype"] += " computed in bfloat16"
        of_text = losses.rule == "next" and trained.tokenizer is not None
        if general is None:
            general = of_text
        if general is not False:
            rows["general"] = general_rows(trained, None if general is True else general)
        tokens = _TOKENS.get(trained.about["device"], _TOKENS["cpu"])
        return losses, {
            name: choose_examples(losses, one, max_examples, tokens) for name, one in rows.items()
        }


def check_max_examples(most: int | None) -> None:
    """`ConfigError` unless the number of examples is a whole one of at least 2."""
    if most is not None:
        whole("max_examples", most, " of at least 2 (intervals need two examples)", 2)
