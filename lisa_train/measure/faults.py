"""An error inside the recorder: whose it is, and what becomes of it. The one place that decides.

A training of days shall not die of a bug in what watches it, and a bug shall not pass for a full
disk. So there are three kinds:

- *Bad input* (`is_refusal`) is raised before training begins; nothing has been done yet then.
- *The machine's*: the disk, memory, a device. With ``on_record_error="warn"`` it is said and
  training goes on, with ``"raise"`` it is raised.
- *A fault of lisa-toolkit* (`is_fault`): the same, but the warning asks for a report and holds the
  traceback, which the run's events keep; the recording ends as ``failed``. Where the environment
  has ``LISA_TOOLKIT_STRICT=1``, as the toolkit's own tests do, it is raised whatever the setting:
  a test that merely warned would be passed.

With several processes everything but a refusing disk is raised: a process that goes on alone would
let the others wait for ever.
"""

import os
import traceback
from pathlib import Path
from typing import Literal

import lisa_analysis
import lisa_train
from lisa_analysis.contract.errors import LisaError
from lisa_train.measure.disk.run_file import one_sentence
from lisa_train.measure.disk.storage import UnwritableError

STRICT = "LISA_TOOLKIT_STRICT"
PLEASE_REPORT = "a fault of lisa-toolkit, please report it"
# What Python raises for a wrong program. A machine that fails raises OSError, MemoryError or
# RuntimeError (torch: devices, memory, and, as NotImplementedError, kernels), or its library's own.
_OF_PROGRAMS = (
    TypeError,
    AttributeError,
    LookupError,  # KeyError, IndexError
    NameError,
    AssertionError,
    ArithmeticError,
    ValueError,
)
_TOOLKIT = tuple(Path(str(package.__file__)).parent for package in (lisa_analysis, lisa_train))


def is_refusal(error: BaseException) -> bool:
    """Whether a wrong choice of the user's (a directory that holds a run) is to blame.

    It stops training before anything has begun, whatever `on_record_error` says: what fails for
    another reason, the disk's or the recorder's own, does not have to.
    """
    return isinstance(error, LisaError) and not isinstance(error, UnwritableError)


def is_fault(error: BaseException, *, foreign: bool = False) -> bool:
    """Whether lisa-toolkit itself is to blame.

    Parameters
    ----------
    error
        What was raised inside the recorder.
    foreign
        Whether it came out of other people's code that the recorder called (the user's backward
        pass, a model's own method, another library's private rules). Then only what was raised in
        a line of the toolkit counts.
    """
    if isinstance(error, LisaError) or not isinstance(error, _OF_PROGRAMS):
        return False
    return not foreign or _where(error)[0]


def strict() -> bool:
    """Whether faults are raised whatever `on_record_error` says."""
    return os.environ.get(STRICT, "") not in ("", "0")


def stops_training(
    error: BaseException, on_record_error: Literal["warn", "raise"], *, foreign: bool = False
) -> bool:
    """Whether an error is to be raised out of the recorder; says in it whose fault it is."""
    fault = is_fault(error, foreign=foreign)
    if fault and not any(PLEASE_REPORT in note for note in getattr(error, "__notes__", ())):
        error.add_note(f"This is {PLEASE_REPORT} with this traceback.")
    return on_record_error == "raise" or (fault and strict())


def come_through(error: BaseException, *, foreign: bool = False) -> None:
    """Raise a fault where the environment is strict; else whoever caught it finds another way."""
    if strict() and is_fault(error, foreign=foreign):
        raise error


def reason(error: BaseException, *, foreign: bool = False) -> str:
    """Return an error as one sentence; of a fault it says whose, and where."""
    if isinstance(error, LisaError):
        return str(error)
    if not is_fault(error, foreign=foreign):
        return one_sentence(error)
    return f"{PLEASE_REPORT}: {one_sentence(error)} ({_where(error)[1]})"


def full_traceback(error: BaseException, *, foreign: bool = False) -> str | None:
    """Return the traceback of a fault; None for an error that is no fault."""
    if not is_fault(error, foreign=foreign):
        return None
    return "".join(traceback.format_exception(error))


def warning_text(text: str, error: BaseException, *, foreign: bool = False) -> str:
    """Return `text`, with the traceback beneath it if the error is a fault."""
    trace = full_traceback(error, foreign=foreign)
    return text if trace is None else f"{text}\n{trace}"


def _where(error: BaseException) -> tuple[bool, str]:
    """Whether the toolkit's own line raised an error, and the toolkit's last line before it."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if any(Path(f.filename).is_relative_to(p) for p in _TOOLKIT)]
    if not own:
        return False, "raised by others"
    return own[-1] is frames[-1], f"{Path(own[-1].filename).name}, line {own[-1].lineno}"
