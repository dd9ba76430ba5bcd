"""Ctrl-C and SIGTERM, with which a cluster ends a job: both close a run, and exit with 130."""

import signal
import threading
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The user or the cluster stops the command.

    A class of its own because CPython takes a plain `KeyboardInterrupt` for unhandled as soon as it
    passes through `exec` or `eval` of a string, as of every dataclass that a late import defines:
    however it is caught, ``python -m`` then ends by SIGINT instead of the exit code it was given.
    (`run_eval_code_obj` of CPython's pythonrun.c compares the exact type.)

    Its argument, where it has one, says what is left of what was done.
    """


def stop_on_signals() -> None:
    """Raise `Interrupted` in the main thread on Ctrl-C and on SIGTERM.

    In another thread nothing is changed, for there Python lets nobody set handlers; nor where
    Ctrl-C is ignored, as by a shell's background jobs, or handled by the program around.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted
