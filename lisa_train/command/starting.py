"""What the libraries below refuse before the first step, as one sentence instead of a traceback.

A dataset, a template, a tokenizer, a setting that does not fit: each library raises errors of its
own for it. They all become `ConfigError` here. A fault in our own code stays what it is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from types import CodeType
from typing import Any

from lisa_analysis.contract.errors import ConfigError, LisaError

# Packages whose absence has a sentence of its own, see `lisa_train.command.cli`.
TRAINING_PACKAGES = frozenset(
    {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "jsonargparse", "yaml"}
)
_OURS = frozenset({"lisa_train", "lisa_analysis"})
# Functions of ours that stand between two of a library's own: what comes through is not theirs.
_PASSING = frozenset(
    {"wrapped", "evaluation_loop", "prediction_step", "patched_forward",
     "patched", "__call__", "_watched", "_evaluation_loop"}
)  # fmt: skip


@contextmanager
def refusals(
    say: Callable[[str], str],
    *,
    passes: Callable[[Exception], bool] = lambda error: False,
) -> Iterator[None]:
    """Turn what a library refuses into a `ConfigError`.

    Parameters
    ----------
    say
        Returns the sentence for the library's reason.
    passes
        Whether an error stays as it is.
    """
    try:
        yield
    except LisaError:
        raise
    except Exception as error:
        if passes(error) or is_our_fault(error):
            raise
        raise ConfigError(say(reason_of(error))) from error


def is_our_fault(error: BaseException) -> bool:
    """Whether our own code raised it, or was called back by a library and failed then."""
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").split(".")[0] in TRAINING_PACKAGES | _OURS
    frames = [
        (frame.f_code, _package(frame.f_globals))
        for frame, _ in walk_tb(error.__traceback__)
        if not frame.f_code.co_filename.startswith("<frozen")
    ]
    if not frames:
        return False
    if frames[-1][1] in _OURS:  # raised there, whatever stands around it
        return True
    foreign = next((i for i, (_, package) in enumerate(frames) if package not in _OURS), None)
    return foreign is None or any(_is_ours(*frame) for frame in frames[foreign:])


def _is_ours(code: CodeType, package: str) -> bool:
    return package in _OURS and code.co_name not in _PASSING


def _package(names: dict[str, Any]) -> str:
    return str(names.get("__name__", "")).split(".")[0]


def reason_of(error: BaseException) -> str:
    """Return what a library said, in one line, with its name where the words alone say little."""
    text = " ".join(str(error).split())[:400].rstrip(".")
    package = ""
    for frame, _ in walk_tb(error.__traceback__):
        package = _package(frame.f_globals) or package
    kind = type(error).__name__
    if isinstance(error, TypeError | AttributeError | LookupError | AssertionError) or not text:
        return f"{kind} in {package}: {text}" if text else f"{kind} in {package}"
    return text
