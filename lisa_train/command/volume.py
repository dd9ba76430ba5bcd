"""How much a command prints: what a person should know, `--quiet` less, `--verbose` more."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

from lisa_train.command.together import launched

_LIBRARIES = ("lisa_train", "transformers", "bitsandbytes")  # loggers; with --quiet the first two


@contextlib.contextmanager
def at_volume(*, quiet: bool = False, verbose: bool = False) -> Iterator[None]:
    """Leave the terminal to this command: one progress bar, no notes between libraries.

    Parameters
    ----------
    quiet
        Warnings and what loggers say below an error are left out too.
    verbose
        The libraries speak as they like.
    """
    levels = {name: logging.getLogger(name).level for name in _LIBRARIES}
    shown = warnings.formatwarning
    try:
        if quiet:
            warnings.simplefilter("ignore")
            for name in _LIBRARIES[:2]:
                logging.getLogger(name).setLevel(logging.ERROR)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if launched() > 1:
            # Trainer has DDP look for tensors without gradients, and DDP warns where there are
            # none; said before torch is imported.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if not verbose:
            _quiet_libraries()
            warnings.formatwarning = _in_a_line
        yield
    finally:  # in a notebook or a test the process goes on
        warnings.formatwarning = shown
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _in_a_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Write a warning without the line of code that it comes from, which is in some library."""
    return f"warning: {' '.join(str(message).split())}\n"


def _quiet_libraries() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    # What it could not fetch for 4-bit weights on a CPU, in every process.
    logging.getLogger(_LIBRARIES[2]).setLevel(logging.ERROR)
    from datasets.utils.logging import disable_progress_bar as disable_datasets_bars
    from transformers.utils import logging as transformers_logging

    disable_datasets_bars()
    transformers_logging.disable_progress_bar()
